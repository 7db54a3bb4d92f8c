# SPDX-License-Identifier: Apache-2.0
"""Caches of a fixed size simulated in plain torch, so that one reading of a text serves many rules.

:func:`read` is a step of the product's cache without its eviction: queries see what is held and the new tokens, and
votes are added. :func:`cut` is the eviction. Of a text that is read in one piece all rules are cut from the same
reading, because nothing was evicted before; heads may have different sizes. ``tests/python/test_simulator.py`` holds
the positions that stay to those of the product's cache.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from fixed_size_kv_cache.compat.capability import text_config
from fixed_size_kv_cache.compat.transformers import set_implementation
from fixed_size_kv_cache.layer import score_rule
from fixed_size_kv_cache.layer.attention import QUERY_BLOCK, LogitRule, attend_with_weights, products_of
from fixed_size_kv_cache.layer.slots import FACTS, KEY_SCALES, REDUNDANCY, SCORES, VALUE_WEIGHTS, Tokens
from fixed_size_kv_cache.operators.register import truncate
from fixed_size_kv_cache.settings import FixedSizeCacheConfig

NAME = "fsdc_simulated"  # of the attention, as configs have it


class Vote(NamedTuple):
    """How the attention that a token receives is summed up: ``s <- decay * s + a``, or ``max(decay * s, a)``."""

    kind: str  # "sum" or "max"
    decay: float


@dataclass(frozen=True)
class Held:
    """What one layer holds. Slots of the layer's smaller heads are empty at the end."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, D]
    positions: Tensor  # int32 [B, H, T], ascending; -1: empty
    redundancy: Tensor  # float32 [B, H, T]
    votes: dict[Vote, Tensor]  # float32 [B, H, T] of each
    seen: int


class _Step:
    """One forward of a model on simulated layers."""

    def __init__(self, held: Sequence[Held], votes: Sequence[Vote], redundancy: bool, sees: Tensor | None) -> None:
        self.held, self.votes, self.redundancy, self.sees = held, votes, redundancy, sees
        self.after: list[Held] = []

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: LogitRule) -> Tensor:
        """``[B, Hq, Q, D]``. With votes the layer after the step is kept; without, this was a probe."""
        held = self.held[layer] if self.held else _nothing(keys, values, self.votes)
        joined = replace(held, keys=torch.cat([held.keys, keys], 2), values=torch.cat([held.values, values], 2))
        return (self._read if self.votes else self._probe)(query, joined, rule)

    def _probe(self, query: Tensor, joined: Held, rule: LogitRule) -> Tensor:
        Q, T = query.shape[2], joined.positions.shape[2]
        sees = torch.ones(Q, Q, dtype=torch.bool).tril() if self.sees is None else self.sees
        of_held = (joined.positions >= 0)[:, :, None].expand(-1, -1, Q, T)
        visible = torch.cat([of_held, sees.expand(*of_held.shape[:2], Q, Q)], dim=-1)
        return attend_with_weights(query, products_of(query, joined.keys, rule), joined.values, visible, rule)[0]

    def _read(self, query: Tensor, joined: Held, rule: LogitRule) -> Tensor:
        (B, Hq, Q), H = query.shape[:3], joined.keys.shape[1]
        T = joined.positions.shape[2]
        empty = joined.positions < 0
        has_empty = bool(empty.any())
        new = torch.zeros(B, H, Q)
        votes = {vote: torch.cat([joined.votes[vote] * vote.decay**Q, new], dim=2) for vote in self.votes}
        outputs = []
        for start in range(0, Q, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, Q)
            columns, count = T + stop, stop - start
            block = query[:, :, start:stop]
            logits = rule.logits(products_of(block, joined.keys[:, :, :columns], rule))
            logits = logits.view(B, H, Hq // H, count, columns)
            future = torch.ones(count, count, dtype=torch.bool).triu(1)
            logits[..., T + start :].masked_fill_(future, float("-inf"))
            if has_empty:
                logits[..., :T].masked_fill_(empty[:, :, None, None], float("-inf"))
            weights = logits.softmax(-1)
            outputs.append((weights.view(B, H, -1, columns) @ joined.values[:, :, :columns]).view(B, Hq, count, -1))
            self._add(votes, weights.sum(2).float(), Q - 1 - torch.arange(start, stop))
        positions = torch.arange(joined.seen, joined.seen + Q, dtype=torch.int32).expand(B, H, Q)
        tokens = replace(
            joined,
            positions=torch.cat([joined.positions, positions], dim=2),
            redundancy=torch.cat([joined.redundancy, new], dim=2),
            votes=votes,
            seen=joined.seen + Q,
        )
        if self.redundancy:
            _raise_redundancy(tokens, Q)
        self.after.append(tokens)
        return torch.cat(outputs, dim=2)

    def _add(self, votes: dict[Vote, Tensor], received: Tensor, ages: Tensor) -> None:
        """Adds what a block of queries votes, ``[B, H, block, columns]``; ``ages``: queries that follow each."""
        columns = received.shape[-1]
        sums = [vote for vote in votes if vote.kind == "sum"]
        if sums:
            weights = torch.stack([torch.tensor(vote.decay) ** ages for vote in sums])  # [sums, block]
            added = weights @ received  # [B, H, sums, columns]
            for at, vote in enumerate(sums):
                votes[vote][:, :, :columns] += added[:, :, at]
        for vote, total in votes.items():
            if vote.kind == "max":
                largest = (received * (torch.tensor(vote.decay) ** ages)[:, None]).amax(2)
                torch.maximum(total[:, :, :columns], largest, out=total[:, :, :columns])


_running: _Step | None = None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, for models whose layers all see the whole text."""
    if kwargs.get("sliding_window") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            f"the simulator knows neither windows nor attention sinks; got {type(module).__name__}"
        )
    rule = LogitRule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    output = _running.attend(module.layer_idx, query, key, value, rule)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **kwargs: None)


@contextlib.contextmanager
def simulated(model: Any) -> Iterator[None]:
    """The model's attention is the simulator's inside the block."""
    config = text_config(model.config)
    before = config._attn_implementation
    set_implementation(config, NAME)
    try:
        yield
    finally:
        set_implementation(config, before)


@torch.no_grad()
def read(
    model: Any,
    ids: Tensor,  # [B, Q]
    held: Sequence[Held] = (),
    votes: Sequence[Vote] = (),
    *,
    redundancy: bool = True,
    sees: Tensor | None = None,  # bool [Q, Q]: which new tokens see which; None: all earlier ones
    position_ids: Tensor | None = None,  # [Q]; None: those that follow
    logits: int | Tensor = 1,
) -> tuple[Tensor, list[Held]]:
    """Reads tokens on top of what layers hold; inside ``simulated(model)``.

    Returns:
        the logits of the last ``logits`` tokens, or of those, ``[B, n, vocabulary]``, and the layers with the new
        tokens, before any eviction. Without ``votes`` no layers: a probe, after which everything is as before.
    """
    global _running
    if position_ids is None:
        start = held[0].seen if held else 0
        position_ids = torch.arange(start, start + ids.shape[1])
    _running = step = _Step(held, votes, redundancy, sees)
    try:
        rows = position_ids.expand(ids.shape)
        found = model(ids, position_ids=rows, use_cache=False, logits_to_keep=logits).logits
    finally:
        _running = None
    return found, step.after


def cut(held: Held, scores: Tensor, settings: Sequence[FixedSizeCacheConfig], group: int) -> Held:
    """What stays of a layer, by the product's own score rule and operator.

    Args:
        held: the layer.
        scores: s of each token, float32 ``[B, H, T]``.
        settings: the rule of each KV head, with the head's own size.
        group: query heads per KV head.
    """
    H, T = held.positions.shape[1:]
    sizes = [each.slots for each in settings]
    if min(sizes) >= T:
        return held
    widest = min(max(sizes), T)
    facts = torch.zeros(FACTS, *scores.shape)
    facts[SCORES] = scores.masked_fill(held.positions < 0, float("-inf"))
    facts[VALUE_WEIGHTS] = torch.linalg.vector_norm(held.values.float(), dim=-1)
    facts[REDUNDANCY] = held.redundancy
    kept = torch.empty(*scores.shape[:2], widest, dtype=torch.int64)
    positions = torch.full(kept.shape, -1, dtype=torch.int32)
    seen = torch.full((scores.shape[0],), held.seen, dtype=torch.int32)
    for size in sorted(set(sizes)):
        heads = [h for h in range(H) if sizes[h] == size]
        of_heads = Tokens(held.keys[:, heads], held.values[:, heads], facts[:, :, heads], held.positions[:, heads])
        if size >= T:
            indices = torch.arange(T).expand(*of_heads.positions.shape)
        else:
            eviction = score_rule.eviction_scores(of_heads, seen, settings[heads[0]], group)
            indices = truncate(of_heads.keys, of_heads.values, eviction, size)[2]
        count = indices.shape[2]
        kept[:, heads, :count], kept[:, heads, count:] = indices, 0
        positions[:, heads, :count] = of_heads.positions.gather(2, indices)
    wide = kept[..., None].expand(-1, -1, -1, held.keys.shape[3])
    return Held(
        held.keys.gather(2, wide),
        held.values.gather(2, wide),
        positions,
        held.redundancy.gather(2, kept),
        {vote: total.gather(2, kept) for vote, total in held.votes.items()},
        held.seen,
    )


def _nothing(keys: Tensor, values: Tensor, votes: Sequence[Vote]) -> Held:
    none = torch.zeros(*keys.shape[:2], 0)
    return Held(keys[:, :, :0], values[:, :, :0], none.int(), none, dict.fromkeys(votes, none), 0)


def _raise_redundancy(tokens: Held, Q: int) -> None:
    """By the last ``Q`` tokens, which are new."""
    scales = torch.linalg.vector_norm(tokens.keys.float(), dim=-1).clamp_(min=1e-12).reciprocal_()
    facts = torch.zeros(FACTS, *scales.shape)
    facts[REDUNDANCY], facts[KEY_SCALES] = tokens.redundancy, scales
    every = Tokens(tokens.keys, tokens.values, facts, tokens.positions)
    units = score_rule.unit_keys(tokens.keys[:, :, -Q:], scales[..., -Q:])
    score_rule.raise_redundancy(every, units, tokens.positions[:, 0, -Q:])
    tokens.redundancy.copy_(facts[REDUNDANCY])
