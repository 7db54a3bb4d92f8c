# SPDX-License-Identifier: Apache-2.0
"""Build backend: setuptools, run against the torch that is already installed.

pip builds in an empty environment, into which it would unpack a second torch of its own choice. So nothing
is required there (`requires = []` in pyproject.toml): the build is shown the packages of the interpreter that
runs pip, and asks only for what is missing or too old among them.
"""

import importlib.metadata
import os
import subprocess
import sys

OLDEST = {"setuptools": (77, 0), "torch": (2, 11)}


def _show_installed_packages():
    # -E drops the PYTHONPATH by which pip hides them: this asks the user's own interpreter for its path.
    ask = [sys.executable, "-E", "-c", "import sys; print(*sys.path, sep='\\n')"]
    known = set(sys.path)
    answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()
    sys.path += [folder for folder in answer if folder and folder not in known]
    programs = os.path.dirname(sys.executable)  # ninja from PyPI lies here
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])


def _recent_enough(package):
    try:
        release = importlib.metadata.version(package).split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(release[0]), int(release[1])) >= OLDEST[package]


def _wanted(*packages):
    return [f"{name}>={'.'.join(map(str, OLDEST[name]))}" for name in packages if not _recent_enough(name)]


def get_requires_for_build_wheel(config_settings=None):
    return _wanted("setuptools", "torch")


def get_requires_for_build_editable(config_settings=None):
    return _wanted("setuptools", "torch")


def get_requires_for_build_sdist(config_settings=None):
    return _wanted("setuptools")


def _of_setuptools(hook):
    def call(*arguments, **named):
        import setuptools.build_meta  # only now: pip looks at the hooks before it installs what they require

        return getattr(setuptools.build_meta, hook)(*arguments, **named)

    return call


build_sdist = _of_setuptools("build_sdist")
build_wheel = _of_setuptools("build_wheel")
build_editable = _of_setuptools("build_editable")
prepare_metadata_for_build_wheel = _of_setuptools("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _of_setuptools("prepare_metadata_for_build_editable")

_show_installed_packages()
