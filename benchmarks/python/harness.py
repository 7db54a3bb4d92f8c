# SPDX-License-Identifier: Apache-2.0
"""Timing side by side, and results that say where they come from.

Machines are noisy, so contenders take turns within one process and only their ratios are worth quoting.

    fsdc demo --json | python benchmarks/python/harness.py benchmarks/results/demo.json

writes what a command found, with the block that says on which machine.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fixed_size_kv_cache
from fixed_size_kv_cache import _C

ROOT = Path(__file__).resolve().parents[2]


def keep_freed_memory() -> None:
    """Starts the program anew with a glibc that keeps what is freed, so that no contender is timed for page faults.

    By default glibc may hand some megabytes back to the kernel at every free, or not, as the history of the process has
    it. Then faults cost up to four times what copying does, on every side alike. Other allocators keep memory anyway.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
    if any(name not in os.environ for name in settings):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def time_in_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, warm_up: int = 0
) -> dict[str, dict[str, float]]:
    """Microseconds per call of each contender: median, 10th and 90th percentile over `rounds` rounds.

    The processor's caches hold what the contender before has left there or, after `warm_up` calls that are not timed,
    what the contender itself has. A result is dropped before the next call, as in a loop that uses and forgets it.
    """
    for contender in contenders.values():
        contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            for _ in range(warm_up):
                contender()
            start = time.perf_counter()
            result = contender()
            times[name].append((time.perf_counter() - start) * 1e6)
            del result
    return {name: summary(taken) for name, taken in times.items()}


def summary(taken: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of some times in microseconds."""
    tenths = statistics.quantiles(taken, n=10)
    return {"median_us": statistics.median(taken), "p10_us": tenths[0], "p90_us": tenths[-1]}


def machine() -> dict[str, object]:
    """The block that every result file carries."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_isa": _C.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fixed_size_kv_cache": fixed_size_kv_cache.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return said or os.environ.get("FSDC_COMMIT", "unknown")


def write(path: Path, result: dict[str, object]) -> None:
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    write(Path(sys.argv[1]), json.load(sys.stdin))
