# SPDX-License-Identifier: Apache-2.0
"""The package around the operators: import, build, versions, command line."""

import ast
import importlib.metadata
import importlib.util
import json
import os
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
from fixed_size_kv_cache.cli import info
from fixed_size_kv_cache.compat import versions as _versions
from fixed_size_kv_cache.layer import chunk
from fixed_size_kv_cache.layer.layer import FixedSizeLayer
from fixed_size_kv_cache.operators import load as _load
from fixed_size_kv_cache.operators import register as _operators
from fixed_size_kv_cache.settings import POLICIES, FixedSizeCacheConfig
from fsdc_command.app import app

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
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"fsdc {fixed_size_kv_cache.__version__}\n"


def test_warnings_are_one_line_without_our_code():
    command = "import warnings, fsdc_command.app; fsdc_command.app.app = lambda **_: warnings.warn('so it\\n is')"
    command += "; fsdc_command.main()"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert said.stderr == "fsdc: so it is\n"


QUESTIONS = [["--help"], ["--version"], ["generate", "--help"], ["generate", "--cache-size", "0"], ["perplexity"]]


@pytest.mark.parametrize("arguments", QUESTIONS, ids=" ".join)
def test_what_needs_no_torch_does_not_load_it(arguments):
    code = f"""
import sys, fsdc_command
sys.argv = ["fsdc", *{arguments}]
try:
    fsdc_command.main()
except SystemExit as end:
    heavy = {{"torch", "transformers", "numpy", "fixed_size_kv_cache"}} & sys.modules.keys()
    print("ended with", end.code, "and", *sorted(heavy))
"""
    assert re.search(r"^ended with [02] and$", run_python(code), re.MULTILINE)


@pytest.mark.parametrize("command", ["info", "demo", "generate --prompt x", "perplexity --prompt x"])
@pytest.mark.parametrize("module", ["typer", "torch"])
def test_an_interrupt_while_modules_are_imported_is_quiet(module, command, tmp_path):
    (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT); raise SystemError")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import fsdc_command; fsdc_command.main()"
    ended = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, b"", b"")


def test_info():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for word in (fixed_size_kv_cache.__version__, torch.__version__, _C.cpu_isa(), "torch.ops.fsdc.truncate"):
        assert word in result.stdout


def test_info_has_one_line_for_each_fact_however_long(monkeypatch):
    long = ["a GPU with a name of its own"] * 9
    monkeypatch.setattr(info, "collect", lambda: {"one": "x" * 500, "CUDA devices": long})
    monkeypatch.setenv("COLUMNS", "40")
    said = CliRunner().invoke(app, ["info"]).stdout
    assert said.splitlines() == ["one           " + "x" * 500, "CUDA devices  " + ", ".join(long)]


def test_info_as_json():
    said = subprocess.run(
        [sys.executable, "-m", "fixed_size_kv_cache", "info", "--json"], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(said) == info.collect()


def test_info_says_what_computes_the_steps_of_a_layer(monkeypatch):
    """As the layer itself decides it, and not by rules of its own."""
    said = CliRunner().invoke(app, ["info", "--verbose"]).stdout
    facts = dict(re.split("  +", line, maxsplit=1) for line in said.splitlines())
    assert set(map("torch.ops.fsdc.{}".format, _operators.OPERATORS)) < facts.keys()
    for device in ("cpu", "cuda"):
        assert facts[f"decode step on {device}"] == (
            "policy attention: fused, decode_attention_; policy streaming or random: plain torch, accumulate_scores_"
        )
        assert facts[f"chunk step on {device}"] == "fused, chunk_attention_; then truncate"
    monkeypatch.setattr(chunk, "is_fused", lambda device: device.type == "cuda")
    assert info.steps()["chunk step on cuda"] == "fused, chunk_attention_; then truncate"
    assert info.steps()["chunk step on cpu"] == "plain torch, accumulate_scores_; then truncate"
    for policy in POLICIES:  # a layer says the same of itself
        layer = FixedSizeLayer(FixedSizeCacheConfig(cache_size=8, policy=policy))
        layer.load(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
        (path,) = re.findall(rf"policy [^:]*{policy}[^:]*: (\w+)", facts["decode step on cpu"])
        assert path == layer.decode_path


def test_the_instruction_set_of_each_operator():
    best = _C.cpu_isa()
    try:
        for isa in ("amx", "avx512", "avx2", "portable"):
            if _C.use_cpu_isa(isa):
                found = {name: _C.cpu_isa_of(name) for name in _operators.OPERATORS}
                lower = {"amx": "avx512"}.get(isa, isa)  # tiles multiply matrices, which one operator does
                assert found == dict.fromkeys(found, lower) | {"chunk_attention_": isa}
    finally:
        _C.use_cpu_isa(best)
    with pytest.raises(IndexError):
        _C.cpu_isa_of("no_such")


def test_completion_finds_what_is_not_loaded_yet():
    code = """
import fixed_size_kv_cache as package
print("enable" in vars(package), {*package.__all__} - {*dir(package)}, package.reference.truncate.__name__)
"""
    assert run_python(code) == "False set() truncate"


def test_the_names_for_type_checkers_are_those_that_are_loaded():
    tree = ast.parse(Path(fixed_size_kv_cache.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert all(alias.asname == alias.name for node in typed.body for alias in node.names)  # so they are exported
    found = {alias.name: node.module for node in typed.body for alias in node.names}
    assert found == {"reference": None, **fixed_size_kv_cache._HUGGING_FACE}


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed: pip install -e '.[test]'")
def test_a_program_of_a_user_is_type_checked(tmp_path):
    program = """
from fixed_size_kv_cache import FixedSizeDynamicCache, enable
cache = FixedSizeDynamicCache(cache_size=24)
with enable(object(), cache_size=24) as handle:
    reveal_type(handle.prefill_chunk_size + cache.nbytes)
"""
    assert check_types(tmp_path, program) == ['Revealed type is "int"']
    assert check_types(tmp_path, program.replace("cache_size=24)", "cache_size='24')", 2)) == [
        'Argument "cache_size" to "enable" has incompatible type "str"; expected '
        '"int | Sequence[int | Sequence[int] | None] | None"',
        'Revealed type is "int"',
    ]
    misspelt, *_ = check_types(tmp_path, program.replace(", enable", ", enabled"))
    assert misspelt == 'Module "fixed_size_kv_cache" has no attribute "enabled"; maybe "enable"?'


def check_types(folder: Path, program: str) -> list[str]:
    """What mypy says. The types of torch and transformers are not ours, and reading them takes minutes."""
    (folder / "program.py").write_text(program)
    (folder / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "program.py"], cwd=folder, capture_output=True, text=True
    )
    assert done.stderr == ""
    return [re.sub(r"^program\.py:\d+: \w+: (.*?)(?:  \[[\w-]+\])?$", r"\1", line) for line in done.stdout.splitlines()]


def test_both_builds_compile_the_same_folders():
    folders = {"csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp"}
    folders |= {"kernels/cpu/*.cpp", "kernels/cuda/*.cu", "kernels/cuda/*/*.cu"}
    for file in ("setup.py", "CMakeLists.txt"):
        named = set(re.findall(r"(?:csrc|kernels)/[\w/*]*\*\.\w+", (ROOT / file).read_text()))
        assert named == folders, file


def test_the_build_does_not_warn_of_numpy():
    """torch does where there is none, as in the new environment that a user builds in."""
    code = f"""
import sys
sys.modules["numpy"] = None  # as if it were not installed
if sys.argv[1:] == ["torch"]:
    import torch
else:
    import setuptools
    setuptools.setup = lambda **what: print(*what)
    sys.path.insert(0, {str(ROOT)!r})
    import setup
"""
    said = [
        subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=True)
        for what in ("torch", "setup")
    ]
    assert "Failed to initialize NumPy" in said[0].stderr
    assert "NumPy" not in said[1].stderr and "ext_modules" in said[1].stdout


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
