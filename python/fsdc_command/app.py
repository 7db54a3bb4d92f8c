# SPDX-License-Identifier: Apache-2.0
"""The commands and options of ``fsdc``. What they do is imported once they run."""

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

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


# Of every command that loads a model and reads a text.
Stdin = Annotated[str | None, typer.Argument(metavar="[-]", help="- reads the text from standard input.")]
Model = Annotated[str | None, typer.Option(help="Folder or Hub name; else the embedded model.")]
CacheSize = Annotated[int, typer.Option(min=1, help="Tokens per layer and KV head.")]
HeadProfile = Annotated[
    str | None, typer.Option(help="Give KV heads sizes of their own: a file of fsdc profile, or auto to profile now.")
]
Prompt = Annotated[str | None, typer.Option(help="The text to read.")]
PromptFile = Annotated[Path | None, typer.Option(help="A file with that text, - for standard input.")]
DtypeOfWeights = Annotated[Dtype, typer.Option("--dtype", help="Type of the weights; auto: as saved.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fsdc {importlib.metadata.version('fixed_size_kv_cache')}")
        raise typer.Exit


@app.callback()
def fsdc(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A KV cache of fixed size for Hugging Face transformers."""


@app.command()
def info(
    verbose: Annotated[bool, typer.Option("--verbose", help="Also what computes each step of a layer.")] = False,
    as_json: Json = False,
) -> None:
    """Show versions, what was built, and what this machine uses. Paste it into a bug report."""
    from fixed_size_kv_cache.cli import info as information

    information.show(verbose, as_json)


@app.command()
def demo(
    task: Annotated[Task, typer.Option(help="What the live part reads; the table shows all three.")] = Task.zipf,
    cache_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens per layer and KV head.")] = 48,
    length: Annotated[int, typer.Option(min=128, max=512, help="Words of a text; the model learned from 512.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the texts.")] = 0,
    as_json: Json = False,
) -> None:
    """Watch caches of one size answer questions about what they read, beside the full cache."""
    from fixed_size_kv_cache.cli import demo as demonstration

    _quiet()
    demonstration.show(task.value, cache_size, length, seed, as_json)


@app.command()
def generate(
    stdin: Stdin = None,
    model: Model = None,
    cache_size: CacheSize = 1024,
    head_profile: HeadProfile = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="The text is a user's turn: apply the chat template.")] = False,
    dtype: DtypeOfWeights = Dtype.auto,
    device: Device = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Run the stock cache too, show where they part.")] = False,
    as_json: Json = False,
) -> None:
    """Write on from a text with a cache of fixed size: the new text on stdout, figures on stderr."""
    text = _text(stdin, prompt, prompt_file)
    with _refusals("generate"):
        from fixed_size_kv_cache.cli import generate as generation

        generation.run(
            model, cache_size, head_profile, text, max_new_tokens, chat, dtype.value, device, compare, as_json
        )


@app.command()
def perplexity(
    stdin: Stdin = None,
    model: Model = None,
    cache_size: CacheSize = 1024,
    head_profile: HeadProfile = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Tokens at a time; else a 16th of the cache.")] = None,
    dtype: DtypeOfWeights = Dtype.auto,
    device: Device = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Read it with a cache that holds all of it too.")] = False,
    as_json: Json = False,
) -> None:
    """Read a text through a cache of fixed size, and show how well the model predicts it."""
    text = _text(stdin, prompt, prompt_file)
    with _refusals("perplexity"):
        from fixed_size_kv_cache.cli import perplexity as measuring

        measuring.run(model, cache_size, head_profile, text, chunk_size, dtype.value, device, compare, as_json)


@app.command()
def profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, JSON.")],
    model: Model = None,
    text: Annotated[list[Path] | None, typer.Option(help="A file to read, not our own texts; may be repeated.")] = None,
    length: Annotated[int, typer.Option(min=65, help="Tokens of each text.")] = 600,
    dtype: DtypeOfWeights = Dtype.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how much each KV head of a model needs the whole text, and write it to a file."""
    with _refusals("profile"):
        from fixed_size_kv_cache.cli import profile as profiling

        profiling.run(model, output, text or [], length, dtype.value, device, as_json)


def _text(stdin: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    """The one text that was given."""
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


@contextmanager
def _refusals(command: str) -> Iterator[None]:
    """A command that loads a model: what cannot be done is said in one line."""
    from fixed_size_kv_cache.cli.load_model import Refused

    _quiet()
    try:
        yield
    except Refused as error:
        print(f"fsdc {command}: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _quiet() -> None:
    """Keeps what transformers says while it loads out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
