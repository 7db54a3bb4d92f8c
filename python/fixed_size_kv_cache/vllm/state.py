# SPDX-License-Identifier: Apache-2.0
"""The slots of one layer for one request, in memory that the engine owns, and the two steps on them."""

import torch
from torch import Tensor

from ..layer import chunk, decode
from ..layer.attention import LogitRule
from ..layer.new_tokens import ALL_REAL, Stage, Visibility
from ..layer.slots import FACTS, Slots, Tokens
from ..settings import FixedSizeCacheConfig

STATE = ("positions", "facts", "keys", "values")  # of one request: what has four bytes first, so that all is aligned


def state_shapes(settings: FixedSizeCacheConfig, H: int, D: int, Dv: int) -> tuple[tuple[int, ...], ...]:
    rows = settings.slots + 1
    return (H, rows), (FACTS, H, rows), (H, rows, D), (H, rows, Dv)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return torch.int32, torch.float32, dtype, dtype


def as_tokens(states: tuple[Tensor, ...]) -> Tokens:
    """Of many requests, each a row of the batch."""
    positions, facts, keys, values = states
    return Tokens(keys, values, facts.transpose(0, 1), positions)


class StateSlots(Slots):
    """Slots at their full size in memory that is there. What an earlier request left in them does not matter: the
    first ``T`` are in use, all others are made empty by the first chunk."""

    def __init__(self, tokens: Tokens, seen: Tensor, settings: FixedSizeCacheConfig) -> None:
        self.tokens, self.seen = tokens, seen
        self.most = self.least = settings.slots
        self.skipped = self.spans = None
        self.is_ordered = self.may_have_holes = False


class RequestState:
    """What one layer holds of one request that has seen ``S`` tokens."""

    def __init__(self, states: Tokens, block: int, S: int, seen: Tensor, settings: FixedSizeCacheConfig) -> None:
        row = slice(block, block + 1)  # a batch of one
        keys, values, facts, positions = states
        tokens = Tokens(keys[row], values[row], facts[:, row], positions[row])
        self.slots, self.settings, self.S = StateSlots(tokens, seen, settings), settings, S

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, rule: LogitRule) -> Tensor:
        """One new token, ``[1, heads, 1, D]`` each, which the operator puts into its slot."""
        T = min(self.S, self.settings.slots)
        stage = Stage(keys, values, keys, values, 1, T, ALL_REAL, length=self.S)
        return decode.attend_fused(self.slots, self.settings, stage, query, rule)

    def read(self, query: Tensor, keys: Tensor, values: Tensor, rule: LogitRule, size: int) -> Tensor:
        """Many new tokens ``[1, heads, Q, D]``, cut where ``size`` divides their position in the request."""
        ends = [*range(self.S // size * size + size, self.S + query.shape[2], size), self.S + query.shape[2]]
        outputs = []
        for end in ends:
            count = end - self.S
            outputs.append(self._read(*(x[:, :, :count] for x in (query, keys, values)), rule))
            query, keys, values = (x[:, :, count:] for x in (query, keys, values))
        return torch.cat(outputs, dim=2)

    def _read(self, query: Tensor, keys: Tensor, values: Tensor, rule: LogitRule) -> Tensor:
        Q, T = query.shape[2], min(self.S, self.settings.slots)
        held = self.slots.order(T)
        everything = (torch.cat(pair, dim=2) for pair in ((held.keys, keys), (held.values, values)))
        stage = Stage(keys, values, *everything, Q, T, ALL_REAL)
        output = chunk.attend(self.slots, self.settings, stage, query, rule, Visibility(T, Q, None, ALL_REAL), None)
        self.S += Q
        return output
