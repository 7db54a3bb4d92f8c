# SPDX-License-Identifier: Apache-2.0
"""Builds fixed_size_kv_cache._C, the compiled part. All else about the package stands in pyproject.toml.

These environment variables are read:

    FORCE_CUDA=0|1         without CUDA; with CUDA or fail (default: with it where torch and an nvcc have it)
    TORCH_CUDA_ARCH_LIST   GPU architectures, as for torch (default: this machine's, else ARCHITECTURES)
    FSDC_WERROR=1          warnings are errors, and so are register spills
    FSDC_LINEINFO=1        CUDA kernels know their source lines, for profilers and sanitizers (the library doubles)
    MAX_JOBS               compilers at a time, as for torch
"""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "pip"
PACKAGE = "fixed_size_kv_cache"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "python" / PACKAGE / "_version.py").read_text())[1]

# Not sm_87 and sm_110, the GPUs of boards, which run no code for others of their generation: a build there is for them.
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, the oldest that the build may run with
CXX = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
NVCC = ["-std=c++20", "-O3", "-Xfatbin=-compress-all"]  # a quarter of the size for six architectures
if os.environ.get("FSDC_LINEINFO") == "1":
    NVCC += ["-lineinfo"]
if os.environ.get("FSDC_WERROR") == "1":
    CXX += ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    NVCC += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-warn-spills,-Werror"]


def nvcc_release(home):
    """'13.0' for the nvcc in `home`/bin, None where there is none or it does not run."""
    try:
        command = [os.path.join(home or "", "bin", "nvcc"), "--version"]
        said = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
        return re.search(r"release (\d+\.\d+)", said)[1]
    except (OSError, subprocess.CalledProcessError, TypeError):
        return None


def cuda_release(torch, home):
    """(release of the nvcc to build with, None), or (None, why the build is without CUDA)."""
    forced = os.environ.get("FORCE_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"{PACKAGE}: FORCE_CUDA must be 0 or 1; got {forced!r}.")
    nvcc = nvcc_release(home)
    wanted = (torch.version.cuda or "").split(".")[0]
    if forced == "0":
        why = "FORCE_CUDA=0"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is a build without CUDA"
    elif nvcc is None:
        where = f"in {home}/bin" if home else "on PATH"
        why = f"there is no working nvcc {where} (install the CUDA {wanted} toolkit, or set CUDA_HOME to it)"
    elif nvcc.split(".")[0] != wanted:
        why = f"nvcc {nvcc} is of another major than CUDA {torch.version.cuda} of torch {torch.__version__}"
    else:
        return nvcc, None
    if forced == "1":
        raise SystemExit(f"{PACKAGE}: FORCE_CUDA=1, but {why}.")
    return None, why


def architectures(torch):
    """'8.0;9.0+PTX': what to compile for; BuildExtension reads it from the environment."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        here = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        native = ";".join(f"{major}.{minor}" for major, minor in sorted(here) if major >= 8)
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{native}+PTX" if native else ARCHITECTURES
    chosen = os.environ["TORCH_CUDA_ARCH_LIST"]
    if old := [arch for arch in re.findall(r"\d+\.\d+", chosen) if float(arch) < 8]:
        raise SystemExit(f"{PACKAGE}: the kernels need sm_80 or newer; TORCH_CUDA_ARCH_LIST names {', '.join(old)}.")
    return chosen


def extension():
    """What setup() needs to build _C."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch builds without it, and so do we
    import torch
    from torch.utils import cpp_extension

    cuda, why_not = cuda_release(torch, cpp_extension.CUDA_HOME)
    info = {
        "version": VERSION,
        "torch": torch.__version__,
        "cuda": cuda,
        "cuda_architectures": architectures(torch) if cuda else None,
        "without_cuda_because": why_not,
    }
    with_cuda = f"with CUDA {cuda}" if cuda else f"without CUDA, because {why_not}"
    print(f"{PACKAGE} {VERSION} for torch {torch.__version__}, {with_cuda}")

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(BUILD)  # pip would take a new folder each time, and compile all of it again

        def run(self):
            write(BUILD / "build_info.h", header(info))
            super().run()
            # Beside the _C that it describes and named after it: several Pythons may build in this folder.
            write(Path(self.get_ext_fullpath(f"{PACKAGE}._C")).with_suffix(".json"), json.dumps(info))

    kind = "cuda" if cuda else "cpu"
    cxx = [*CXX, STABLE_ABI]
    for folder in cpp_extension.include_paths(kind):
        cxx += ["-isystem", folder]  # no warnings from torch's headers
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", "kernels/cpu/*.cpp"]
    libraries = ["c10", "torch_cpu"]
    if cuda:
        cxx += ["-DUSE_CUDA"]  # shows torch's current stream to csrc/cuda
        patterns += ["csrc/cuda/*.cpp", "kernels/cuda/*.cu", "kernels/cuda/*/*.cu"]
        libraries += ["torch_cuda", "cudart"]
    module = Extension(
        f"{PACKAGE}._C",
        sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)),
        include_dirs=[str(ROOT), str(BUILD)],
        extra_compile_args={"cxx": cxx, "nvcc": NVCC},
        library_dirs=cpp_extension.library_paths(kind),
        libraries=libraries,
        language="c++",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def header(info):
    """The same facts for csrc/module.cpp; empty where there is none."""
    return "".join(f'#define FSDC_{name.upper()} "{value or ""}"\n' for name, value in info.items())


def write(path, text):
    """Only when it changed, so that nothing is compiled again without need."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# Metadata and the source archive need neither torch nor a compiler.
only_metadata = {"egg_info", "dist_info", "sdist"} & set(sys.argv)
# The licence stands here because setuptools before 77 and after it read it in different forms from pyproject.toml.
setup(version=VERSION, license="Apache-2.0", **({} if only_metadata else extension()))
