# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/run, as far as it goes without a GPU."""

import json
import os
import re
import subprocess
import sys
import time
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
    for name in script.parts("9.0"):
        assert f"{name}: " in ran.stdout


def test_every_file_of_the_commands_exists(script):
    for part in script.parts("9.0").values():
        for command in part.commands:
            for word in command:
                if word.endswith(".py") and not word.startswith("-"):
                    assert (script.ROOT / word).exists(), word


def test_files_with_tests_that_need_a_gpu_are_run_whole(script):
    folder = Path(__file__).parent
    skipped = re.compile(r"^(@|pytestmark = )pytest\.mark\.skipif\(not torch\.cuda\.is_available", re.MULTILINE)
    needing = {file.name for file in folder.glob("test_*.py") if skipped.search(file.read_text())}
    commands = [command for part in script.parts("9.0").values() for command in part.commands]
    whole = {Path(word).name for command in commands if "-k" not in command for word in command}
    assert needing and needing <= whole


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
    gone = script.run_part(script.Part([["/no/such/program"]], 60), None)
    assert gone["status"] == "failed" and gone["failure"].startswith("FileNotFoundError")
    result = tmp_path / "figures.json"
    result.write_text("[5]")  # of an earlier run
    lost = script.run_part(part("print('one')", result=result), None)
    assert lost["status"] == "failed" and lost["failure"].startswith("FileNotFoundError")
    with_figures = script.run_part(part(f"open({str(result)!r}, 'w').write('[7]')", result=result), None)
    assert with_figures["figures"] == [7]
    cut = script.run_part(
        part(f"import time; open({str(result)!r}, 'w').write('[8]'); time.sleep(60)", seconds=2, result=result), None
    )
    assert (cut["status"], cut["figures"]) == ("failed", [8])


def test_versions(script):
    assert script.version_of("pytest") == pytest.__version__
    assert script.version_of("no-such-package") is None


def alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_what_a_command_started_ends_with_it(script, tmp_path):
    pid = tmp_path / "pid"
    code = (
        f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    start = time.monotonic()
    assert script.run_part(script.Part([[sys.executable, "-c", code]], 3), None)["failure"] == "longer than 3 s"
    assert time.monotonic() - start < 30  # the child of the child holds the pipe
    for _ in range(50):
        if not alive(pid.read_text()):
            return
        time.sleep(0.1)
    pytest.fail("the child of the child lives")


def test_the_deadline_cuts_every_limit(script):
    part = script.Part([[sys.executable, "-c", "import time; time.sleep(60)"]], 50)
    cut = script.run_part(part, None, time.monotonic() + 1)
    assert (cut["status"], cut["failure"]) == ("failed", "longer than 1 s")
    late = script.run_part(part, None, time.monotonic())
    assert late == {"status": "skipped", "reason": "no time left (--seconds)"}


def test_commands_find_the_toolkit_and_the_callers_packages(script, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/callers/packages")
    code = "import os, shutil; print(shutil.which('nvcc'), os.environ['PYTHONPATH'])"
    part = script.Part([[sys.executable, "-c", code]], 60, needs=("nvcc",))
    said = script.run_part(part, None)["said"]
    assert said == [f"{tmp_path}/bin/nvcc {script.ROOT}/python{os.pathsep}/callers/packages"]


def test_the_result_is_written_after_every_part(script, tmp_path, monkeypatch):
    path, seen = tmp_path / "new" / "folder" / "gpu.json", []

    def run_part(part, prefix, deadline):
        seen.append(list(json.loads(path.read_text())["parts"]) if path.exists() else [])
        return {"status": "passed"}

    monkeypatch.setattr(script, "gpu", lambda: {"gpu": "a GPU", "compute_capability": "9.0"})
    monkeypatch.setattr(script, "run_part", run_part)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["run", "--json", str(path)])
    assert script.main() == 0
    names = list(script.parts("9.0"))
    assert seen == [names[:i] for i in range(len(names))]
    assert list(json.loads(path.read_text())["parts"]) == names


def test_dry_run_without_torch_or_programs():
    for_none = {**os.environ, "PATH": "", "CUDA_HOME": "/nowhere"}
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-c", code, SCRIPT, "--dry-run"], capture_output=True, text=True, env=for_none
    )
    assert ran.returncode == 0 and "Traceback" not in ran.stderr
    assert "has no torch" in ran.stderr
    assert "cmake, Catch2 not found" in ran.stdout or "cmake not found" in ran.stdout
    assert ran.stdout.startswith("kernels will be skipped: ")  # before all commands


def test_carried_programs_are_run_and_not_built(script, tmp_path):
    parts = script.parts("9.0", carried=str(tmp_path))
    for name, program in (("kernels", "fsdc_cuda_tests"), ("kernel_benchmarks", "bench_cuda")):
        assert parts[name].commands[-1][0] == str(tmp_path / program)
        assert len(parts[name].commands) == 1 and not parts[name].needs
    ran = run("--dry-run", "--carried", str(tmp_path))
    assert ran.returncode == 2 and "must be a folder that tests/gpu/pack has filled" in ran.stderr
    (tmp_path / "packed.json").write_text("{}")
    assert run("--dry-run", "--carried", str(tmp_path)).returncode == 0


def test_no_command_may_take_longer_than_a_call(script):
    for name, part in script.parts("9.0").items():
        assert part.seconds <= 540, name


def test_what_ncu_writes(script, tmp_path):
    report = tmp_path / "report.csv"
    report.write_text(
        "==PROF== Connected to process 7\n"
        '"ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","truncate_kernel","(512, 1, 1)","(8, 8, 1)","Launch Statistics","Registers Per Thread","","64"\n'
        '"0","truncate_kernel","(512, 1, 1)","(8, 8, 1)","Occupancy","Theoretical Occupancy","%","50"\n'
        '"1","decode_kernel","(128, 1, 1)","(16, 8, 1)","Launch Statistics","Cluster Size","","16"\n'
    )
    assert script.figures_of(report) == [
        {
            "kernel": "truncate_kernel",
            "grid": "(8, 8, 1)",
            "block": "(512, 1, 1)",
            "Registers Per Thread": "64",
            "Theoretical Occupancy": "50 %",
        },
        {"kernel": "decode_kernel", "grid": "(16, 8, 1)", "block": "(128, 1, 1)", "Cluster Size": "16"},
    ]
    report.write_text("==ERROR== no permission to read the counters\n")
    with pytest.raises(ValueError, match="no permission"):
        script.figures_of(report)


def test_clocks_are_sampled_while_a_command_runs(script, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor mhz in 345 1980 1755; do echo $mhz, 3201, 98.5; done\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = tmp_path / "figures.json"
    code = f"import time; time.sleep(1); open({str(result)!r}, 'w').write('[7]')"
    entry = script.run_part(script.Part([[sys.executable, "-c", code]], 60, result=result), None)
    assert entry["clocks_under_load"] == {
        "sm_clock_mhz": [345, 1755, 1980],
        "memory_clock_mhz": [3201] * 3,
        "power_w": [98.5] * 3,
    }


def test_parts_of_an_earlier_run_stay(script, tmp_path, monkeypatch):
    path, machine = tmp_path / "gpu.json", {"gpu": "a GPU", "compute_capability": "9.0", "commit": "abc"}
    monkeypatch.setattr(script, "gpu", lambda: machine)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    for name, status in (("build", "passed"), ("cache", "passed"), ("build", "skipped")):
        monkeypatch.setattr(script, "run_part", lambda *_, name=name, status=status: {"status": status, "of": name})
        monkeypatch.setattr(sys, "argv", ["run", name, "--json", str(path)])
        assert script.main() == 0
    assert json.loads(path.read_text())["parts"] == {
        "build": {"status": "passed", "of": "build"},
        "cache": {"status": "passed", "of": "cache"},
    }
    machine["commit"] = "def"  # other sources: nothing of before is of these
    assert script.main() == 0
    assert list(json.loads(path.read_text())["parts"]) == ["build"]
