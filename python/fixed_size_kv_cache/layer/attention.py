# SPDX-License-Identifier: Apache-2.0
"""Attention in plain torch, with the probabilities that scores are made of.

Two functions: :func:`attend_with_weights` for the one query of a decode step, and :func:`attend` for many queries,
whose votes :mod:`fixed_size_kv_cache.layer.chunk` computes apart.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .new_tokens import Visibility

QUERY_BLOCK = 128  # queries at a time, so that no [S, S] matrix is made


class LogitRule(NamedTuple):
    """What a model makes of ``q @ k``: ``softcap * tanh(scaling * q @ k / softcap)``, and a logit that takes part."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None  # [Hq]: in the denominator of the softmax, without a value and without a vote

    def scaled(self, query: Tensor) -> Tensor:
        """Queries are scaled before the product with the keys: afterwards float16 may have overflown."""
        return query * self.scaling

    def logits(self, products: Tensor) -> Tensor:
        """Of scaled queries with keys."""
        return products if self.softcap is None else (products / self.softcap).tanh() * self.softcap


class Skipped(NamedTuple):
    """The entry of the evicted tokens: sums in float32, float64 for float64."""

    keys: Tensor  # [B, H, D], their sum
    values: Tensor  # [B, H, Dv], their sum
    count: Tensor  # [B, H] int32, how many
    lost: Tensor  # [B, H] float32, the share of the last step's attention that went to them
    mode: str  # "mean" or "sum"

    def entry(self) -> tuple[Tensor, Tensor, Tensor]:
        """Key ``[B, H, D]``, value ``[B, H, D]`` and what is added to the logit ``[B, H]``, -inf for none."""
        count = self.count.to(self.keys.dtype)
        if self.mode == "sum":
            return self.keys, self.values, torch.where(self.count > 0, 0.0, float("-inf")).to(self.keys.dtype)
        n = count.clamp(min=1)[..., None]
        return self.keys / n, self.values / n, count.log()

    def of_head(self, h: int) -> "Skipped":
        """That of one KV head, as views ``[B, 1, ...]``."""
        return Skipped(*(x[:, h : h + 1] for x in self[:-1]), self.mode)

    def as_arguments(self) -> dict[str, Tensor | bool]:
        """As ``decode_attention_`` and ``chunk_attention_`` take it."""
        return {
            "skipped_keys": self.keys,
            "skipped_values": self.values,
            "skipped_count": self.count,
            "lost": self.lost,
            "skipped_mean": self.mode == "mean",
        }

    def add(self, keys: Tensor, values: Tensor, evicted: Tensor) -> None:
        """Adds the tokens ``[B, H, S, D]`` where ``evicted`` ``[B, H, S]`` says so."""
        for total, rows in ((self.keys, keys), (self.values, values)):
            total += torch.where(evicted[..., None], rows.to(total.dtype), 0).sum(2)
        self.count.add_(evicted.sum(-1, dtype=torch.int32))


def softmax(
    products: Tensor,  # [B, H, G, Q, S], of scaled queries with the keys
    query: Tensor,  # [B, Hq, Q, D]
    visible: Tensor | None,  # bool, broadcast to [B, H, Q, S]
    rule: LogitRule,
    skipped: Skipped | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the slots ``[B, H, G, Q, S]``, and of the entry of the evicted tokens ``[B, H, G, Q, 1]``.

    Taken in float32 (float64 for float64), as transformers' eager attention does. A query that sees nothing gets zeros.
    With sinks or an entry the slots' probabilities sum up to less than 1.
    """
    S = products.shape[-1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = rule.logits(products)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    if skipped is not None:
        key, _, bias = skipped.entry()
        grouped = rule.scaled(query.to(key.dtype)).reshape(*products.shape[:4], -1)
        extra = rule.logits(grouped @ key[:, :, None, :, None]) + bias[..., None, None, None]
        if visible is not None:  # a query that sees nothing is padding
            extra = extra.masked_fill(~visible.any(-1, keepdim=True)[:, :, None], float("-inf"))
        logits = torch.cat([logits.to(wide), extra.to(wide)], dim=-1)
    if rule.sinks is not None:
        B, H, G, Q = logits.shape[:4]
        sinks = rule.sinks.to(wide).view(1, H, G, 1, 1).expand(B, H, G, Q, 1)
        logits = torch.cat([logits.to(wide), sinks], dim=-1)
    probabilities = logits.softmax(-1, dtype=wide)
    if visible is not None and rule.sinks is None:
        sees_nothing = logits.amax(-1, keepdim=True) == float("-inf")
        probabilities = probabilities.masked_fill(sees_nothing, 0.0)  # it is NaN there
    if probabilities.shape[-1] == S:
        return probabilities, None
    return probabilities[..., :S], None if skipped is None else probabilities[..., S : S + 1]


def attend_with_weights(
    query: Tensor,  # [B, Hq, Q, D]
    products: Tensor,  # [B, H, G * Q, S], of scaled queries with the keys
    values: Tensor,  # [B, H, S, D]
    visible: Tensor | None,  # bool, broadcast to [B, H, Q, S]
    rule: LogitRule,
    skipped: Skipped | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of grouped query heads, given their products with the keys.

    What is not visible contributes nothing, whatever bytes it holds.

    Returns:
        The output ``[B, Hq, Q, D]``, the probabilities of the slots ``[B, Hq, Q, S]`` in the softmax's type, and the
        share of the evicted tokens' entry ``[B, Hq, Q]``, None without one.
    """
    (B, Hq, Q), (H, S) = query.shape[:3], values.shape[1:3]
    weights, lost = softmax(products.view(B, H, Hq // H, Q, S), query, visible, rule, skipped)
    if visible is not None:
        # 0 * NaN is NaN: the value of a slot that nobody sees must not be read.
        values = values.masked_fill(~visible.any(2)[..., None], 0)
    output = (weights.to(query.dtype).reshape(B, H, -1, S) @ values).view(B, Hq, Q, -1)
    if lost is not None:
        value = skipped.entry()[1]
        output = output + (lost * value[:, :, None, None]).to(output.dtype).view(output.shape)
        lost = lost.reshape(B, Hq, Q)
    return output, weights.reshape(B, Hq, Q, S), lost


def products_of(query: Tensor, keys: Tensor, rule: LogitRule) -> Tensor:
    """Of scaled query heads ``[B, Hq, Q, D]`` with the keys ``[B, H, S, D]`` of their group, ``[B, H, GQ, S]``."""
    B, H, D = keys.shape[0], keys.shape[1], keys.shape[3]
    return rule.scaled(query).reshape(B, H, -1, D) @ keys.mT


def attend(
    query: Tensor,  # [B, Hq, Q, D]
    keys: Tensor,  # [B, H, T + Q, D]
    values: Tensor,  # [B, H, T + Q, D]
    visibility: Visibility,
    rule: LogitRule,
    skipped: Skipped | None = None,
) -> Tensor:
    """Attention of many queries, ``[B, Hq, Q, D]``: PyTorch's own, but where that knows neither softcap, nor sinks, nor
    the entry of the evicted tokens. In blocks of queries, so that neither masks nor weights grow with ``Q * S``."""
    plain = rule.softcap is None and rule.sinks is None and skipped is None
    if plain and visibility.is_causal():
        return scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=rule.scaling, enable_gqa=query.shape[1] != keys.shape[1]
        )
    outputs = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, query.shape[2])
        columns, visible = visibility.of_block(start, stop, keys.device)
        block = query[:, :, start:stop], keys[:, :, :columns], values[:, :, :columns]
        if plain:
            outputs.append(_attend_as_torch_does(*block, visible, rule.scaling, visibility.has_pads))
        else:
            products = products_of(*block[:2], rule)
            outputs.append(attend_with_weights(block[0], products, block[2], visible, rule, skipped)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend_as_torch_does(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scaling: float, has_pads: bool
) -> Tensor:
    Hq, H = query.shape[1], keys.shape[1]
    if visible is not None and has_pads:
        seen = visible.any(2)[..., None]  # a NaN in a slot that nobody sees must not be read
        keys, values = keys.masked_fill(~seen, 0), values.masked_fill(~seen, 0)
    mask = visible if visible is None or visible.shape[1] == 1 else visible.repeat_interleave(Hq // H, dim=1)
    output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=Hq != H)
    if mask is not None and has_pads:
        output = output.masked_fill(~mask.any(-1)[..., None], 0)  # a query that sees nothing
    return output
