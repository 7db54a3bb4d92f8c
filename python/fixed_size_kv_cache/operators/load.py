# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled part, _C. Where that must fail, one sentence says why."""

import importlib.util
import json
from pathlib import Path

import torch  # first: _C needs the libraries that torch loads
from packaging.version import Version

PACKAGE = "fixed_size_kv_cache"
OLDEST_TORCH = "2.11"
REMEDY = "Run `pip install -e .` in its source folder"


def read_build_info():
    """What this package was built for, None where it was not built for this Python."""
    binary = importlib.util.find_spec(f"{PACKAGE}._C")
    facts = Path(binary.origin).with_suffix(".json") if binary else None  # written by setup.py
    return json.loads(facts.read_text()) if facts and facts.exists() else None


def problem(build, torch_version, torch_cuda):
    """Why a build does not work with this torch, in one sentence; None if it does.

    Args:
        build: the dict of `read_build_info`, or None.
        torch_version: `torch.__version__`.
        torch_cuda: `torch.version.cuda`, None for a torch without CUDA.
    """
    if Version(torch_version).release < Version(OLDEST_TORCH).release:
        return f"{PACKAGE} needs torch {OLDEST_TORCH} or newer; got torch {torch_version}. Run `pip install -U torch`."
    if build is None:
        return f"{PACKAGE} is not built for this Python. {REMEDY}."
    if build["cuda"] is None or (torch_cuda or "").split(".")[0] == build["cuda"].split(".")[0]:
        return None
    found = f"CUDA {torch_cuda}" if torch_cuda else "no CUDA"
    return f"{PACKAGE} was built for CUDA {build['cuda']}; torch {torch_version} has {found}. {REMEDY} again."


BUILD = read_build_info()

if _problem := problem(BUILD, torch.__version__, torch.version.cuda):
    raise ImportError(_problem)

from .. import _C  # noqa: E402, F401
