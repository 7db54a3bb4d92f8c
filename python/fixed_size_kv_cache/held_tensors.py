# SPDX-License-Identifier: Apache-2.0
"""``cache.key_cache`` and ``cache.value_cache``: what the layers hold, as older transformers had it."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .layer import FixedSizeLayer


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
