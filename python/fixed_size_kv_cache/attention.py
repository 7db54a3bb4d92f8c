# SPDX-License-Identifier: Apache-2.0
"""Attention over slots in plain torch, with the probabilities that the scores are made of."""

from typing import NamedTuple

import torch
from torch import Tensor


class Skipped(NamedTuple):
    """The entry of the evicted tokens."""

    keys: Tensor  # [B, H, D], their sum
    values: Tensor  # [B, H, D], their sum
    count: Tensor  # [B, H], how many
    mode: str  # "mean" or "sum"

    def entry(self) -> tuple[Tensor, Tensor, Tensor]:
        """Key ``[B, H, D]``, value ``[B, H, D]`` and what is added to the logit ``[B, H]``, -inf for none."""
        count = self.count.to(self.keys.dtype)
        if self.mode == "sum":
            return self.keys, self.values, torch.where(self.count > 0, 0.0, float("-inf")).to(self.keys.dtype)
        n = count.clamp(min=1)[..., None]
        return self.keys / n, self.values / n, count.log()


def attend(
    query: Tensor,  # [B, Hq, Q, D]
    keys: Tensor,  # [B, H, S, D]
    values: Tensor,  # [B, H, S, D]
    visible: Tensor | None,  # bool, broadcast to [B, H, Q, S]
    scaling: float,
    skipped: Skipped | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of grouped query heads.

    Logits are accumulated in the type of the inputs, the softmax is taken in float32 (float64 for float64), as
    transformers' eager attention does. What is not visible contributes nothing, whatever bytes it holds, and a query
    that sees nothing returns zeros.

    Returns:
        The output ``[B, Hq, Q, D]`` and the probabilities ``[B, Hq, Q, S]`` of the slots in the softmax's type. With a
        skipped entry the latter sum up to less than 1: the rest went to the entry.
    """
    B, Hq, Q, D = query.shape
    H, S = keys.shape[1:3]
    grouped = query.reshape(B, H, Hq // H * Q, D)  # the queries of a group see the same keys
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = (grouped @ keys.mT * scaling).view(B, H, Hq // H, Q, S).to(wide)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
        # 0 * NaN is NaN: the value of a slot that nobody sees must not be read.
        values = values.masked_fill(~visible.any(2)[..., None], 0)
    if skipped is not None:
        key, value, bias = skipped.entry()
        extra = (grouped.to(key.dtype) @ key[..., None]).view(B, H, Hq // H, Q, 1) * scaling
        extra = extra + bias[..., None, None, None]
        logits = torch.cat([logits, extra.to(wide)], dim=-1)
    probabilities = logits.softmax(-1)
    if visible is not None:
        sees_nothing = (logits == float("-inf")).all(-1, keepdim=True)
        probabilities = probabilities.masked_fill(sees_nothing, 0.0)  # it is NaN there
    weights = probabilities[..., :S]
    mixed = weights.to(query.dtype).reshape(B, H, Hq // H * Q, S) @ values
    output = mixed.view(B, H, Hq // H, Q, -1)
    if skipped is not None:
        output = output + (probabilities[..., S:] * value[:, :, None, None]).to(output.dtype)
    return output.reshape(B, Hq, Q, -1), weights.reshape(B, Hq, Q, S)
