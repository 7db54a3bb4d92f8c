# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/run, as far as it goes without a GPU."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "gpu" / "run"


@pytest.fixture(scope="module")
def script():
    loader = SourceFileLoader("gpu_run", str(SCRIPT))
    module = module_from_spec(spec_from_loader("gpu_run", loader))
    sys.modules["gpu_run"] = module  # where dataclasses look for it
    loader.exec_module(module)
    return module


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_dry_run_shows_every_part(script):
    ran = run("--dry-run")
    assert ran.returncode == 0
    for name in script.parts("9.0", None):
        assert f"{name}: " in ran.stdout


def test_every_file_of_the_commands_exists(script):
    for part in script.parts("9.0", None).values():
        for command in part.commands:
            for word in command:
                if word.endswith(".py") and not word.startswith("-"):
                    assert (script.ROOT / word).exists(), word


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    ran = run()
    assert ran.returncode == 3
    assert "there is no GPU" in ran.stderr


def test_unknown_part():
    ran = run("kernel")
    assert ran.returncode == 2
    assert "got kernel" in ran.stderr


def test_a_part_passes_fails_or_is_skipped(script, tmp_path):
    def part(*code, **settings):
        return script.Part([[sys.executable, "-c", line] for line in code], settings.pop("seconds", 60), **settings)

    passed = script.run_part(part("print('one')", "print('two')"), None)
    assert passed["status"] == "passed"
    assert passed["said"] == ["one", "two"]
    failed = script.run_part(part("print('one'); raise SystemExit(5)", "print('two')"), None)
    assert (failed["status"], failed["failure"], failed["said"]) == ("failed", "exit code 5", ["one"])
    slow = script.run_part(part("import time; print(1, flush=True); time.sleep(60)", seconds=2), None)
    assert (slow["status"], slow["failure"], slow["said"]) == ("failed", "longer than 2 s", ["1"])
    skipped = script.run_part(part("print('one')", needs=("no-such-program", "NoSuchPackage.cmake")), None)
    assert skipped == {"status": "skipped", "reason": "no-such-program, NoSuchPackage not found"}
    result = tmp_path / "figures.json"
    with_figures = script.run_part(part(f"open({str(result)!r}, 'w').write('[7]')", result=result), None)
    assert with_figures["figures"] == [7]
