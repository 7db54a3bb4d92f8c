# SPDX-License-Identifier: Apache-2.0
"""``fsdc profile``: how much each KV head of a model needs the whole text, as a file."""

import functools
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ..compat.versions import OLDEST_INTERFACE, has_interface
from .load_model import Refused, load, one_line


def run(name: str | None, output: Path, texts: list[Path], length: int, dtype: str, device: str, as_json: bool) -> None:
    """Writes the file and prints what is in it, or raises ``Refused``."""
    if not has_interface():
        raise Refused(f"needs transformers>={OLDEST_INTERFACE}")
    from ..huggingface.profiling import profile_heads

    try:
        read = [path.read_text(encoding="utf-8") for path in texts]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--text: {one_line(error)}") from error
    model, tokenizer = load(name, dtype, device)
    bar = functools.partial(track, description="profiling", console=Console(stderr=True), transient=True)
    embedded = name is None and not read  # it knows no English
    try:
        profile = profile_heads(
            model,
            None if embedded else tokenizer,
            texts=read or None,
            length=length,
            progress=bar if sys.stderr.isatty() else None,
        )
        profile.save(output)
    except (NotImplementedError, ValueError, OSError) as error:
        raise Refused(one_line(error)) from error
    ranked = sorted((error for layer in profile.output_error for error in layer), reverse=True)
    tenth = ranked[: max(1, len(ranked) // 10)]
    share = sum(tenth) / sum(ranked) if sum(ranked) > 0 else 0.0
    facts = {"heads": len(ranked), "share_of_the_first_tenth": round(share, 4), "output": str(output)}
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{output}: {len(ranked)} KV heads; a tenth of them has {share:.0%} of the output error")
