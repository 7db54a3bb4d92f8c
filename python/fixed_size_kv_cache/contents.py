# SPDX-License-Identifier: Apache-2.0
"""What a cache holds, as its users look at it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import legacy
from .compat.transformers import BaseCache
from .layer.layer import FixedSizeLayer
from .sizes import all_sizes


class CacheContents(BaseCache):
    """The part of :class:`FixedSizeDynamicCache` that changes nothing."""

    @property
    def key_cache(self) -> legacy.HeldTensors:
        """The keys held, a sequence over the layers; the last entry is the sum of the evicted ones, if kept."""
        return legacy.HeldTensors(self, 0)

    @property
    def value_cache(self) -> legacy.HeldTensors:
        """The values held, as :attr:`key_cache`."""
        return legacy.HeldTensors(self, 1)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self.layers)))

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys and values held, as a tuple per layer. Scores and positions are not in it."""
        return tuple(self)

    def get_held_tokens(self, layer_idx: int = 0) -> Tensor:
        """How many tokens each KV head of a layer holds, int64 ``[B, H]``."""
        return (self._filled_layer(layer_idx).positions >= 0).sum(-1)

    def get_positions(self, layer_idx: int = 0) -> Tensor:
        """Which tokens a layer holds, int32 ``[B, H, T]`` in the order of ``key_cache``: how many real tokens came
        before each in its row, -1 where padding left a slot empty, and behind those of a head that has fewer slots."""
        return self._filled_layer(layer_idx).positions.clone()

    def lost_attention(self, layer_idx: int = 0) -> Tensor:
        """The share of the last step's attention that went to evicted tokens, float32 ``[B, H]`` from 0 to 1.

        It is measured on the entry of the evicted tokens, the mean over the queries of the step and the query heads of
        each KV head.

        Raises:
            RuntimeError: without ``include_skipped``, since nothing is known of what was evicted then.
        """
        if not self.settings.include_skipped:
            raise RuntimeError(
                "lost_attention: the cache must keep the entry of the evicted tokens; got include_skipped=False; make "
                "it with include_skipped=True"
            )
        return self._filled_layer(layer_idx).slots.skipped.lost.clone()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, on all devices; those of transformers' own layers included."""
        stock = (layer for layer in self.layers if not isinstance(layer, FixedSizeLayer))
        tensors = [x for layer in stock for x in vars(layer).values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors) + sum(x.nbytes for x in self.layers if isinstance(x, FixedSizeLayer))

    def __repr__(self) -> str:
        own = [layer for layer in self.layers if isinstance(layer, FixedSizeLayer)]
        name, sizes = type(self).__name__, self.settings.cache_size
        on_average = "" if isinstance(sizes, int) else " on average"
        size = f"cache_size={self.settings.average_size}{on_average}"
        if self.layers and not own:
            return f"{name}({self.get_seq_length()} tokens seen, nothing capped: all layers are transformers' own)"
        if own and own[0]._seen is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return f"{name}({size})"  # to ask the device would break the capture
        folded, recorded = (own[0].tokens_folded, own[0].tokens_recorded) if own else (0, 0)
        held = [min(folded, slots - self.settings.include_skipped) for slots in all_sizes(sizes)]
        where = "" if len(own) == len(self.layers) else f" by {len(own)} of {len(self.layers)} layers"
        seen = folded + recorded
        return f"{name}({sum(held) // len(held) + recorded} of {seen} tokens held{on_average}{where}, {size})"

    def _filled_layer(self, layer_idx: int) -> FixedSizeLayer:
        layer = self._own_layer(layer_idx)
        if not layer.is_initialized:
            raise RuntimeError(f"layer {layer_idx} holds nothing yet; run the model first")
        return layer

    def _own_layer(self, layer_idx: int) -> FixedSizeLayer:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, FixedSizeLayer):
            raise RuntimeError(
                f"layer {layer_idx} must be one of ours that update() has filled; got {type(layer).__name__}"
            )
        return layer
