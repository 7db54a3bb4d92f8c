# SPDX-License-Identifier: Apache-2.0
"""Build backend: setuptools, run against the torch that is already installed.

pip builds in an empty environment, into which it would unpack a second torch of its own choice. So nothing
is required there (`requires = []` in pyproject.toml): the build is shown the packages of the interpreter that
runs pip, and asks only for what is missing or too old among them.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import runpy
import subprocess
import sys
import zipfile

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


def _release(package):
    try:
        major, minor, *_ = importlib.metadata.version(package).split(".")
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    return (int(major), int(minor))


def _wanted(*packages):
    return [f"{name}>={'.'.join(map(str, OLDEST[name]))}" for name in packages if _release(name) < OLDEST[name]]


def _writes_wheels():
    return _release("setuptools") >= OWN_WHEELS or importlib.util.find_spec("wheel") is not None


def get_requires_for_build_wheel(config_settings=None):
    return _wanted("setuptools", "torch") + ([] if _writes_wheels() else ["wheel"])


def get_requires_for_build_editable(config_settings=None):
    return _wanted("setuptools", "torch")


def get_requires_for_build_sdist(config_settings=None):
    return _wanted("setuptools")


def _of_setuptools(hook):
    def call(*arguments, **named):
        import setuptools.build_meta  # only now: pip looks at the hooks before it installs what they require

        return getattr(setuptools.build_meta, hook)(*arguments, **named)

    return call


def _run_setup(*arguments):
    """Runs setup.py, and returns its distribution."""
    sys.argv = ["setup.py", *arguments]
    return runpy.run_path("setup.py", run_name="__main__")["distribution"]


def _write_editable(distribution, folder):
    """What `build_editable` does, for a setuptools that cannot: an editable wheel is a .pth file and metadata."""
    name = f"{distribution.get_name()}-{distribution.get_version()}"
    text = io.StringIO()
    distribution.metadata.write_pkg_file(text)
    head, _, readme = text.getvalue().partition("\n\n")
    if "\nRequires-Dist: " not in head:  # setuptools had them in a file of its own
        head += "".join(f"\nRequires-Dist: {wanted}" for wanted in distribution.install_requires)
        for extra, requirements in distribution.extras_require.items():
            head += "".join(f'\nRequires-Dist: {wanted}; extra == "{extra}"' for wanted in requirements)
    scripts = "\n".join(distribution.entry_points["console_scripts"])
    files = {
        f"{name}.pth": os.path.abspath("python") + "\n",
        f"{name}.dist-info/METADATA": f"{head}\n\n{readme}",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}.dist-info/entry_points.txt": f"[console_scripts]\n{scripts}\n",
    }
    record = ""
    with zipfile.ZipFile(os.path.join(folder, f"{name}-py3-none-any.whl"), "w") as wheel:
        for path, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).decode().rstrip("=")
            record += f"{path},sha256={digest},{len(content.encode())}\n"
            wheel.writestr(path, content)
        wheel.writestr(f"{name}.dist-info/RECORD", f"{record}{name}.dist-info/RECORD,,\n")
    return os.path.basename(wheel.filename)


def _build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _write_editable(_run_setup("-q", "build_ext", "--inplace"), wheel_directory)


_show_installed_packages()

build_sdist = _of_setuptools("build_sdist")
build_wheel = _of_setuptools("build_wheel")
prepare_metadata_for_build_wheel = _of_setuptools("prepare_metadata_for_build_wheel")
if _writes_wheels():
    build_editable = _of_setuptools("build_editable")
    prepare_metadata_for_build_editable = _of_setuptools("prepare_metadata_for_build_editable")
else:
    build_editable = _build_editable  # pip takes the metadata from the wheel
