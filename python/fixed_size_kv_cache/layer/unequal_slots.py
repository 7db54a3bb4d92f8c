# SPDX-License-Identifier: Apache-2.0
"""The slots of a layer whose KV heads hold different numbers of tokens: all in one row of memory, none for padding."""

import torch
from torch import Tensor

from ..settings import FixedSizeCacheConfig
from .handoff import HANDOFF
from .slots import Slots, Tokens, take


class UnequalSlots(Slots):
    """:class:`Slots` of ``N[h]`` for KV head ``h``, and a free one behind each head's.

    Buffers are ``[B, rows, ...]``, the slots of one head after those of another. All heads grow at once, each up to its
    own number.

    Attributes:
        sizes: ``N`` of each KV head; ``most`` and ``least`` are the largest and the smallest.
        capacity: slots that there is memory for in the heads that may have so many.
        layout: int32 ``[H, 4]``: the first row of each head, its slots, its sinks and its recent tokens.
    """

    capacity: int = -1

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        heads: tuple[FixedSizeCacheConfig, ...],
        protected_spans: list,
        at_full_size: bool = False,
    ) -> None:
        self.heads, self.sizes = heads, tuple(head.slots for head in heads)
        super().__init__(keys, values, max(heads, key=lambda head: head.slots), protected_spans, at_full_size)
        self.least = min(self.sizes)

    # ---- where a head lies -------------------------------------------------------------------------------------------

    def _rows(self, capacity: int) -> list[tuple[int, int]]:
        """The first row of each head and its rows, with the free one."""
        rows, first = [], 0
        for size in self.sizes:
            rows.append((first, min(capacity, size) + 1))
            first += rows[-1][1]
        return rows

    def _no_rows(self, B: int, H: int) -> tuple[int, ...]:
        return B, 0

    def _places(self, capacity: int) -> tuple[int, list[tuple[int, int, int]]]:
        old, new = self._rows(self.capacity), self._rows(capacity)
        moves = [(before, after, count) for (before, count), (after, _) in zip(old, new, strict=True)]
        return sum(count for _, count in new), moves

    def _resize(self, capacity: int, forget: bool = False) -> None:
        super()._resize(capacity, forget)
        self.capacity = capacity
        layout = [
            (first, rows - 1, head.sink_tokens, head.recent_tokens)
            for (first, rows), head in zip(self._rows(capacity), self.heads, strict=True)
        ]
        with torch.inference_mode(False):
            self.layout = torch.tensor(layout, dtype=torch.int32, device=self.seen.device)

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def of_heads(self, count: int) -> list[Tokens]:
        """The first ``count`` slots of each head, fewer where it has fewer, as views ``[B, 1, slots, ...]``."""
        return [
            self._view(slice(first, first + min(count, size)))
            for (first, _), size in zip(self._rows(self.capacity), self.sizes, strict=True)
        ]

    def _view(self, rows: slice) -> Tokens:
        keys, values, facts, positions = self.tokens
        return Tokens(keys[:, None, rows], values[:, None, rows], facts[:, :, None, rows], positions[:, None, rows])

    def read(self, count: int) -> Tokens:
        """The first ``count`` slots of each head, one head after another ``[B, rows, ...]``, copied."""
        return join_heads(self.of_heads(count))

    def hold(self, heads: list[Tokens]) -> None:
        """Holds these tokens of each head, copies ``[B, 1, S, ...]``, and no others."""
        self.make_room(max(tokens.positions.shape[2] for tokens in heads), forget=True)
        self.empty(0)
        for tokens, (first, _) in zip(heads, self._rows(self.capacity), strict=True):
            self._put(self._view(slice(first, first + tokens.positions.shape[2])), tokens)

    def hold_rows(self, tokens: Tokens, count: int) -> None:
        """Holds what :meth:`read` gave."""
        self.hold(split_heads(tokens, [min(count, size) for size in self.sizes]))

    def put_behind(self, count: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Room for one token more, which the operator puts in its place; returns nothing that can be looked at."""
        if count >= self.capacity < self.most:
            self.make_room(count + 1)
        return self.hide(keys), self.hide(values)

    @staticmethod
    def hide(tensor: Tensor) -> Tensor:
        """While a graph is compiled a tensor stays what it is."""
        return tensor if torch.compiler.is_compiling() else tensor.as_subclass(ForOurAttentionOnly)

    def empty(self, start: int, stop: int | None = None) -> None:
        """Empties slots from ``start`` on."""
        for first, rows in self._rows(self.capacity):
            here = slice(first + min(start, rows), first + rows)
            self.tokens.positions[:, here] = -1
            self.tokens.scores[:, here] = -torch.inf

    def crop(self, S: int, left: int) -> None:
        removed = self.of_heads(S)[0].positions[:, 0, left:]  # nothing was evicted: all heads hold the same
        self.seen -= (removed >= 0).sum(-1, dtype=torch.int32)
        self.empty(left)
        self.columns.fill_(left)

    def order(self, count: int) -> list[Tokens]:
        """Puts the first ``count`` slots of each head into token order, empty ones first, and returns them as views."""
        heads = self.of_heads(count)
        if not self.is_ordered:
            for held in heads:
                self._put(held, take(held, held.positions.argsort(dim=-1, stable=True)))
            self.is_ordered = True
        return heads

    def has_holes(self, count: int) -> bool:
        return self.may_have_holes and any(bool((held.positions < 0).any()) for held in self.of_heads(count))

    @staticmethod
    def _put(slots: Tokens, tokens: Tokens) -> None:
        for at, x in zip(slots, tokens, strict=True):
            at.copy_(x)

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, self.layout]


class ForOurAttentionOnly(Tensor):
    """New keys or values of a layer whose heads differ, in the place of all that attention sees: ours asks the cache,
    and for others there is no rectangle that they could read."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "__get__":  # sizes and the like, but not .mT
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
        HANDOFF.clear()
        raise NotImplementedError(
            "keys of heads of different sizes can be read by our own attention only; got another one; call "
            "enable(model), or give all KV heads of a layer the same cache_size"
        )


def join_heads(heads: list[Tokens]) -> Tokens:
    """Tokens ``[B, 1, S, ...]`` of each head as ``[B, rows, ...]``."""
    keys, values, facts, positions = zip(*heads, strict=True)
    return Tokens(
        torch.cat(keys, dim=2)[:, 0],
        torch.cat(values, dim=2)[:, 0],
        torch.cat(facts, dim=3)[:, :, 0],
        torch.cat(positions, dim=2)[:, 0],
    )


def split_heads(tokens: Tokens, counts: list[int]) -> list[Tokens]:
    """:func:`join_heads` back, as views."""
    at = tokens.positions.dim() - 1
    parts = (x.split(counts, dim=dim) for x, dim in zip(tokens, (at, at, at + 1, at), strict=True))
    return [
        Tokens(keys[:, None], values[:, None], facts[:, :, None], positions[:, None])
        for keys, values, facts, positions in zip(*parts, strict=True)
    ]
