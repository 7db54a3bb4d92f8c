# SPDX-License-Identifier: Apache-2.0
"""What a layer remembers between the two halves of a step."""

from dataclasses import dataclass

from torch import Tensor

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
