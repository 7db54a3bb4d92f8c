# SPDX-License-Identifier: Apache-2.0
"""What an attention mask of transformers tells about the new tokens; nothing else of it is read.

After eviction the columns of a mask no longer belong to the slots of the cache, so whether an old token is seen is
decided by the positions that the cache holds. Which of the new tokens are padding, and who of them sees whom, comes
from outside.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._compat import SHOWS_PADDING_EVERYTHING

BIAS = -1e4  # below it a mask hides a token, in every type


class NewTokens(NamedTuple):
    """What a mask says about the new tokens."""

    valid: Tensor | None  # bool [B, Q]: not padding; None: all
    sees: Tensor | None  # bool [B, Q, Q], query by new token; None: all up to itself

    def first(self, count: int) -> "NewTokens":
        """Of the first tokens only."""
        valid = None if self.valid is None else self.valid[:, :count]
        return NewTokens(valid, None if self.sees is None else self.sees[:, :count, :count])

    def then(self, later: "NewTokens", B: int, Q: int, later_Q: int, device: torch.device) -> "NewTokens":
        """Of both as one step of ``Q + later_Q`` tokens."""
        valid = sees = None
        if self.valid is not None or later.valid is not None:
            every = torch.ones(B, Q + later_Q, dtype=torch.bool, device=device)
            parts = ((self.valid, Q), (later.valid, later_Q))
            valid = torch.cat([every[:, :n] if new is None else new for new, n in parts], dim=1)
        if self.sees is not None or later.sees is not None:
            sees = torch.ones(Q + later_Q, Q + later_Q, dtype=torch.bool, device=device).tril().repeat(B, 1, 1)
            if self.sees is not None:
                sees[:, :Q, :Q] = self.sees
            if later.sees is not None:
                sees[:, Q:, Q:] = later.sees
        return NewTokens(valid, sees)


def read_mask(mask: Tensor | None, B: int, Q: int, S: int | None) -> NewTokens:
    """Reads the columns of the new tokens.

    Args:
        mask: None, ``[B, columns]`` with 1 for real tokens, or ``[B, 1, Q, columns]``, boolean (True: sees) or additive
            (0: sees); a batch of 1 stands for all rows. The columns end with the new tokens, or hold all tokens so far
            and perhaps some to come.
        B: rows.
        Q: new tokens.
        S: tokens seen before them, padding included; None: the columns end with the new tokens.

    Raises:
        TypeError: for a mask that is not a tensor, such as flex attention's.
        ValueError: for a tensor of another rank, for a mask per head, and for one that weighs tokens.
    """
    if mask is None:
        return NewTokens(None, None)
    if not isinstance(mask, Tensor):
        raise TypeError(f'attention_mask must be a tensor; got {type(mask).__name__}; set attn_implementation="eager"')
    if mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask must be [B, columns] or [B, 1, Q, columns]; got sizes {list(mask.shape)}")
    if mask.dim() == 4 and mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask must be the same for all heads, [B, 1, Q, columns]; got sizes {list(mask.shape)}: a model "
            "that weighs tokens by its mask cannot be capped; call disable(model)"
        )
    first = S if S is not None and mask.shape[-1] >= S + Q else mask.shape[-1] - Q
    new = mask[..., first : first + Q]
    if mask.dim() == 2:
        return NewTokens(new.bool().expand(B, Q), None)
    sees = new[:, 0, -Q:].expand(B, Q, Q)
    if sees.dtype != torch.bool:
        if Q > 1 and bool(((sees != 0) & (sees > BIAS)).any()):  # not in a decode step: it waits for the device
            raise ValueError(
                "attention_mask must be 0 where a token is seen and -inf where not; got other values: a model that "
                "weighs tokens by its mask cannot be capped; call disable(model)"
            )
        sees = sees == 0
    valid = sees.diagonal(dim1=-2, dim2=-1)  # a real token sees itself
    if SHOWS_PADDING_EVERYTHING:
        valid = valid & ~sees.triu(1).any(-1)
    return NewTokens(valid, sees)
