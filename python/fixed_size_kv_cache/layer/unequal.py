# SPDX-License-Identifier: Apache-2.0
"""A layer whose KV heads hold different numbers of tokens, and what it cannot do.

Steps are the two operators, which are told where each head lies. What needs all heads in one rectangle is refused: the
keys and values of a stock layer, attention of somebody else's, and the steps in plain torch.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..operators.register import chunk_attention_
from ..settings import FixedSizeCacheConfig
from . import chunk, decode, score_rule
from .attention import LogitRule
from .layer import FixedSizeLayer
from .new_tokens import Stage
from .protected_spans import read_spans
from .slots import FACTS, Tokens
from .unequal_slots import UnequalSlots, join_heads, split_heads


class UnequalLayer(FixedSizeLayer):
    """Keeps at most ``heads[h].slots`` tokens of KV head ``h``."""

    def __init__(self, heads: tuple[FixedSizeCacheConfig, ...], protected_spans: Any = None) -> None:
        super().__init__(max(heads, key=lambda head: head.slots))
        smallest = min(heads, key=lambda head: head.slots)
        self.protected_spans = read_spans(protected_spans, smallest, " by the smallest KV head")
        self.heads, self.head_count = heads, len(heads)
        if self.settings.policy != "attention":
            raise ValueError(
                f"cache_size must be the same for all KV heads of a layer with policy={self.settings.policy!r}, which "
                f"is computed in plain torch; got {self._words()}"
            )

    def _words(self) -> str:
        sizes = [head.cache_size for head in self.heads]
        return f"{min(sizes)} to {max(sizes)}"

    def _make_slots(self, keys: Tensor, values: Tensor, at_full_size: bool) -> UnequalSlots:
        if not (decode.is_fused(self.settings, keys.device) and chunk.is_fused(keys.device)):
            raise NotImplementedError(
                f"cache_size must be the same for all KV heads of a layer on {keys.device.type}, where there is no "
                f"operator for others yet; got {self._words()}"
            )
        heads = self.heads[self.heads_here(keys.shape[1])]
        return UnequalSlots(keys, values, heads, self.protected_spans, at_full_size)

    def rows_of(self, H: int, T: int) -> tuple[int, ...]:
        return (sum(min(T, head.slots) for head in self.heads[self.heads_here(H)]),)

    @property
    def positions(self) -> Tensor:
        T = self.tokens_held
        heads = [held.positions[:, 0] for held in self.slots.of_heads(T)]  # [B, slots]
        return torch.stack([pad(x, (0, T - x.shape[1]), value=-1) for x in heads], dim=1)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _stage_many(self, keys: Tensor, values: Tensor) -> Stage:
        T = self.tokens_held + self.tokens_recorded
        return Stage(keys, values, self.slots.hide(keys), self.slots.hide(values), keys.shape[2], T)

    def _attend_many(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        slots, skipped = self.slots, self.slots.skipped
        new = score_rule.new_tokens(stage.keys, stage.values, stage.valid, slots.seen, slots.spans)
        counts, layout, every = self._join(stage.held, _heads_of(new))
        has_pads = slots.may_have_holes or stage.valid is not None
        output = chunk.attend_and_vote(every, self.settings, stage, query, rule, has_pads, skipped, layout)
        slots.seen += stage.queries if stage.valid is None else stage.valid.sum(-1, dtype=torch.int32)
        slots.hold(
            [
                chunk.cut(tokens, slots.seen, head, self.group, None if skipped is None else skipped.of_head(h))
                for h, (tokens, head) in enumerate(zip(split_heads(every, counts), slots.heads, strict=True))
            ]
        )
        return output

    def _attend_recorded(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        recorded, skipped, Q = self.recorded, self.slots.skipped, stage.queries
        keys, values, new = stage.keys, stage.values, stage.new
        if recorded is not None:
            keys, values = torch.cat([recorded.keys, keys], dim=2), torch.cat([recorded.values, values], dim=2)
            new = recorded.new.then(new, keys.shape[0], recorded.tokens, Q, keys.device)
        B, H, R = keys.shape[:3]
        positions = torch.zeros(B, H, R, dtype=torch.int32, device=keys.device)  # of which only the sign is read
        if new.valid is not None:
            positions = positions.masked_fill_(~new.valid[:, None], -1)
        tokens = Tokens(keys, values, keys.new_empty(FACTS, B, H, R, dtype=torch.float32), positions)
        _, layout, every = self._join(self.tokens_held, _heads_of(tokens), R - Q)
        has_pads = self.slots.may_have_holes or new.valid is not None
        entry = {} if skipped is None else skipped.as_arguments()
        return chunk_attention_(
            query,
            every.keys,
            every.values,
            scaling=rule.scaling,
            positions=every.positions if has_pads else None,
            sees=stage.new.sees,
            softcap=rule.softcap,
            sinks=rule.sinks,
            head_layout=layout,
            **{name: x for name, x in entry.items() if name != "lost"},
        )

    def _join(self, T: int, new: list[Tokens], recorded: int = 0) -> tuple[list[int], Tensor, Tokens]:
        """What each head holds and its new tokens ``[B, 1, R, ...]`` behind it: how many they are, the layout for
        ``chunk_attention_``, which holds the first ``recorded`` of them too, and the tokens ``[B, rows, ...]``."""
        every, counts, layout, first = [], [], [], 0
        for held, tokens in zip(self.slots.order(T), new, strict=True):
            every += [held, tokens]
            counts.append(held.positions.shape[2] + tokens.positions.shape[2])
            layout.append((first, held.positions.shape[2] + recorded))
            first += counts[-1]
        layout = torch.tensor(layout, dtype=torch.int32)  # on the CPU
        return counts, layout, join_heads(every)

    # ---- what it cannot do -------------------------------------------------------------------------------------------

    def stage_of(self, who: str) -> Stage:
        if who != "attend":  # cache_truncate, fold and attention_weights
            _refuse(who, "which has the attention weights of all heads in one rectangle")
        return super().stage_of(who)

    def held(self) -> NoReturn:
        _refuse("key_cache and value_cache", "which show all heads in one rectangle; get_positions() says what is held")

    def _rectangle(self, what: str) -> NoReturn:
        _refuse(what, "which show all heads in one rectangle; get_positions() says what is held")


def _refuse(what: str, why: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}: all KV heads of a layer must have the same cache_size here, {why}; got heads of different sizes"
    )


def _heads_of(tokens: Tokens) -> list[Tokens]:
    """Those of each KV head of ``[B, H, S, ...]``, as views ``[B, 1, S, ...]``."""
    keys, values, facts, positions = tokens
    return [
        Tokens(keys[:, h : h + 1], values[:, h : h + 1], facts[:, :, h : h + 1], positions[:, h : h + 1])
        for h in range(keys.shape[1])
    ]
