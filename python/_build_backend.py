# SPDX-License-Identifier: Apache-2.0
"""Build backend: setuptools, run against the torch that is already installed.

pip builds in an empty environment, into which it would unpack a second torch of its own choice. So nothing
is required there (`requires = []` in pyproject.toml): the build is shown the packages of the interpreter that
runs pip, and asks only for what is missing or too old among them.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

# Torch 2.11 is content with the setuptools that a venv of Python 3.11 is born with, 65.5.
OLDEST = {"setuptools": (64, 0), "torch": (2, 11)}
OWN_WHEELS = (70, 1)  # the first setuptools that writes wheels without the package `wheel`


def _show_installed_packages():
    # -E drops the PYTHONPATH by which pip hides them: this asks the user's own interpreter for its path.
    ask = [sys.executable, "-E", "-c", "import sys; print(*sys.path, sep='\\n')"]
    known = set(sys.path)
    answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()
    sys.path += [folder for folder in answer if folder and folder not in known]
    programs = os.path.dirname(sys.executable)  # ninja from PyPI lies here
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])


# Compared as numbers: packaging.version may be missing here, where nothing can be required yet.
def _release(package):
    try:
        major, minor, *_ = importlib.metadata.version(package).split(".")
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    return (int(major), int(minor))


def _wanted(*packages):
    return [f"{name}>={'.'.join(map(str, OLDEST[name]))}" for name in packages if _release(name) < OLDEST[name]]


def get_requires_for_build_wheel(config_settings=None):
    writes_wheels = _release("setuptools") >= OWN_WHEELS or importlib.util.find_spec("wheel") is not None
    return _wanted("setuptools", "torch") + ([] if writes_wheels else ["wheel"])


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return _wanted("setuptools")


def _of_setuptools(hook):
    def call(*arguments, **named):
        import setuptools.build_meta  # only now: pip looks at the hooks before it installs what they require

        return getattr(setuptools.build_meta, hook)(*arguments, **named)

    return call


_show_installed_packages()

build_sdist = _of_setuptools("build_sdist")
build_wheel = _of_setuptools("build_wheel")
build_editable = _of_setuptools("build_editable")
prepare_metadata_for_build_wheel = _of_setuptools("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _of_setuptools("prepare_metadata_for_build_editable")
