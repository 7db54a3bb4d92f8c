# SPDX-License-Identifier: Apache-2.0
"""From ``update`` to the attention that follows: which layer of which cache the keys belong to.

transformers calls an attention function with keys, not with the cache. The function takes them for those of our cache
only if they are the very tensor that ``update`` returned: keys that were changed in between (latent or shared keys and
values) belong to no slot.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Handoff(threading.local):
    """What the last ``update`` of this thread returned, until an attention takes it."""

    cache: Any = None
    layer_idx: int | None = None
    keys: Tensor | None = None
    taken: weakref.ref | None = None  # the last keys that an attention took

    def offer(self, cache: Any, layer_idx: int, keys: Tensor) -> None:
        self.cache, self.layer_idx, self.keys = cache, layer_idx, keys

    def clear(self) -> None:
        self.cache = self.layer_idx = self.keys = None

    def take(self, module: Any, keys: Tensor) -> tuple[Any, int] | None:
        """The cache and layer that the keys come from; None: from no cache of ours."""
        cache, layer_idx, offered = self.cache, self.layer_idx, self.keys
        self.clear()
        if cache is None:
            if self.taken is not None and self.taken() is keys and not torch.compiler.is_compiling():
                raise NotImplementedError(
                    f"{type(module).__name__}: attention must see the keys of an update once; this model attends to "
                    "them again, so its cache cannot be capped; call disable(model)"
                )
            return None
        if keys is offered:
            if not torch.compiler.is_compiling():
                self.taken = weakref.ref(keys)
            return cache, layer_idx
        if getattr(module, "layer_idx", layer_idx) != layer_idx:
            return None  # left over from a forward that broke off before its attention
        raise NotImplementedError(
            f"{type(module).__name__}: the keys of attention must be those that the cache returned; this model changes "
            "them after the cache update (latent attention, or shared keys and values), so its cache cannot be capped; "
            "call disable(model)"
        )


HANDOFF = Handoff()
# Why nobody has reported attention, where the hooks into transformers know it.
EXPLAIN: Callable[[], str | None] = lambda: None  # noqa: E731
