# SPDX-License-Identifier: Apache-2.0
"""A step of many new tokens: attention, votes, and down to the slots there are.

No matrix larger than a block of queries is made.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.register import accumulate_scores_, truncate
from ..settings import FixedSizeCacheConfig
from . import score_rule
from .attention import QUERY_BLOCK, LogitRule, Skipped, products_of, softmax
from .attention import attend as attend_in_blocks
from .new_tokens import Stage, Visibility
from .slots import FACTS, Slots, Tokens


def attend(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query: Tensor,  # [B, Hq, Q, D]
    rule: LogitRule,
    visibility: Visibility,
    skipped: Skipped | None,
) -> Tensor:
    """The whole step, ``[B, Hq, Q, D]``."""
    output = attend_in_blocks(query, stage.all_keys, stage.all_values, visibility, rule, skipped)

    def add_votes(scores: Tensor, query_weights: Tensor, carry: Tensor) -> None:
        lost = add_column_sums_(scores, query, stage.all_keys, visibility, rule, skipped, query_weights, carry)
        if lost is not None:
            voters = (query_weights > 0).sum(-1).clamp(min=1) * (query.shape[1] // stage.keys.shape[1])
            skipped.lost.copy_(lost / voters[:, None])

    _fold(slots, settings, stage, query.shape[1], add_votes)
    return output


def fold(slots: Slots, settings: FixedSizeCacheConfig, stage: Stage, weights: Tensor) -> None:
    """The step with somebody else's attention weights, ``[B, Hq, Q, T + Q]``."""

    def add_votes(scores: Tensor, query_weights: Tensor, carry: Tensor) -> None:
        accumulate_scores_(scores, weights, query_weights, carry)

    _fold(slots, settings, stage, weights.shape[1], add_votes)


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


def _fold(
    slots: Slots,
    settings: FixedSizeCacheConfig,
    stage: Stage,
    query_heads: int,
    add_votes: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Votes, redundancy, and the tokens that stay into the slots."""
    (B, H, Q), N, T = stage.keys.shape[:3], settings.slots, stage.held
    valid = stage.valid
    new = score_rule.new_tokens(stage.keys, stage.values, valid, slots.seen, slots.spans)
    held = slots.read(T)
    every = Tokens(
        stage.all_keys,
        stage.all_values,
        torch.cat([held.facts, new.facts], dim=3),
        torch.cat([held.positions, new.positions], dim=2),
    )
    valid = torch.ones(B, Q, dtype=torch.bool, device=new.positions.device) if valid is None else valid
    add_votes(every.scores, *score_rule.query_weights(valid, settings.score_decay))
    if settings.redundancy > 0:
        score_rule.raise_redundancy(every, score_rule.unit_keys(stage.keys, new.key_scales), new.positions[:, 0])
    slots.seen += valid.sum(-1, dtype=torch.int32)
    if T + Q > N:
        eviction = score_rule.eviction_scores(every, slots.seen, settings, query_heads // H)
        keys, values, kept = truncate(every.keys, every.values, eviction, N)
        if slots.skipped is not None:
            evicted = (every.positions >= 0).scatter(2, kept, False)
            slots.skipped.add(every.keys, every.values, evicted)
        facts = every.facts.gather(3, kept.expand(FACTS, -1, -1, -1))
        every = Tokens(keys, values, facts, every.positions.gather(2, kept))
    slots.write(0, every)
    slots.empty(N)
