# SPDX-License-Identifier: Apache-2.0
"""The slots of one layer: buffers, and nothing of when or why a token moves."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..settings import FixedSizeCacheConfig
from .attention import Skipped
from .protected_spans import spans_as_tensor

SCORES, VALUE_WEIGHTS, REDUNDANCY, KEY_SCALES = range(4)  # the planes of ``facts``, as in kernels/decode_attention.h
FACTS = 4


class Tokens(NamedTuple):
    """Tokens, and what is known of each."""

    keys: Tensor  # [B, H, S, D]
    values: Tensor  # [B, H, S, Dv]
    facts: Tensor  # float32 [4, B, H, S]: scores, value weights, redundancy, key scales (1 over the norm of the key)
    positions: Tensor  # int32 [B, H, S]: real tokens before it in its row; -1: no token

    @property
    def scores(self) -> Tensor:
        return self.facts[SCORES]

    @property
    def value_weights(self) -> Tensor:
        return self.facts[VALUE_WEIGHTS]

    @property
    def redundancy(self) -> Tensor:
        return self.facts[REDUNDANCY]

    @property
    def key_scales(self) -> Tensor:
        return self.facts[KEY_SCALES]


class Slots:
    """``N = settings.slots`` slots for each KV head, and one more for the new token of a step.

    An empty slot has position -1 and score -inf; what else it holds means nothing. Between steps the last one is empty.
    Buffers have one slot at first and grow with what they hold, at most doubling, until there are ``N + 1``; from then
    on none moves in memory while the batch stays.

    Attributes:
        tokens: the buffers, :class:`Tokens` of :attr:`capacity` slots and the free one.
        most: ``N``, and ``least`` too: only in :class:`UnequalSlots` they differ.
        layout: what operators are told of heads of different sizes; None, there are none here.
        seen: int32 ``[B]``, real tokens seen of each row.
        columns: int64, tokens seen with padding, for compiled steps: S on the device.
        skipped: the entry of the evicted tokens, None where it is not asked for.
        spans: int32 ``[B, spans, 2]``, positions that are never evicted; None for none.
        is_ordered: whether slots are in token order.
        may_have_holes: whether padding came, so that slots in use may be empty.
    """

    layout: Tensor | None = None

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        settings: FixedSizeCacheConfig,
        protected_spans: list,
        at_full_size: bool = False,
    ) -> None:
        (B, H, _, D), Dv, device = keys.shape, values.shape[3], keys.device
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        self.most = self.least = settings.slots
        self._protected_spans = protected_spans
        self._like = _kind(keys, values)
        with torch.inference_mode(False):  # or they could not be written to outside of it
            rows = self._no_rows(B, H)
            self.tokens = Tokens(
                torch.empty(*rows, D, dtype=keys.dtype, device=device),
                torch.empty(*rows, Dv, dtype=keys.dtype, device=device),
                torch.empty(FACTS, *rows, dtype=torch.float32, device=device),
                torch.empty(*rows, dtype=torch.int32, device=device),
            )
            self.seen = torch.zeros(B, dtype=torch.int32, device=device)
            self.columns = torch.zeros((), dtype=torch.int64, device=device)
            self.skipped = None
            if settings.include_skipped:
                self.skipped = Skipped(
                    torch.zeros(B, H, D, dtype=wide, device=device),
                    torch.zeros(B, H, Dv, dtype=wide, device=device),
                    torch.zeros(B, H, dtype=torch.int32, device=device),
                    torch.zeros(B, H, dtype=torch.float32, device=device),
                    settings.skipped_mode,
                )
        self._resize(self.most if at_full_size else 0)
        self.clear()

    def clear(self) -> None:
        """Forgets all tokens and keeps the buffers."""
        self.empty(0)
        self.seen.zero_()
        self.columns.zero_()
        if self.skipped is not None:
            for total in self.skipped[:-1]:
                total.zero_()
        with torch.inference_mode(False):
            self.spans = spans_as_tensor(self._protected_spans, self.seen.shape[0], self.seen.device)
        self.is_ordered = True
        self.may_have_holes = False

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether tokens have the batch, heads, dimensions, type and device of the buffers."""
        return _kind(keys, values) == self._like and keys.shape[2] == values.shape[2]

    # ---- memory ------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Slots that there is memory for, without the free one."""
        return self.tokens.positions.shape[2] - 1

    def make_room(self, count: int, forget: bool = False) -> None:
        """Memory for ``count`` tokens, and for as many as there were once more; never for more than ``N``.

        Args:
            count: the tokens to come, with those held.
            forget: what is held need not be kept, so its memory is free before there is new.
        """
        if self.capacity >= min(count, self.most):
            return
        if self.seen.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "update: the buffers must have their full size before a CUDA graph is captured; got some that grow; "
                "make the cache with static=True"
            )
        self._resize(min(self.most, max(count, 2 * self.capacity)), forget)

    def _resize(self, capacity: int, forget: bool = False) -> None:
        rows, moves = self._places(capacity)
        if forget:
            self.tokens, moves = Tokens(*(_empty(x, at, 0) for x, at in _along(self.tokens))), []
        try:
            with torch.inference_mode(False):
                self.tokens = Tokens(*(_moved(x, at, rows, moves) for x, at in _along(self.tokens)))
        except RuntimeError as error:  # CUDA's out of memory is one too
            keys, values, _, positions = self.tokens
            each = (keys.shape[-1] + values.shape[-1]) * keys.element_size() + 4 * (FACTS + 1)
            needed = positions.shape[:-1].numel() * rows * each
            raise type(error)(
                f"cache_size must leave room in memory; got {self.most}, of which {capacity} tokens of each "
                f"layer need {needed} bytes ({keys.shape[0]} rows); use a smaller cache_size ({error})"
            ) from error

    def _no_rows(self, B: int, H: int) -> tuple[int, ...]:
        """Sizes of the positions of no slots."""
        return B, H, 0

    def _places(self, capacity: int) -> tuple[int, list[tuple[int, int, int]]]:
        """How many rows so many slots take, with the free one, and where those that there are go: from, to, count."""
        return capacity + 1, [(0, 0, self.tokens.positions.shape[2])]

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def read(self, count: int) -> Tokens:
        """The first ``count`` slots, as views."""
        if count == self.tokens.positions.shape[2]:
            return self.tokens
        keys, values, facts, positions = self.tokens
        return Tokens(keys[:, :, :count], values[:, :, :count], facts[..., :count], positions[..., :count])

    def hold(self, tokens: Tokens) -> None:
        """Holds these tokens, copies, and no others."""
        count = tokens.positions.shape[2]
        self.make_room(count, forget=True)
        self._write(tokens)
        self.empty(count)

    def hold_rows(self, tokens: Tokens, count: int) -> None:
        """Holds ``count`` tokens of each head, what :meth:`read` gave."""
        self.hold(tokens)

    def _write(self, tokens: Tokens) -> None:
        """Puts tokens into the first slots."""
        slots = slice(tokens.positions.shape[2])
        keys, values, facts, positions = self.tokens
        keys[:, :, slots] = tokens.keys
        values[:, :, slots] = tokens.values
        facts[..., slots] = tokens.facts
        positions[..., slots] = tokens.positions

    def put_behind(self, count: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the key and value of one token ``[B, H, 1, D]`` into slot ``count``, of which nothing else is known yet,
        and returns the first ``count + 1`` keys and values as views."""
        tokens, after = self.tokens, count + 1
        if after >= tokens.positions.shape[2] <= self.most:
            self.make_room(after)
            tokens = self.tokens
        if after == tokens.positions.shape[2]:
            all_keys, all_values = tokens.keys, tokens.values
        else:
            all_keys, all_values = tokens.keys[:, :, :after], tokens.values[:, :, :after]
        all_keys[:, :, count:] = keys
        all_values[:, :, count:] = values
        return all_keys, all_values

    def overwrite(self, victim: Tensor, token: Tokens) -> Tokens:
        """Puts one token into slot ``victim`` ``[B, H, 1]`` of each KV head, and returns what was there."""
        keys, values, facts, positions = self.tokens
        of_keys, of_values = (victim[..., None].expand_as(x) for x in (token.keys, token.values))
        of_facts = victim.expand_as(token.facts)
        evicted = Tokens(
            keys.gather(2, of_keys),
            values.gather(2, of_values),
            facts.gather(3, of_facts),
            positions.gather(2, victim),
        )
        keys.scatter_(2, of_keys, token.keys)
        values.scatter_(2, of_values, token.values)
        facts.scatter_(3, of_facts, token.facts)
        positions.scatter_(2, victim, token.positions)
        self.is_ordered = False
        return evicted

    def empty(self, start: int, stop: int | None = None) -> None:
        """Empties slots ``[start, stop)``."""
        self.tokens.positions[..., start:stop] = -1
        self.tokens.scores[..., start:stop] = -math.inf

    def crop(self, S: int, left: int) -> None:
        """Takes back all but the first ``left`` of ``S`` tokens seen, none of which was evicted."""
        removed = self.read(S).positions[:, 0, left:]
        self.seen -= (removed >= 0).sum(-1, dtype=torch.int32)
        self.empty(left)
        self.columns.fill_(left)

    def order(self, count: int) -> Tokens:
        """Puts the first ``count`` slots into token order, empty ones first, and returns them as views."""
        held = self.read(count)
        if not self.is_ordered:
            self._write(take(held, held.positions.argsort(dim=-1, stable=True)))
            self.is_ordered = True
        return held

    def has_holes(self, count: int) -> bool:
        """Whether padding left some of the first ``count`` slots empty. Waits for the device."""
        return self.may_have_holes and bool((self.read(count).positions < 0).any())

    # ---- whole rows --------------------------------------------------------------------------------------------------

    def select_rows(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch, ``[rows]`` int64, in place where their number stays."""
        with torch.inference_mode(False):
            keys, values, facts, positions = self.tokens
            self.tokens = Tokens(
                _select(keys, rows), _select(values, rows), _select(facts, rows, dim=1), _select(positions, rows)
            )
            self.seen = _select(self.seen, rows)
            (_, H), D, _, Dv, *rest = self._like
            B = self.seen.shape[0]
            self._like = ((B, H), D, (B, H), Dv, *rest)
            if self.spans is not None:
                self.spans = _select(self.spans, rows)
            if self.skipped is not None:
                self.skipped = Skipped(*(_select(x, rows) for x in self.skipped[:-1]), self.skipped.mode)

    @property
    def heads_held(self) -> int:
        """H."""
        return self._like[0][1]

    @property
    def tensors(self) -> list[Tensor]:
        """All buffers."""
        of_skipped = [] if self.skipped is None else self.skipped[:-1]
        more = [] if self.spans is None else [self.spans]
        return [*self.tokens, self.seen, self.columns, *of_skipped, *more]


def take(tokens: Tokens, indices: Tensor) -> Tokens:
    """The tokens at ``indices`` ``[B, H, K]``, copied."""
    keys, values = (x.gather(2, indices[..., None].expand(-1, -1, -1, x.shape[3])) for x in tokens[:2])
    facts = tokens.facts.gather(3, indices.expand(FACTS, -1, -1, -1))
    return Tokens(keys, values, facts, tokens.positions.gather(2, indices))


def _along(tokens: Tokens) -> zip:
    """Each buffer, and which of its dimensions is that of the slots."""
    at = tokens.positions.dim() - 1
    return zip(tokens, (at, at, at + 1, at), strict=True)


def _empty(x: Tensor, dim: int, size: int) -> Tensor:
    """Such a buffer of empty slots: zeros, so that nothing is NaN by chance, but for positions and scores."""
    slots = x.new_full((*x.shape[:dim], size, *x.shape[dim + 1 :]), -1 if x.dtype == torch.int32 else 0)
    if dim == x.dim() - 1 and x.is_floating_point():
        slots[SCORES] = -math.inf
    return slots


def _moved(x: Tensor, dim: int, size: int, moves: list[tuple[int, int, int]]) -> Tensor:
    """A buffer of another size with the rows that are kept."""
    slots = _empty(x, dim, size)
    for before, after, count in moves:
        slots.narrow(dim, after, count).copy_(x.narrow(dim, before, count))
    return slots


def _kind(keys: Tensor, values: Tensor) -> tuple:
    """What must stay of tokens from step to step: all but their number."""
    of_keys, of_values = keys.shape, values.shape
    sizes = of_keys[:2], of_keys[3:], of_values[:2], of_values[3:]
    return *sizes, keys.dtype, values.dtype, keys.device, values.device


def _select(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    selected = x.index_select(dim, rows)
    return x.copy_(selected) if selected.shape == x.shape else selected
