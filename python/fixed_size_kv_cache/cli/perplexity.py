# SPDX-License-Identifier: Apache-2.0
"""``fsdc perplexity``: what a cache of fixed size costs a model on a text."""

import functools
import json
import sys

from rich.console import Console
from rich.progress import track

from ..compat.versions import OLDEST_INTERFACE, has_interface
from .generate import encode
from .load_model import Refused, learned_positions, load, load_profile, one_line


def run(
    name: str | None,
    cache_size: int,
    head_profile: str | None,
    text: str,
    chunk_size: int | None,
    dtype: str,
    device: str,
    compare: bool,
    as_json: bool,
) -> None:
    """Prints the figures, or raises ``Refused``."""
    if not has_interface():
        raise Refused(f"needs transformers>={OLDEST_INTERFACE}")
    from ..huggingface.measuring import default_chunk_size, perplexity

    model, tokenizer = load(name, dtype, device)
    ids = encode(tokenizer, text, chat=False, embedded=name is None)
    count, positions = ids.shape[1], learned_positions(model)
    if count < 2:
        raise Refused(f"the text must have at least 2 tokens; got {count}")
    if positions is not None and count > positions:
        raise Refused(f"the text must fit the {positions} positions that the model has learned; got {count} tokens")
    bar = functools.partial(track, description="reading", console=Console(stderr=True), transient=True)
    chunk_size = chunk_size or default_chunk_size(model, cache_size)
    sizes = dict(head_profile=load_profile(head_profile, model), max_tokens=max(count - 1, cache_size))
    options = dict(chunk_size=chunk_size, progress=bar if sys.stderr.isatty() else None)
    try:
        facts = {"perplexity": perplexity(model, ids, cache_size, **sizes, **options)}
        if compare:
            facts["perplexity_of_all"] = perplexity(model, ids, max(count, cache_size), **options)
    except (NotImplementedError, ValueError) as error:
        raise Refused(one_line(error)) from error
    facts |= {"tokens": count, "cache_size": cache_size, "chunk_size": chunk_size}
    if as_json:
        print(json.dumps(facts))
        return
    print(f"perplexity {facts['perplexity']:.3f}")
    if compare:
        print(f"with a cache that holds all {facts['perplexity_of_all']:.3f}")
    print(f"{count} tokens, {chunk_size} at a time, cache_size={cache_size}", file=sys.stderr)
