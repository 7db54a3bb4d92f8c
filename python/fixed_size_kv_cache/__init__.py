# SPDX-License-Identifier: Apache-2.0
"""A KV cache of fixed size that keeps the tokens with the most accumulated attention.

Importing the package loads the operators ``torch.ops.fsdc``: ``truncate``, ``accumulate_scores_`` and
``decode_attention_``; :mod:`fixed_size_kv_cache.reference` documents and specifies them. What builds on Hugging Face
transformers is loaded when it is first used, so the operators work without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .compat import versions as _versions
from .operators import load as _load  # noqa: F401  first: where the build does not fit it says so
from .operators import register as _register  # noqa: F401

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from . import reference as reference
    from .dynamic_cache import FixedSizeDynamicCache as FixedSizeDynamicCache
    from .head_profile import HeadProfile as HeadProfile
    from .huggingface.enabling import as_default as as_default
    from .huggingface.enabling import disable as disable
    from .huggingface.enabling import enable as enable
    from .huggingface.measuring import perplexity as perplexity
    from .huggingface.profiling import profile_heads as profile_heads
    from .layer.layer import FixedSizeLayer as FixedSizeLayer
    from .settings import FixedSizeCacheConfig as FixedSizeCacheConfig

_HUGGING_FACE = {
    "FixedSizeCacheConfig": "settings",
    "FixedSizeDynamicCache": "dynamic_cache",
    "FixedSizeLayer": "layer.layer",
    "HeadProfile": "head_profile",
    "as_default": "huggingface.enabling",
    "disable": "huggingface.enabling",
    "enable": "huggingface.enabling",
    "perplexity": "huggingface.measuring",
    "profile_heads": "huggingface.profiling",
}

__all__ = ["__version__", "reference", *_HUGGING_FACE]


if not TYPE_CHECKING:  # or every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name == "reference":  # a module, which needs no transformers
            return importlib.import_module(".reference", __name__)
        if name not in _HUGGING_FACE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _versions.require_transformers(name)
        if _HUGGING_FACE[name].startswith("huggingface.") and not _versions.has_interface():
            raise ImportError(
                f"{name} needs transformers>={_versions.OLDEST_INTERFACE}; got {_versions.transformers_version()}, on "
                "which the recipe for LLaMA works"
            )
        return getattr(importlib.import_module(f".{_HUGGING_FACE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # so that completion finds what is not loaded yet
