# SPDX-License-Identifier: Apache-2.0
"""What a layer remembers between the two halves of a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import LogitRule
from .masks import NewTokens


@dataclass
class Stage:
    """The new tokens of a step, between ``update`` and the end of its attention."""

    keys: Tensor  # [B, H, Q, D]
    values: Tensor  # [B, H, Q, D]
    all_keys: Tensor  # [B, H, T + Q, D], what update returned
    all_values: Tensor
    new: NewTokens | None = None  # what the mask says about them, once somebody has read it

    @property
    def valid(self) -> Tensor | None:
        """Which new tokens are not padding, ``[B, Q]``; None: all."""
        return None if self.new is None else self.new.valid

    @property
    def queries(self) -> int:
        return self.keys.shape[2]


@dataclass
class Recorded:
    """Steps that may be taken back: all that is needed to do them again with fewer tokens."""

    keys: Tensor  # [B, H, R, D]
    values: Tensor  # [B, H, R, D]
    query: Tensor  # [B, Hq, R, D]
    new: NewTokens
    rule: LogitRule

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def then(self, later: "Recorded") -> "Recorded":
        """Both as one step."""
        return Recorded(
            torch.cat([self.keys, later.keys], dim=2),
            torch.cat([self.values, later.values], dim=2),
            torch.cat([self.query, later.query], dim=2),
            self.new.then(later.new, self.keys.shape[0], self.tokens, later.tokens, self.keys.device),
            later.rule,
        )

    def first(self, count: int) -> "Recorded":
        """The first tokens of it."""
        part = slice(count)
        return Recorded(
            self.keys[:, :, part], self.values[:, :, part], self.query[:, :, part], self.new.first(count), self.rule
        )

    def map_rows(self, change) -> "Recorded":
        """With another selection of batch rows."""
        new = NewTokens(*(x if x is None else change(x) for x in self.new))
        return Recorded(change(self.keys), change(self.values), change(self.query), new, self.rule)
