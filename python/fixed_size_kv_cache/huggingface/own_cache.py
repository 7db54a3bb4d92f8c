# SPDX-License-Identifier: Apache-2.0
"""``model(ids)`` of an enabled model returns one of our caches, as its generate() does.

The forward of a model makes the cache that it was not given: ``DynamicCache(config=self.config)``, by the name that its
module has imported. That name is replaced once per module, by one that makes ours for the configs of enabled models. So
a forward that is given a cache, as every step of a text is, costs nothing more.
"""

import inspect
from typing import Any

import torch

from ..compat.capability import text_decoders
from ..compat.transformers import DynamicCache
from ..dynamic_cache import FixedSizeDynamicCache
from .marks import RUNNING, enabled, enabled_with

IMPORTED_AS = "DynamicCache"


class _Kind(type):
    """To a module it is ``DynamicCache``: what that is an instance of, and what a call makes."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, DynamicCache)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, DynamicCache)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        owners = [] if torch.is_grad_enabled() else enabled_with(kwargs.get("config"))
        cap = enabled(owners[0]) if len(owners) == 1 else None
        if cap is None or not cap.has_effect or args or len(kwargs) > 1:
            return DynamicCache(*args, **kwargs)
        if RUNNING.model is owners[0] and RUNNING.cache is not None:  # Phi-3 drops its cache once in a text
            RUNNING.cache = _replacement(RUNNING.cache, kwargs["config"])
            return RUNNING.cache
        return FixedSizeDynamicCache(config=kwargs["config"], settings=cap.settings)


def _replacement(cache: FixedSizeDynamicCache, config: Any) -> FixedSizeDynamicCache:
    """An empty cache for the rest of a generate() that has dropped the one it began with."""
    made = FixedSizeDynamicCache(config=config, settings=cache.settings, protected_spans=cache.protected_spans)
    made.is_past_checked = cache.is_past_checked
    if cache.record_past:  # assisted decoding goes on to take tokens back
        made.activate_past_recording()
        made.keeps_recording = cache.keeps_recording
    return made


class OwnOrStock(DynamicCache, metaclass=_Kind):
    """What the modules of enabled models call ``DynamicCache``."""


def install(model: Any, config: Any) -> None:
    """In the modules of a model's text decoder."""
    for decoder in text_decoders(model, config):
        names = inspect.unwrap(type(decoder).forward).__globals__
        if names.get(IMPORTED_AS) is DynamicCache:
            names[IMPORTED_AS] = OwnOrStock
