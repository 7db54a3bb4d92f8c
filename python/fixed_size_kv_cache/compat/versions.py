# SPDX-License-Identifier: Apache-2.0
"""Which versions of transformers this package knows. Does not import transformers."""

import importlib.metadata
import importlib.util

from packaging.version import Version

OLDEST_TRANSFORMERS = "4.48.3"
OLDEST_INTERFACE = "4.56.2"  # the first with an attention interface and caches of layers, for enable()
BETWEEN_TRANSFORMERS = ("4.54", "4.56")  # their caches are neither lists of tensors nor plain layers
TESTED_TRANSFORMERS = ("4.48.3", "4.56.2", "4.57.6", "5.17.0", "5.23.0", "5.24.0")  # as in tests/versions


def require_transformers(name: str) -> None:
    """An ImportError with pip's line where transformers is not installed, on behalf of what `name` names."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"{name} needs transformers: pip install 'transformers>={OLDEST_TRANSFORMERS}'")


def transformers_version() -> str | None:
    """The installed transformers, None where there is none. Does not import it."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def transformers_support(version: str | None) -> str:
    """What we can say of a version of transformers: ``tested``, ``untested``, ``unsupported`` or ``not installed``."""
    if version is None:
        return "not installed"
    if version in TESTED_TRANSFORMERS:
        return "tested"
    first, after = map(Version, BETWEEN_TRANSFORMERS)
    if Version(version) < Version(OLDEST_TRANSFORMERS) or first <= Version(version) < after:
        return "unsupported"
    return "untested"


def has_interface() -> bool:
    """Whether the installed transformers has what ``enable`` builds on."""
    return Version(transformers_version()) >= Version(OLDEST_INTERFACE)
