# SPDX-License-Identifier: Apache-2.0
import os
import sys
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin starve others on a busy machine

import pytest
import torch
from hypothesis import settings

import fixed_size_kv_cache  # noqa: F401  (loads the operators)
import fsdc_command

settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch) -> str:
    """Steps by the operators, and in plain torch: as they are on CUDA, and as the operators are held to."""
    from fixed_size_kv_cache.layer import chunk, decode

    if request.param == "plain":
        monkeypatch.setattr(decode, "is_fused", lambda settings, device: False)
        monkeypatch.setattr(chunk, "is_fused", lambda device: False)
    return request.param


@pytest.fixture
def fsdc(monkeypatch, capsys) -> Callable[..., str]:
    """The command line, from its entry point on: what it writes to stdout."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fsdc", *arguments])
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # it sets another one
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            fsdc_command.main()
        written = capsys.readouterr()
        assert end.value.code == 0, written.err
        return written.out

    return run
