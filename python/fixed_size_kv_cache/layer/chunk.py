# SPDX-License-Identifier: Apache-2.0
"""A step of many new tokens: attention, votes, and down to the slots there are.

No matrix larger than a block of queries is made.
"""

import torch
from torch import Tensor

from ..operators.register import DEVICES, accumulate_scores_, chunk_attention_, truncate
from ..settings import FixedSizeCacheConfig
from . import score_rule
from .attention import QUERY_BLOCK, LogitRule, Skipped, products_of, softmax
from .attention import attend as attend_in_blocks
from .new_tokens import Stage, Visibility
from .slots import FACTS, Slots, Tokens


def is_fused(device: torch.device) -> bool:
    """Whether steps are one call of ``chunk_attention_``: wherever there is a kernel of it."""
    return device.type in DEVICES


def attend(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,  # [B, Hq, Q, D]
    rule: LogitRule,
    visibility: Visibility,
    skipped: Skipped | None,
) -> Tensor:
    """The whole step, ``[B, Hq, Q, Dv]``."""
    step = attend_fused if is_fused(query.device) else attend_plain
    return step(slots, settings, stage, query, rule, visibility, skipped)


def attend_fused(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,
    rule: LogitRule,
    visibility: Visibility,
    skipped: Skipped | None,
) -> Tensor:
    """:func:`attend` by ``torch.ops.fsdc.chunk_attention_``, in one pass over the logits."""
    every = join(slots, stage)
    output = attend_and_vote(every, settings, stage, query, rule, visibility.has_pads, skipped)
    keep(slots, settings, stage, every, query.shape[1])
    return output


def attend_and_vote(
    every: Tokens,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,
    rule: LogitRule,
    has_pads: bool,
    skipped: Skipped | None,
    head_layout: Tensor | None = None,
) -> Tensor:
    """The attention of new tokens to all, and their votes; what is held comes before them in ``every``, in a rectangle
    or as ``head_layout`` says."""
    weights, carry = score_rule.query_weights(stage.valid_or_all(), settings.score_decay)
    return chunk_attention_(
        query,
        every.keys,
        every.values,
        scaling=rule.scaling,
        facts=every.facts,
        positions=every.positions if has_pads else None,
        query_weights=weights,
        carry=carry,
        redundancy=settings.redundancy > 0,
        sees=stage.new.sees,
        softcap=rule.softcap,
        sinks=rule.sinks,
        head_layout=head_layout,
        **({} if skipped is None else skipped.as_arguments()),
    )


def attend_plain(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,
    rule: LogitRule,
    visibility: Visibility,
    skipped: Skipped | None,
) -> Tensor:
    """:func:`attend` in plain torch, which knows the logits twice: once for the output, once for the votes."""
    output = attend_in_blocks(query, stage.all_keys, stage.all_values, visibility, rule, skipped)
    every = join(slots, stage)
    weights, carry = score_rule.query_weights(stage.valid_or_all(), settings.score_decay)
    lost = add_column_sums_(every.scores, query, stage.all_keys, visibility, rule, skipped, weights, carry)
    if lost is not None:
        voters = (weights > 0).sum(-1).clamp(min=1) * (query.shape[1] // stage.keys.shape[1])
        skipped.lost.copy_(lost / voters[:, None])
    raise_redundancy(settings, stage, every)
    keep(slots, settings, stage, every, query.shape[1])
    return output


def fold(slots: Slots, settings: FixedSizeCacheConfig, stage: Stage, weights: Tensor) -> None:
    """The step with somebody else's attention weights, ``[B, Hq, Q, T + Q]``."""
    every = join(slots, stage)
    accumulate_scores_(every.scores, weights, *score_rule.query_weights(stage.valid_or_all(), settings.score_decay))
    raise_redundancy(settings, stage, every)
    keep(slots, settings, stage, every, weights.shape[1])


def join(slots: Slots, stage: Stage) -> Tokens:
    """What is held and the new tokens, before anybody votes."""
    new = score_rule.new_tokens(stage.keys, stage.values, stage.valid, slots.seen, slots.spans)
    held = slots.read(stage.held)
    return Tokens(
        stage.all_keys,
        stage.all_values,
        torch.cat([held.facts, new.facts], dim=3),
        torch.cat([held.positions, new.positions], dim=2),
    )


def raise_redundancy(settings: FixedSizeCacheConfig, stage: Stage, every: Tokens) -> None:
    """Of all tokens, by the new ones."""
    if settings.redundancy > 0:
        units = score_rule.unit_keys(stage.keys, every.key_scales[..., stage.held :])
        score_rule.raise_redundancy(every, units, every.positions[:, 0, stage.held :])


def keep(slots: Slots, settings: FixedSizeCacheConfig, stage: Stage, every: Tokens, query_heads: int) -> None:
    """Puts those that stay into the slots."""
    slots.seen += stage.queries if stage.valid is None else stage.valid.sum(-1, dtype=torch.int32)
    slots.hold(cut(every, slots.seen, settings, query_heads // every.positions.shape[1], slots.skipped))


def cut(every: Tokens, seen: Tensor, settings: FixedSizeCacheConfig, group: int, skipped: Skipped | None) -> Tokens:
    """The tokens that stay; the others are added to the entry of the evicted ones."""
    N = settings.slots
    if every.positions.shape[2] <= N:
        return every
    keys, values, kept = truncate(every.keys, every.values, score_rule.eviction_scores(every, seen, settings, group), N)
    if skipped is not None:
        evicted = (every.positions >= 0).scatter(2, kept, False)
        skipped.add(every.keys, every.values, evicted)
    return Tokens(keys, values, every.facts.gather(3, kept.expand(FACTS, -1, -1, -1)), every.positions.gather(2, kept))


def add_column_sums_(
    scores: Tensor,  # [B, H, T + Q] float32, in place
    query: Tensor,  # [B, Hq, Q, D]
    keys: Tensor,  # [B, H, T + Q, D]
    visibility: Visibility,
    rule: LogitRule,
    skipped: Skipped | None,
    query_weights: Tensor,  # [B, Q] float32
    carry: Tensor,  # [B] float32
) -> Tensor | None:
    """Adds the attention of the queries to the scores of their KV head, see ``accumulate_scores_``.

    Returns:
        The attention that went to the entry of the evicted tokens, ``[B, H]``, summed over queries and group; None
        without an entry.
    """
    (B, Hq, Q), H = query.shape[:3], keys.shape[1]
    lost = None
    for start in range(0, Q, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, Q)
        columns, visible = visibility.of_block(start, stop, keys.device)
        block = query[:, :, start:stop]
        products = products_of(block, keys[:, :, :columns], rule).view(B, H, Hq // H, stop - start, columns)
        weights, to_entry = softmax(products, block, visible, rule, skipped)
        accumulate_scores_(
            scores[:, :, :columns],
            weights.reshape(B, Hq, stop - start, columns),
            query_weights[:, start:stop],
            carry if start == 0 else None,  # columns beyond the first block's are new tokens: nothing to decay
        )
        if to_entry is not None:
            votes = query_weights[:, None, None, start:stop, None] > 0
            lost = (0.0 if lost is None else lost) + torch.where(votes, to_entry, 0.0).sum((2, 3, 4))
    return lost
