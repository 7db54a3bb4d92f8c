# SPDX-License-Identifier: Apache-2.0
"""The command ``fsdc``."""

import json
import platform
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import _C, __version__
from ..compat import versions
from ..operators.load import BUILD
from ..operators.register import OPERATORS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug prints Python's own traceback
)


class Task(str, Enum):
    needle = "needle"
    zipf = "zipf"
    recency = "recency"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fsdc {__version__}")
        raise typer.Exit


@app.callback()
def fsdc(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A KV cache of fixed size for Hugging Face transformers."""


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, what was built, and what this machine uses. Paste it into a bug report."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    Console(soft_wrap=True).print(table, highlight=False)


@app.command()
def demo(
    task: Annotated[Task, typer.Option(help="What the live part reads; the table shows all three.")] = Task.zipf,
    cache_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens per layer and KV head.")] = 48,
    length: Annotated[int, typer.Option(min=128, max=512, help="Words of a text; the model learned from 512.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the texts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Watch caches of one size answer questions about what they read, beside the full cache."""
    from . import demo as demonstration  # transformers takes seconds to import

    _quiet()
    demonstration.show(task.value, cache_size, length, seed, as_json)


@app.command()
def generate(
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="- reads the prompt from standard input.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub name; else the embedded model.")] = None,
    cache_size: Annotated[int, typer.Option(min=1, help="Tokens per layer and KV head.")] = 1024,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with that text, - for standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn: apply the chat template.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as saved.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Run the stock cache too, show where they part.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Write text with a cache of fixed size: the text on stdout, figures on stderr."""
    text = _prompt(stdin, prompt, prompt_file)
    from . import generate as generation

    _quiet()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        generation.run(model, cache_size, text, max_new_tokens, chat, dtype.value, device, compare, as_json)
    except generation.Refused as error:
        print(f"fsdc generate: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def perplexity(
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="- reads the text from standard input.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub name; else the embedded model.")] = None,
    cache_size: Annotated[int, typer.Option(min=1, help="Tokens per layer and KV head.")] = 1024,
    prompt: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with that text, - for standard input.")] = None,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Tokens at a time; else a 16th of the cache.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as saved.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Read it with a cache that holds all of it too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read a text through a cache of fixed size, and show how well the model predicts it."""
    text = _prompt(stdin, prompt, prompt_file)
    from . import perplexity as measuring
    from .load_model import Refused

    _quiet()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        measuring.run(model, cache_size, text, chunk_size, dtype.value, device, compare, as_json)
    except Refused as error:
        print(f"fsdc perplexity: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, JSON.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub name; else the embedded model.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A file to read instead of our own texts; may be repeated.")
    ] = None,
    length: Annotated[int, typer.Option(min=64, help="Tokens of each text.")] = 600,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as saved.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how much each KV head of a model needs the whole text, and write it to a file."""
    from . import profile as profiling
    from .load_model import Refused

    _quiet()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        profiling.run(model, output, text or [], length, dtype.value, device, as_json)
    except Refused as error:
        print(f"fsdc profile: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _prompt(stdin: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    """The one prompt that was given."""
    if stdin not in (None, "-"):
        raise typer.BadParameter(f"the only argument is -, for standard input; got {stdin!r}. Use --prompt TEXT")
    given = [x for x in (stdin, prompt, prompt_file) if x is not None]
    if len(given) != 1:
        raise typer.BadParameter("give one prompt: --prompt TEXT, --prompt-file FILE, or - for standard input")
    if prompt is not None:
        return prompt
    try:
        if stdin == "-" or str(prompt_file) == "-":
            return sys.stdin.buffer.read().decode()
        return prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(
            f"the prompt cannot be read from {prompt_file or 'standard input'}: {error}"
        ) from error


def _quiet() -> None:
    """Keeps what transformers says while it loads out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def collect() -> dict[str, str | list[str]]:
    """What ``fsdc info`` shows."""
    found = versions.transformers_version()
    support = versions.transformers_support(found)
    return {
        "fixed_size_kv_cache": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built with {BUILD['torch']})",
        "transformers": support if found is None else f"{found} ({support}; at least {versions.OLDEST_TRANSFORMERS})",
        "CUDA kernels": f"CUDA {BUILD['cuda']}" if BUILD["cuda"] else f"none: {BUILD['without_cuda_because']}",
        "CUDA architectures": BUILD["cuda_architectures"] or "none",
        "CUDA devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none",
        "CPU instruction set": _C.cpu_isa(),
        "compiler": _C.build_info()["compiler"],
        "operators": [f"torch.ops.fsdc.{name}" for name in OPERATORS if hasattr(torch.ops.fsdc, name)],
    }


def main() -> None:
    """The entry point of ``fsdc`` and ``python -m fixed_size_kv_cache``."""
    # Without the place in the code, which Python would print too.
    warnings.formatwarning = lambda message, *_, **__: f"fsdc: {' '.join(str(message).split())}\n"
    app(prog_name="fsdc")
