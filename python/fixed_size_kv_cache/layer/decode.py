# SPDX-License-Identifier: Apache-2.0
"""A step of one new token: attention, votes, and the token in the place of the one that goes.

Shapes and addresses are those of the step before, and nothing waits for the device.
"""

import torch
from torch import Tensor

from ..operators.register import accumulate_scores_
from ..settings import FixedSizeCacheConfig
from . import score_rule
from .attention import LogitRule, Skipped, attend_with_weights
from .new_tokens import Stage
from .slots import SCORES, Slots, Tokens


def attend(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,  # [B, Hq, 1, D]
    rule: LogitRule,
    skipped: Skipped | None,
) -> Tensor:
    """The whole step in plain torch, ``[B, Hq, 1, D]``: what every other path is held to."""
    (B, H, _, D), T = stage.keys.shape, stage.held
    token = new_token(slots, stage)
    write_new(slots, T, token)
    # The new key is one more query: its products with the keys say how alike they are.
    unit_key = score_rule.unit_keys(stage.keys, token.key_scales)
    products = (
        torch.cat([rule.scaled(query).reshape(B, H, -1, D), unit_key], dim=2) @ stage.all_keys.mT
    )  # [B, H, G + 1, T + 1]
    visible = None
    if torch.compiler.is_compiling() or stage.valid is not None or slots.may_have_holes:
        visible = slots.read(T + 1).positions[:, :, None] >= 0
        visible = visible if stage.valid is None else visible & stage.valid[:, None, None]
    output, weights, lost = attend_with_weights(query, products[:, :, :-1], stage.all_values, visible, rule, skipped)
    if lost is not None:
        skipped.lost.copy_(lost.view(B, H, -1).mean(-1))
    _fold(slots, settings, stage, token, weights, products[:, :, -1])
    return output


def fold(slots: Slots, settings: FixedSizeCacheConfig, stage: Stage, weights: Tensor) -> None:
    """The step with somebody else's attention weights, ``[B, Hq, 1, T + 1]``."""
    token = new_token(slots, stage)
    write_new(slots, stage.held, token)
    likeness = score_rule.unit_keys(stage.keys, token.key_scales) @ stage.all_keys.mT
    _fold(slots, settings, stage, token, weights, likeness[:, :, 0])


def new_token(slots: Slots, stage: Stage) -> Tokens:
    """The one new token, before anybody votes."""
    return score_rule.new_tokens(stage.keys, stage.values, stage.valid, slots.seen, slots.spans)


def write_new(slots: Slots, T: int, token: Tokens) -> None:
    """What is known of the new token, into the slot where ``update`` has put it."""
    at = slots.read(T + 1)
    at.facts[..., T:] = token.facts
    at.positions[..., T:] = token.positions


def _fold(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    token: Tokens,
    weights: Tensor,  # [B, Hq, 1, T + 1]
    likeness: Tensor,  # [B, H, T + 1]: products of the keys with the new one, scaled to length 1
) -> None:
    valid, T = stage.valid, stage.held
    in_use = slots.read(T + 1)
    if valid is None:
        votes = None, torch.full_like(slots.seen, settings.score_decay, dtype=torch.float32)
    else:
        votes = score_rule.query_weights(valid, settings.score_decay)
    accumulate_scores_(in_use.scores, weights, *votes)
    if settings.redundancy > 0:
        cosine = likeness[..., :T] * in_use.key_scales[..., :T]
        cosine = cosine if valid is None else cosine.masked_fill_(~valid[:, None], 0.0)
        in_use.redundancy[..., :T].clamp_(min=cosine.float())  # of the older tokens; pads change nothing
    slots.seen += 1 if valid is None else valid.sum(-1, dtype=torch.int32)
    if settings.slots == T:
        _evict(slots, settings, token, group=weights.shape[1] // token.positions.shape[1])


def _evict(slots: Slots, settings: FixedSizeCacheConfig, token: Tokens, group: int) -> None:
    """Moves the token of slot N onto the slot of the one that goes, an empty slot first."""
    N, all_slots = settings.slots, slots.tokens
    eviction = score_rule.eviction_scores(all_slots, slots.seen, settings, group)
    victim = score_rule.least(eviction, all_slots.positions)  # [B, H, 1]
    after = token.facts.clone()
    after[SCORES] = all_slots.scores[..., N:]  # with the votes of this step; its redundancy is 0
    evicted = slots.overwrite(victim, token._replace(facts=after))
    if slots.skipped is not None:
        slots.skipped.add(evicted.keys, evicted.values, evicted.positions >= 0)
    slots.empty(N)
