# SPDX-License-Identifier: Apache-2.0
"""Which token goes: the eviction score ``e = (s + p) * w * (1 - rho * r)`` and its order.

``s`` is the decayed sum of the attention that a token received, ``p`` what every token is credited with, ``w`` the norm
of its value, and ``r`` the largest cosine between its key and any newer key seen since. The least goes; from first to
last: empty slots, finite scores, NaN, protected tokens; of equal ones the older. ``docs/eviction.md`` says how much
each part matters.

Sources, and where we deviate:

* ``s``: accumulated attention, H2O (Zhang et al. 2023, arXiv 2306.14048). Ours decays, is one sum for each KV head over
  the query heads of its group, and has ``p`` added. Of the slots a quarter is for recent tokens, there half.
* ``w``: VATP (Guo et al. 2024, arXiv 2406.12335) multiplies attention by the l1 norm of the value, we by the l2 norm.
* ``r``: KeyDiff (Park et al. 2025, arXiv 2504.15364) evicts keys that are close to the mean of all keys, and asks no
  attention. R-KV (Cai et al. 2025, arXiv 2505.24133) takes a mean of cosines off the attention of the last queries,
  once in so many steps. Ours is a factor, not a term, and a maximum that each new key may raise and nothing lowers.
* attention sinks: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) keeps the first tokens and the last ones, nothing
  else. Ours protects both and chooses among the others; small caches protect fewer than four first ones.
"""

import torch
from torch import Tensor

from ..settings import FixedSizeCacheConfig
from .protected_spans import in_spans
from .slots import FACTS, KEY_SCALES, SCORES, VALUE_WEIGHTS, Tokens

COSINE_BLOCK = 256  # new keys compared at a time, so that no [S, S] matrix is made


def query_weights(valid: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """What each query of a call counts and what is left of the old scores.

    A padded query neither votes nor decays, so a chunk scores as its tokens one by one would.

    Args:
        valid: bool ``[B, Q]``, False for padding.
        decay: gamma.

    Returns:
        query weights ``[B, Q]`` (``gamma`` to the number of valid queries that follow, 0 for padding) and carry ``[B]``
        (``gamma`` to the number of valid queries), both float32, for ``torch.ops.fsdc.accumulate_scores_``.
    """
    up_to = valid.cumsum(-1)
    total = up_to[:, -1:]
    weights = torch.where(valid, decay ** (total - up_to).float(), 0.0)
    return weights, decay ** total[:, 0].float()


def new_tokens(
    keys: Tensor,  # [B, H, Q, D]
    values: Tensor,  # [B, H, Q, Dv]
    valid: Tensor | None,  # bool [B, Q], False for padding; None: all
    seen: Tensor,  # int32 [B]
    spans: Tensor | None,  # int32 [B, spans, 2]
) -> Tokens:
    """New tokens before anybody votes: score 0. Padding has position and score of an empty slot; what the user protects
    has all the score there is."""
    B, H, Q = keys.shape[:3]
    positions = seen.clone().view(B, 1)  # not the same memory: it is raised in this step
    if Q > 1 or valid is not None:
        counted = torch.ones(B, Q, dtype=torch.bool, device=keys.device) if valid is None else valid
        positions = positions + counted.cumsum(-1, dtype=torch.int32) - 1
    facts = torch.zeros(FACTS, B, H, Q, dtype=torch.float32, device=keys.device)
    if valid is not None:
        positions = positions.masked_fill(~valid, -1)
        facts[SCORES].masked_fill_(~valid[:, None], float("-inf"))
    if spans is not None:
        facts[SCORES].masked_fill_(in_spans(spans, positions)[:, None], float("inf"))
    facts[VALUE_WEIGHTS] = torch.linalg.vector_norm(values.float(), dim=-1)
    facts[KEY_SCALES] = torch.linalg.vector_norm(keys.float(), dim=-1).clamp_(min=1e-12).reciprocal_()
    return Tokens(keys, values, facts, positions[:, None].expand(B, H, Q))


def eviction_scores(tokens: Tokens, seen: Tensor, settings: FixedSizeCacheConfig, group: int) -> Tensor:
    """The eviction score ``[B, H, S]`` in float32: -inf for empty slots, +inf for protected tokens.

    Args:
        tokens: S of them for each KV head.
        seen: real tokens seen of each row, with the newest of these, int32 ``[B]``.
        settings: the rule.
        group: the number of query heads per KV head, whose attention the scores sum up.
    """
    scores, positions = tokens.scores, tokens.positions
    if settings.policy == "attention":
        weight = tokens.value_weights if settings.value_weight else 1.0
        kept_share = torch.rsub(tokens.redundancy, 1.0, alpha=settings.redundancy)
        free = (scores + settings.score_prior * group) * weight * kept_share
        free = torch.where(scores.abs() < float("inf"), free, scores)
    else:  # streaming: all tie, so the oldest goes
        free = _hash(positions) if settings.policy == "random" else torch.zeros_like(scores)
        free = torch.where(scores == float("inf"), scores, free)
    protected = positions >= (seen - settings.recent_tokens).view(-1, 1, 1)
    if settings.sink_tokens > 0:
        protected |= positions < settings.sink_tokens
    free.masked_fill_(protected, float("inf"))
    return free.masked_fill_(positions < 0, float("-inf"))


def least(eviction: Tensor, positions: Tensor) -> Tensor:
    """The slot that goes first, ``[B, H, 1]`` in int64: of equal scores the smaller position, of empty slots the
    first."""
    order = eviction.double().nan_to_num_(nan=1e300, posinf=float("inf"), neginf=float("-inf"))  # NaN after all finite
    others = order != order.amin(-1, keepdim=True)
    return positions.masked_fill(others, torch.iinfo(torch.int32).max).argmin(-1, keepdim=True)


def unit_keys(keys: Tensor, key_scales: Tensor) -> Tensor:
    """Keys ``[B, H, Q, D]`` scaled to length 1, in float32 whatever their type, as ``decode_attention_`` has them."""
    return keys.float() * key_scales[..., None]


def raise_redundancy(
    tokens: Tokens,  # S of them, the new ones included; their redundancy in place
    units: Tensor,  # [B, H, Q, D], the new keys at length 1
    new_positions: Tensor,  # [B, Q]
) -> None:
    """Raises each token's redundancy to its largest cosine with a newer one of the new keys. Pads change nothing."""
    keys = unit_keys(tokens.keys, tokens.key_scales)
    for start in range(0, units.shape[2], COSINE_BLOCK):
        block = slice(start, start + COSINE_BLOCK)
        cosine = keys @ units[:, :, block].mT  # [B, H, S, block]
        newer = new_positions[:, None, None, block] > tokens.positions[..., None]
        largest = cosine.masked_fill_(~newer, 0.0).amax(-1)
        torch.maximum(tokens.redundancy, largest, out=tokens.redundancy)


def _hash(positions: Tensor) -> Tensor:
    """A number in [0, 1) for each position and KV head, the same every time."""
    heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
    mixed = (positions.long() + 1) * 0x9E3779B1 + heads * 0x85EBCA77
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 15)) >> 8).float() / (1 << 24)
