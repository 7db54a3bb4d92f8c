# SPDX-License-Identifier: Apache-2.0
"""What enable() leaves on a model, and what each thread is generating.

Blocks may overlap, in threads or handlers of a server: a model has a stack of caps, the last counts, and whoever ends
one takes out that one only. With the last of them the model's attention is what it was before the first.
"""

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

from ..compat.capability import text_config
from ..compat.transformers import set_implementation
from ..settings import FixedSizeCacheConfig

NAME = "fsdc"  # of the attention, as configs have it
MARK = "_fixed_size_cache"  # the attribute of an enabled model; no parameter and no buffer, so it is not saved
LOCK = threading.RLock()
MODELS: weakref.WeakSet = weakref.WeakSet()  # those that were enabled


@dataclass(frozen=True, eq=False)
class Cap:
    """One enable() of a model, without the model: nothing holds it but its owner."""

    settings: FixedSizeCacheConfig
    prefill_chunk_size: int
    has_effect: bool  # not where no layer's cache grows
    virtual_tokens: int = 0  # of PEFT's prefix tuning, which come in a stock cache


@dataclass(frozen=True, eq=False)
class Caps:
    """Those of a model."""

    original: str  # its attention before the first
    stack: tuple[Cap, ...] = ()


class Running(threading.local):
    """What this thread is generating."""

    model: Any = None
    cache: Any = None  # the cache that it began with, or that came in its place


RUNNING = Running()


def enabled(model: Any) -> Cap | None:
    """The cap of an enabled model that counts, None for others."""
    caps = vars(model).get(MARK)
    return None if caps is None else caps.stack[-1]


def holds(model: Any, cap: Cap) -> bool:
    """Whether one cap of a model has not ended."""
    caps = vars(model).get(MARK)
    return caps is not None and any(other is cap for other in caps.stack)


def enabled_with(config: Any) -> list:
    """The enabled models whose text decoder has this very config."""
    with LOCK:
        return [model for model in MODELS if enabled(model) and text_config(model.config) is config]


def prefix_lengths(config: Any) -> set[int]:
    """How many virtual tokens may come before a text of the enabled models that have this very config."""
    return {enabled(model).virtual_tokens for model in enabled_with(config)} - {0}


def add(model: Any, cap: Cap) -> None:
    config = text_config(model.config)
    with LOCK:
        caps = vars(model).get(MARK)
        if caps is None:
            sharing = enabled_with(config)  # their enable() has changed it already
            caps = vars(sharing[0])[MARK] if sharing else Caps(config._attn_implementation)
            caps = Caps(caps.original)
        setattr(model, MARK, replace(caps, stack=(*caps.stack, cap)))
        MODELS.add(model)
        if cap.has_effect:
            set_implementation(config, NAME)


def remove(model: Any, cap: Cap | None = None) -> None:
    """Takes one cap from a model, or all of them."""
    with LOCK:
        caps = vars(model).get(MARK)
        if caps is None:
            return
        rest = () if cap is None else tuple(other for other in caps.stack if other is not cap)
        if rest:
            setattr(model, MARK, replace(caps, stack=rest))
            return
        delattr(model, MARK)
        config = text_config(model.config)
        if config._attn_implementation == NAME and not enabled_with(config):
            set_implementation(config, caps.original)
