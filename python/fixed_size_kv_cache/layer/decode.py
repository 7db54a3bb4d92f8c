# SPDX-License-Identifier: Apache-2.0
"""A step of one new token: attention, votes, and the token in the place of the one that goes.

Shapes and addresses are those of the step before, and nothing waits for the device.
"""

import torch
from torch import Tensor

from ..operators.register import DEVICES, accumulate_scores_, decode_attention_
from ..settings import FixedSizeCacheConfig
from . import score_rule
from .attention import LogitRule, attend_with_weights, products_of
from .new_tokens import Stage
from .protected_spans import in_spans
from .slots import SCORES, Slots, Tokens


def is_fused(settings: FixedSizeCacheConfig, device: torch.device) -> bool:
    """Whether steps are one call of ``decode_attention_``: not for the baselines."""
    return settings.policy == "attention" and device.type in DEVICES


def attend(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,  # [B, Hq, 1, D]
    rule: LogitRule,
) -> Tensor:
    """The whole step, ``[B, Hq, 1, Dv]``."""
    step = attend_fused if is_fused(settings, query.device) else attend_plain
    return step(slots, settings, stage, query, rule)


def attend_fused(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,
    rule: LogitRule,
) -> Tensor:
    """:func:`attend` by ``torch.ops.fsdc.decode_attention_``, to which an empty entry is no entry."""
    length = stage.held if stage.length is None else stage.length
    entry = {} if slots.skipped is None else slots.skipped.as_arguments()
    output = decode_attention_(
        query,
        stage.keys,
        stage.values,
        *slots.tokens,
        slots.seen,
        length,
        scaling=rule.scaling,
        decay=settings.score_decay,
        prior=settings.score_prior,
        redundancy=settings.redundancy,
        value_weight=settings.value_weight,
        sink_tokens=settings.sink_tokens,
        recent_tokens=settings.recent_tokens,
        softcap=rule.softcap,
        sinks=rule.sinks,
        valid=None if stage.valid is None else stage.valid[:, 0],
        protected=None if slots.spans is None else in_spans(slots.spans, slots.seen[:, None])[:, 0],
        head_layout=slots.layout,
        **entry,
    )
    if slots.least <= length:
        slots.is_ordered = False
    return output


def attend_plain(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,  # [B, Hq, 1, D]
    rule: LogitRule,
) -> Tensor:
    """:func:`attend` in plain torch: what the operator is held to, and the only way of the baselines."""
    (B, H), T = stage.keys.shape[:2], stage.held
    token = new_token(slots, stage)
    write_new(slots, T, token)
    products = products_of(query, stage.all_keys, rule)  # [B, H, G, T + 1]
    visible = None
    if torch.compiler.is_compiling() or stage.valid is not None or slots.may_have_holes:
        visible = slots.read(T + 1).positions[:, :, None] >= 0
        visible = visible if stage.valid is None else visible & stage.valid[:, None, None]
    skipped = slots.skipped  # an empty entry is no entry
    output, weights, lost = attend_with_weights(query, products, stage.all_values, visible, rule, skipped)
    if lost is not None:
        skipped.lost.copy_(lost.view(B, H, -1).mean(-1))
    _fold(slots, settings, stage, token, weights)
    return output


def fold(slots: Slots, settings: FixedSizeCacheConfig, stage: Stage, weights: Tensor) -> None:
    """The step with somebody else's attention weights, ``[B, Hq, 1, T + 1]``."""
    token = new_token(slots, stage)
    write_new(slots, stage.held, token)
    _fold(slots, settings, stage, token, weights)


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
) -> None:
    valid, T = stage.valid, stage.held
    in_use = slots.read(T + 1)
    if valid is None:
        votes = None, torch.full_like(slots.seen, settings.score_decay, dtype=torch.float32)
    else:
        votes = score_rule.query_weights(valid, settings.score_decay)
    accumulate_scores_(in_use.scores, weights, *votes)
    if settings.redundancy > 0:
        older = slots.read(T)
        unit_key = score_rule.unit_keys(stage.keys, token.key_scales)
        cosine = (older.keys.float() @ unit_key.mT)[..., 0] * older.key_scales  # [B, H, T]
        cosine = cosine if valid is None else cosine.masked_fill_(~valid[:, None], 0.0)
        older.redundancy.clamp_(min=cosine)  # pads change nothing
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
