# SPDX-License-Identifier: Apache-2.0
"""Who sees whom in a step."""

from typing import NamedTuple

import torch
from torch import Tensor

from .masks import NewTokens


class Visibility(NamedTuple):
    """New queries and the ``T + Q`` columns before them, what is held first."""

    T: int
    Q: int
    held: Tensor | None  # bool [B, H, T]: which slots hold a token; None: all
    new: NewTokens

    @property
    def has_pads(self) -> bool:
        """Whether a column may be empty or a query see nothing."""
        return self.held is not None or self.new.valid is not None

    def is_causal(self) -> bool:
        """Whether nothing but the order of the new tokens matters."""
        return self.T == 0 and not self.has_pads and self.new.sees is None

    def of_block(self, start: int, stop: int, device: torch.device) -> tuple[int, Tensor | None]:
        """For queries ``[start, stop)``: how many columns they can see at most, and which, broadcast to ``[B, H, stop -
        start, columns]``; None: all of them."""
        sees, valid = self.new.sees, self.new.valid
        columns = self.T + (self.Q if sees is not None else stop)
        if self.Q == 1 and not self.has_pads and sees is None:
            return columns, None
        if sees is None:
            among_new = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)[None, None]
        else:
            among_new = sees[:, None, start:stop]  # [B, 1, q, Q]
        if valid is not None:
            among_new = among_new & valid[:, None, None, : columns - self.T] & valid[:, None, start:stop, None]
        if self.T == 0:
            return columns, among_new
        if self.held is not None:
            old = self.held[:, :, None]  # [B, H, 1, T]
        else:
            old = torch.ones(1, 1, 1, self.T, dtype=torch.bool, device=device)
        if valid is not None:
            old = old & valid[:, None, start:stop, None]
        B, H = torch.broadcast_shapes(old.shape[:2], among_new.shape[:2])
        q = stop - start
        return columns, torch.cat([old.expand(B, H, q, -1), among_new.expand(B, H, q, -1)], dim=-1)
