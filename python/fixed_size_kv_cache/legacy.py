# SPDX-License-Identifier: Apache-2.0
"""Caches as older transformers had them: taking one over, and ``key_cache`` and ``value_cache``.

generate() hands our ``forward`` a stock cache, which becomes one of ours in place.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .compat.transformers import CACHE_NAME, Cache, DynamicCache, drop_stock_storage, stock_contents
from .layer.layer import FixedSizeLayer

REMEDY = f"let generate() make the cache, or pass {CACHE_NAME}=FixedSizeDynamicCache(config=model.config)"


def from_legacy_cache(cls: type, cache: Any, layer_idx: int | None) -> Any:
    """See ``FixedSizeDynamicCache.from_legacy_cache``; ``cls`` is the class of what is made."""
    if cache is None:
        return cls()
    if isinstance(cache, cls):
        return cache
    if type(cache) is DynamicCache:
        return _adopt_step(cls, cache, layer_idx)
    if isinstance(cache, (tuple, list)):
        return _from_tuple(cls, cache)
    raise TypeError(f"from_legacy_cache: cannot take over a {type(cache).__name__}; {REMEDY}")


def adopt_empty(cache: Cache, fresh: Cache) -> None:
    """Makes an empty stock cache what ``fresh`` is, in place."""
    seen = cache.get_seq_length()
    if seen:
        raise ValueError(
            f"generate: a DynamicCache must be empty to be taken over; got one with {seen} tokens, of which no "
            f"attention was recorded; {REMEDY}"
        )
    _refuse_offloading("generate", cache)
    _become(cache, fresh)


def _adopt_step(cls: type, cache: Cache, layer_idx: int | None) -> Any:
    """A stock cache that is empty, or holds the tokens of this step in this layer."""
    try:
        contents = stock_contents(cache)
    except TypeError as error:
        raise TypeError(f"from_legacy_cache: cannot take over a {error}; {REMEDY}") from None
    _refuse_offloading("from_legacy_cache", cache)
    filled = [i for i, held in enumerate(contents) if held is not None]
    if filled not in ([], [layer_idx]):
        raise ValueError(
            f"from_legacy_cache: a DynamicCache must be empty, or hold this step's tokens in layer {layer_idx} only; "
            f"got tokens in layers {filled}, of which no attention was recorded; {REMEDY}"
        )
    fresh = cls()  # before anything is changed: settings may be refused
    drop_stock_storage(cache)
    _become(cache, fresh)
    for i, held in enumerate(contents):
        layer = cache.new_layer(i)
        cache.layers.append(layer)
        if held is not None:  # the stock update has run: its tokens are this step's
            layer.update(held.keys, held.values)
    return cache


def _refuse_offloading(who: str, cache: Cache) -> None:
    if getattr(cache, "offloading", False):
        raise TypeError(f"{who}: cannot take over a {type(cache).__name__} with offloading; {REMEDY}")


def _become(cache: Cache, fresh: Cache) -> None:
    kept = {name: value for name, value in vars(cache).items() if name == "_is_user_defined"}
    cache.__class__ = type(fresh)
    vars(cache).clear()
    vars(cache).update({**vars(fresh), **kept})


def _from_tuple(cls: type, tensors: Any) -> Any:
    cache = cls()
    for i, (keys, values, *_) in enumerate(tensors):
        layer = cache.new_layer(i)
        cache.layers.append(layer)
        layer.load(keys, values)
    return cache


class HeldTensors(Sequence):
    """``cache.key_cache`` or ``cache.value_cache``. What ``cache_truncate`` returned may be assigned, nothing else."""

    def __init__(self, cache: Any, which: int) -> None:
        self._cache = cache
        self._which = which

    def __len__(self) -> int:
        return len(self._cache.layers)

    def __getitem__(self, layer_idx: int) -> Tensor:
        layer = self._cache.layers[layer_idx]
        if not isinstance(layer, FixedSizeLayer):
            return (layer.keys, layer.values)[self._which]
        if layer.has_holes():
            raise RuntimeError("key_cache and value_cache cannot show a batch with padding: its slots have holes")
        return layer.held()[self._which]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, layer_idx: int, tensor: Tensor) -> None:
        returned = self._cache._own_layer(layer_idx).last_returned
        if returned is None or tensor is not returned[self._which]():
            raise ValueError(
                "key_cache and value_cache accept only what cache_truncate() last returned for this layer; the cache "
                "writes its slots itself"
            )
