# SPDX-License-Identifier: Apache-2.0
"""Steps that may be taken back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import LogitRule
from .new_tokens import NewTokens


@dataclass
class Recorded:
    """All that is needed to do steps again with fewer tokens."""

    keys: Tensor  # [B, H, R, D]
    values: Tensor  # [B, H, R, Dv]
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
        keys, values, query = (x[:, :, :count] for x in (self.keys, self.values, self.query))
        return Recorded(keys, values, query, self.new.first(count), self.rule)

    def behind(self, held: Tensor) -> Tensor:
        """Which columns hold a token, bool ``[B, H, T + R]``, where ``held`` ``[B, H, T]`` says it of the slots."""
        B, H, _ = held.shape
        valid = self.new.valid
        if valid is None:
            valid = torch.ones(B, self.tokens, dtype=torch.bool, device=held.device)
        return torch.cat([held, valid[:, None].expand(-1, H, -1)], dim=2)

    def select_rows(self, rows: Tensor) -> "Recorded":
        """With these rows of the batch, ``[rows]`` int64."""
        keys, values, query, *new = (
            None if x is None else x.index_select(0, rows) for x in (self.keys, self.values, self.query, *self.new)
        )
        return Recorded(keys, values, query, NewTokens(*new), self.rule)
