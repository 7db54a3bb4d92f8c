# SPDX-License-Identifier: Apache-2.0
"""One layer of a cache as tensors and plain facts, and back, bit for bit."""

from typing import Any

import torch
from torch import Tensor

from .layer import FixedSizeLayer
from .slots import FACTS, Tokens

SKIPPED = ("skipped_keys", "skipped_values", "skipped_count", "lost")


class Saved:
    """What a file says of one layer: ``tensors`` by name, and ``facts`` that are JSON."""

    def __init__(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.tensors, self.facts = tensors, facts

    @classmethod
    def of(cls, layer: FixedSizeLayer) -> "Saved":
        """The tokens that a layer holds, and all that is known of them. Waits for the device."""
        slots = layer.slots
        if slots is None:
            return cls({}, {"columns": None})
        tensors = dict(zip(Tokens._fields, slots.read(layer.tokens_held), strict=True))
        tensors["seen"] = slots.seen
        if slots.spans is not None:
            tensors["spans"] = slots.spans
        if slots.skipped is not None:
            tensors |= zip(SKIPPED, slots.skipped[:-1], strict=True)
        facts = {name: getattr(slots, name) for name in ("is_ordered", "may_have_holes")}
        return cls(tensors, {"columns": layer.tokens_seen, "heads": slots.heads_held, "group": layer.group, **facts})

    def restore(self, layer: FixedSizeLayer) -> None:
        """Into an empty layer.

        Raises:
            ValueError: where these are not the tensors of a layer of its settings.
        """
        tensors, facts = self.tensors, self.facts
        if facts["columns"] is None:
            return
        self._check(layer)
        layer._seen, layer.group = facts["columns"], facts["group"]
        like = (x.new_empty(x.shape[0], facts["heads"], 0, x.shape[-1]) for x in (tensors["keys"], tensors["values"]))
        layer.lazy_initialization(*like)
        slots = layer.slots
        slots.hold_rows(Tokens(*(tensors[name] for name in Tokens._fields)), layer.tokens_held)
        slots.seen.copy_(tensors["seen"])
        slots.columns.fill_(facts["columns"])
        slots.is_ordered, slots.may_have_holes = facts["is_ordered"], facts["may_have_holes"]
        if slots.skipped is not None:
            for name, total in zip(SKIPPED, slots.skipped[:-1], strict=True):
                total.copy_(tensors[name])
        with torch.inference_mode(False):
            slots.spans = tensors["spans"].clone() if "spans" in tensors else None

    def _check(self, layer: FixedSizeLayer) -> None:
        keys, values, spans = (self.tensors.get(name, torch.empty(0)) for name in ("keys", "values", "spans"))
        B, H, T = keys.shape[:1].numel(), self.facts["heads"], min(self.facts["columns"], layer.settings.slots)
        D, Dv = (x.shape[-1] for x in (keys, values))
        rows = layer.rows_of(H, T)
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        expected = {
            "keys": ((B, *rows, D), keys.dtype),
            "values": ((B, *rows, Dv), keys.dtype),
            "facts": ((FACTS, B, *rows), torch.float32),
            "positions": ((B, *rows), torch.int32),
            "seen": ((B,), torch.int32),
        }
        if "spans" in self.tensors:
            expected["spans"] = ((B, *spans.shape[1:2], 2), torch.int32)
        if layer.settings.include_skipped:
            kinds = ((B, H, D), wide), ((B, H, Dv), wide), ((B, H), torch.int32), ((B, H), torch.float32)
            expected |= zip(SKIPPED, kinds, strict=True)
        came = {name: (tuple(x.shape), x.dtype) for name, x in self.tensors.items()}
        for name in (*expected, *came):
            if expected.get(name) != came.get(name):
                raise ValueError(f"{name} must be {_words(expected.get(name))}; got {_words(came.get(name))}")


def _words(kind: tuple | None) -> str:
    return "absent" if kind is None else f"{list(kind[0])} of {kind[1]}"
