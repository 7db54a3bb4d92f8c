# SPDX-License-Identifier: Apache-2.0
"""The command ``fsdc``."""

import json
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import _C, __version__, _versions
from ._build_info import BUILD
from ._operators import OPERATORS

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="A KV cache of fixed size for Hugging Face transformers."
)


@app.callback()
def _root() -> None:
    """Makes typer ask for a subcommand while there is only one."""


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, what was built, and what this machine uses. Paste it into a bug report."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    Console(soft_wrap=True).print(table, highlight=False)


def collect() -> dict[str, str | list[str]]:
    """What ``fsdc info`` shows."""
    found = _versions.transformers_version()
    support = _versions.transformers_support(found)
    return {
        "fixed_size_kv_cache": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built with {BUILD['torch']})",
        "transformers": support if found is None else f"{found} ({support}; at least {_versions.OLDEST_TRANSFORMERS})",
        "CUDA kernels": f"CUDA {BUILD['cuda']}" if BUILD["cuda"] else f"none: {BUILD['without_cuda_because']}",
        "CUDA architectures": BUILD["cuda_architectures"] or "none",
        "CUDA devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none",
        "CPU instruction set": _C.cpu_isa(),
        "compiler": _C.build_info()["compiler"],
        "operators": [f"torch.ops.fsdc.{name}" for name in OPERATORS if hasattr(torch.ops.fsdc, name)],
    }


def main() -> None:
    """The entry point of ``fsdc`` and ``python -m fixed_size_kv_cache``."""
    app(prog_name="fsdc")
