# SPDX-License-Identifier: Apache-2.0
"""The new tokens of a step: what an attention mask of transformers tells about them, and who sees whom.

Nothing else of a mask is read. After eviction its columns no longer belong to the slots of the cache, so whether an
old token is seen is decided by the positions that the cache holds. Which of the new tokens are padding, and who of them
sees whom, comes from outside.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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


ALL_REAL = NewTokens(None, None)


def read_mask(mask: Tensor | None, B: int, Q: int, S: int | None, shows_padding_everything: bool = False) -> NewTokens:
    """Reads the columns of the new tokens.

    Args:
        mask: None, ``[B, columns]`` with 1 for real tokens, or ``[B, 1, Q, columns]``, boolean (True: sees) or additive
            (0: sees); a batch of 1 stands for all rows. The columns end with the new tokens, or hold all tokens so far
            and perhaps some to come.
        B: rows.
        Q: new tokens.
        S: tokens seen before them, padding included; None: the columns end with the new tokens.
        shows_padding_everything: in a mask of rank 4 a row of padding, which would see nothing, sees all columns.

    Raises:
        TypeError: for a mask that is not a tensor, such as flex attention's.
        ValueError: for a tensor of another rank, for a mask per head, and for one that weighs tokens.
    """
    if mask is None:
        return ALL_REAL
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
    if shows_padding_everything:
        valid = valid & ~sees.triu(1).any(-1)
    return NewTokens(valid, sees)


def hides_the_past(mask: Tensor, new: NewTokens, Q: int, S: int, seen: Tensor) -> Tensor | None:
    """Whether a mask hides some of the ``seen`` ``[B]`` real tokens before the new ones from one that is no padding, or
    shows padding: a bool on the device. None where the mask has no columns for them."""
    if S == 0 or mask.shape[-1] < S + Q:
        return None
    old = mask[:, None, :S] if mask.dim() == 2 else mask[:, 0, -Q:, :S]
    shown = (old == 0 if old.is_floating_point() and mask.dim() == 4 else old.bool()).sum(-1)  # [B, Q or 1]
    wrong = shown != seen[:, None]
    return (wrong if new.valid is None else wrong & new.valid).any()


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
        start, columns]``; None: all of them. Padding is seen by nobody, and sees the tokens before it, as it does in
        transformers: the first token after right padding comes from there."""
        sees, valid = self.new.sees, self.new.valid
        columns = self.T + (self.Q if sees is not None else stop)
        if self.Q == 1 and not self.has_pads and sees is None:
            return columns, None
        if sees is None:
            among_new = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)[None, None]
        else:
            among_new = sees[:, None, start:stop]  # [B, 1, q, Q]
        if valid is not None:
            among_new = among_new & valid[:, None, None, : columns - self.T]
        if self.T == 0:
            return columns, among_new
        if self.held is not None:
            old = self.held[:, :, None]  # [B, H, 1, T]
        else:
            old = torch.ones(1, 1, 1, self.T, dtype=torch.bool, device=device)
        B, H = torch.broadcast_shapes(old.shape[:2], among_new.shape[:2])
        q = stop - start
        return columns, torch.cat([old.expand(B, H, q, -1), among_new.expand(B, H, q, -1)], dim=-1)


@dataclass
class Stage:
    """The new tokens of a step, between ``update`` and the end of its attention."""

    keys: Tensor  # [B, H, Q, D]
    values: Tensor  # [B, H, Q, Dv]
    all_keys: Tensor  # [B, H, T + Q, D], what update returned
    all_values: Tensor
    queries: int  # Q
    held: int  # T, the tokens before them
    new: NewTokens | None = None  # what the mask says about them, once somebody has read it
    length: int | None = None  # of a single token: what decode_attention_ is told; None: T

    @property
    def valid(self) -> Tensor | None:
        """Which new tokens are not padding, ``[B, Q]``; None: all."""
        return None if self.new is None else self.new.valid

    def valid_or_all(self) -> Tensor:
        """:attr:`valid`, all True where it is None."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.keys.shape[0], self.queries, dtype=torch.bool, device=self.keys.device)

    def check_weights(self, weights: Tensor) -> None:
        """Raises ValueError unless these can be the attention weights ``[B, Hq, Q, T + Q]`` of this step."""
        (B, H), device = self.keys.shape[:2], self.keys.device
        if weights.dim() != 4 or weights.shape[0] != B or weights.shape[1] % H != 0 or weights.device != device:
            raise ValueError(
                f"attention weights must be [B, Hq, Q, columns] with B = {B} and a multiple of the {H} KV heads on "
                f"{device}; got sizes {list(weights.shape)} on {weights.device}"
            )
        Q, columns = self.queries, self.all_keys.shape[2]
        if weights.shape[2:] != (Q, columns):
            raise ValueError(
                f"attention weights must have the {Q} queries and {columns} columns of this step, as "
                f"update() returned them; got sizes {list(weights.shape)}"
            )
