# SPDX-License-Identifier: Apache-2.0
"""The package around the operators: import, build, versions, command line."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fixed_size_kv_cache
from fixed_size_kv_cache import _C
from fixed_size_kv_cache.cli import app as cli
from fixed_size_kv_cache.compat import versions as _versions
from fixed_size_kv_cache.operators import load as _load
from fixed_size_kv_cache.operators import register as _operators

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_one_version_everywhere():
    text = (ROOT / "python/fixed_size_kv_cache/_version.py").read_text()
    assert f'"{fixed_size_kv_cache.__version__}"' in text
    assert _C.build_info()["version"] == fixed_size_kv_cache.__version__


def test_the_compiled_library_and_python_know_the_same_operators():
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
    assert tuple(schemas) == _operators.OPERATORS
    for name in _operators.OPERATORS:
        assert hasattr(torch.ops.fsdc, name)


def test_operators_work_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
import torch, fixed_size_kv_cache
keys = torch.ones(1, 1, 4, 2)
print(torch.ops.fsdc.truncate(keys, keys, torch.arange(4.0).view(1, 1, 4), 2)[2].tolist())
"""
    assert run_python(code) == "[[[2, 3]]]"


def test_import_does_not_import_transformers():
    assert run_python("import sys, fixed_size_kv_cache; print('transformers' in sys.modules)") == "False"


BUILD = {"cuda": "13.0"}


@pytest.mark.parametrize(
    "build, torch_version, torch_cuda, problem",
    [
        (BUILD, "2.11.0+cu130", "13.0", None),
        (BUILD, "3.0.1", "13.9", None),
        ({"cuda": None}, "2.15.0+cpu", None, None),
        ({"cuda": None}, "2.15.0+cu132", "13.2", None),
        (BUILD, "2.15.0+cu142", "14.2", "was built for CUDA 13.0; torch 2.15.0+cu142 has CUDA 14.2"),
        (BUILD, "2.15.0+cpu", None, "was built for CUDA 13.0; torch 2.15.0+cpu has no CUDA"),
        (BUILD, "2.9.1", "13.0", "needs torch 2.11 or newer; got torch 2.9.1"),
        (None, "2.15.0", "13.2", "is not built for this Python"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(build, torch_version, torch_cuda, problem):
    said = _load.problem(build, torch_version, torch_cuda)
    assert said is None if problem is None else problem in said


def test_each_binary_has_its_own_facts(tmp_path, monkeypatch):
    for python, cuda in (("310", "13.0"), ("311", None)):
        (tmp_path / f"_C.cpython-{python}-x86_64-linux-gnu.json").write_text(json.dumps({"cuda": cuda}))
    for python, cuda in (("310", {"cuda": "13.0"}), ("311", {"cuda": None}), ("312", None)):
        binary = SimpleNamespace(origin=str(tmp_path / f"_C.cpython-{python}-x86_64-linux-gnu.so"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, binary=binary: binary)
        assert _load.read_build_info() == cuda


@pytest.mark.parametrize(
    "version, support",
    [
        (None, "not installed"),
        ("4.48.2", "unsupported"),
        ("4.9.0", "unsupported"),
        ("4.48.3", "untested"),
        ("4.50.0.dev0", "untested"),
        ("4.54.1", "unsupported"),
        ("4.55.4", "unsupported"),
        ("5.0.0", "tested"),
        ("5.100.0", "untested"),
    ],
)
def test_support_of_transformers(version, support, monkeypatch):
    monkeypatch.setattr(_versions, "TESTED_TRANSFORMERS", ("5.0.0",))
    assert _versions.transformers_support(version) == support


def test_hugging_face_names_need_transformers():
    code = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
for names in (
    "from fixed_size_kv_cache import FixedSizeDynamicCache",
    "from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache",
    "from fixed_size_kv_cache.llama_attention import forward",
):
    try:
        exec(names)
    except ImportError as error:
        print(error)
"""
    needs = "needs transformers: pip install 'transformers>=4.48.3'"
    assert run_python(code).splitlines() == [
        f"FixedSizeDynamicCache {needs}",
        f"fixed_size_kv_cache {needs}",
        f"fixed_size_kv_cache {needs}",
    ]


def test_the_tested_versions_of_transformers_are_those_of_the_pins():
    pins = {path.stem for path in (ROOT / "tests/versions").glob("*.txt")}
    assert pins == set(_versions.TESTED_TRANSFORMERS)
    for version in pins:
        assert (ROOT / f"tests/versions/{version}.txt").read_text() == f"transformers=={version}\n"


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"fsdc {fixed_size_kv_cache.__version__}\n"


def test_warnings_are_one_line_without_our_code():
    command = "import warnings; from fixed_size_kv_cache.cli import app as cli"
    command += "; cli.app = lambda **_: warnings.warn('so it\\n is')"
    said = subprocess.run([sys.executable, "-c", f"{command}; cli.main()"], capture_output=True, text=True, check=True)
    assert said.stderr == "fsdc: so it is\n"


def test_info():
    result = CliRunner().invoke(cli.app, ["info"])
    assert result.exit_code == 0
    for word in (fixed_size_kv_cache.__version__, torch.__version__, _C.cpu_isa(), "torch.ops.fsdc.truncate"):
        assert word in result.stdout


def test_info_as_json():
    said = subprocess.run(
        [sys.executable, "-m", "fixed_size_kv_cache", "info", "--json"], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(said) == cli.collect()


def test_both_builds_compile_the_same_folders():
    folders = {"csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp"}
    folders |= {"kernels/cpu/*.cpp", "kernels/cuda/*.cu", "kernels/cuda/*/*.cu"}
    for file in ("setup.py", "CMakeLists.txt"):
        named = set(re.findall(r"(?:csrc|kernels)/[\w/*]*\*\.\w+", (ROOT / file).read_text()))
        assert named == folders, file


@pytest.mark.parametrize(
    "setuptools, wheel, wanted",
    [((65, 5), True, []), ((65, 5), False, ["wheel"]), ((70, 1), False, []), ((59, 6), True, ["setuptools>=64.0"])],
)
def test_the_build_asks_for_what_is_missing_only(setuptools, wheel, wanted, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "python")
    import _build_backend

    monkeypatch.setattr(_build_backend, "_release", {"setuptools": setuptools, "torch": (2, 11)}.get)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if wheel else None)
    assert _build_backend.get_requires_for_build_wheel() == wanted
    assert _build_backend.get_requires_for_build_editable() == wanted
