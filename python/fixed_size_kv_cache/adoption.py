# SPDX-License-Identifier: Apache-2.0
"""Taking over a cache that transformers made: generate() hands our ``forward`` a stock one."""

from typing import Any

from ._compat import Cache, DynamicCache, drop_stock_storage, stock_contents
from .layer import FixedSizeLayer
from .settings import FixedSizeCacheConfig

REMEDY = "let generate() make the cache, or pass past_key_values=FixedSizeDynamicCache(config=model.config)"


def from_legacy_cache(cls: type, cache: Any, layer_idx: int | None) -> Any:
    """See ``FixedSizeDynamicCache.from_legacy_cache``."""
    if cache is None:
        return cls()
    if isinstance(cache, cls):
        return cache
    if type(cache) is DynamicCache:
        return _adopt(cls, cache, layer_idx)
    if isinstance(cache, (tuple, list)):
        return _from_tuple(cls, cache)
    raise TypeError(f"from_legacy_cache: cannot take over a {type(cache).__name__}; {REMEDY}")


def adopt_empty(cache: Cache, config: Any, settings: FixedSizeCacheConfig) -> None:
    """Makes an empty stock cache one of ours, in place."""
    from .dynamic_cache import FixedSizeDynamicCache

    seen = cache.get_seq_length()
    if seen:
        raise ValueError(
            f"generate: a DynamicCache must be empty to be taken over; got one with {seen} tokens, of which no "
            f"attention was recorded; {REMEDY}"
        )
    if getattr(cache, "offloading", False):
        raise TypeError(f"generate: cannot take over a {type(cache).__name__} with offloading; {REMEDY}")
    kept = {name: value for name, value in vars(cache).items() if name == "_is_user_defined"}
    fresh = FixedSizeDynamicCache(config=config, settings=settings)
    cache.__class__ = FixedSizeDynamicCache
    vars(cache).clear()
    vars(cache).update({**vars(fresh), **kept})


def _adopt(cls: type, cache: Cache, layer_idx: int | None) -> Any:
    try:
        contents = stock_contents(cache)
    except TypeError as error:
        raise TypeError(f"from_legacy_cache: cannot take over a {error}; {REMEDY}") from None
    if getattr(cache, "offloading", False):
        raise TypeError(f"from_legacy_cache: cannot take over a {type(cache).__name__} with offloading; {REMEDY}")
    filled = [i for i, held in enumerate(contents) if held is not None]
    if filled not in ([], [layer_idx]):
        raise ValueError(
            f"from_legacy_cache: a DynamicCache must be empty, or hold this step's tokens in layer {layer_idx} only; "
            f"got tokens in layers {filled}, of which no attention was recorded; {REMEDY}"
        )
    fresh = cls()  # before anything is changed: settings may be refused
    drop_stock_storage(cache)
    keep = {name: value for name, value in vars(cache).items() if name == "_is_user_defined"}
    cache.__class__ = cls
    vars(cache).clear()
    vars(cache).update({**vars(fresh), **keep})
    for held in contents:
        layer = FixedSizeLayer(cache.settings)
        cache.layers.append(layer)
        if held is not None:  # the stock update has run: its tokens are this step's
            layer.update(held.keys, held.values)
    return cache


def _from_tuple(cls: type, tensors: Any) -> Any:
    cache = cls()
    for keys, values, *_ in tensors:
        layer = FixedSizeLayer(cache.settings)
        cache.layers.append(layer)
        layer.load(keys, values)
    return cache
