# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the CUDA kernels, on every architecture of this build.

No spills, and the registers and shared memory for which the headers in kernels/cuda state the occupancy. Triton brings
the cuobjdump that reads it.
"""

import re
import subprocess
from pathlib import Path

import pytest

import fixed_size_kv_cache
from fixed_size_kv_cache.operators.load import BUILD

triton = pytest.importorskip("triton", reason="there is no triton, whose cuobjdump reads the kernels")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = [
    pytest.mark.skipif(BUILD["cuda"] is None, reason="this build is without CUDA"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton is without cuobjdump"),
]

TWO_BLOCKS = 64  # registers per thread, of 65536 per multiprocessor, for 2 blocks of 512 threads
ONE_BLOCK = 128
# Part of the mangled name: registers, bytes of static shared memory at most.
LIMITS = {
    "truncate_kernelILb0ELNS0_10CodeSourceE0E": (TWO_BLOCKS, 17 << 10),  # scores streamed
    "truncate_kernelILb0ELNS0_10CodeSourceE1E": (TWO_BLOCKS, 17 << 10),  # scores on chip
    "truncate_kernelILb0ELNS0_10CodeSourceE2E": (ONE_BLOCK, 17 << 10),  # sums of weights on chip
    "truncate_kernelILb1E": (ONE_BLOCK, 25 << 10),  # with an entry of the skipped tokens, from any source
    "accumulate_scores_kernel": (64, 0),
    "decode_attention_kernel": (128, 1 << 10),  # for 2 blocks of 256 threads
    "softmax_kernel": (64, 128),
    "vote_kernelId": (128, 4 << 10),  # of chunk_attention_, in fp64
    "vote_kernel": (64, 2 << 10),
    "raise_redundancy_kernel": (64, 4 << 10),
    "lost_kernel": (64, 4 << 10),
    "take_queries_kernel": (64, 0),
    "take_values_kernel": (64, 0),
    "write_outputs_kernel": (64, 0),
    "probe_kernel": (64, 0),  # does nothing (device.cu)
}


def cuobjdump(option: str) -> str:
    (library,) = Path(fixed_size_kv_cache.__file__).parent.glob("_C*.so")
    return subprocess.run([str(CUOBJDUMP), option, str(library)], capture_output=True, text=True, check=True).stdout


def resources() -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel, figures) of every kernel in the package's library."""
    found, architecture, kernel = [], "", ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found.append((architecture, kernel, figures))
    return found


def test_registers_and_shared_memory_are_as_stated():
    kernels = resources()
    architectures = {f"sm_{arch.replace('.', '')}" for arch in re.findall(r"\d+\.\d+", BUILD["cuda_architectures"])}
    assert {architecture for architecture, _, _ in kernels} == architectures
    for architecture, kernel, figures in kernels:
        registers, shared = next(limit for part, limit in LIMITS.items() if part in kernel)
        where = f"{kernel} on {architecture}: {figures}"
        assert figures["REG"] <= registers, where
        assert figures["STACK"] == 0, where
        assert figures["LOCAL"] == 0, where
        assert figures["SHARED"] <= shared + 1024, where  # newer systems take 1 KiB of every block
    for part in LIMITS:
        assert {arch for arch, kernel, _ in kernels if part in kernel} == architectures, part


def test_newer_devices_find_ptx_where_it_was_asked_for():
    asked = {f"sm_{arch.replace('.', '')}" for arch in re.findall(r"(\d+\.\d+)\+PTX", BUILD["cuda_architectures"])}
    assert set(re.findall(r"\.(sm_\d+)\.ptx", cuobjdump("--list-ptx"))) == asked
