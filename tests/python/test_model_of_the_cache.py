# SPDX-License-Identifier: Apache-2.0
"""Random scripts of operations against a slow model of the cache: dictionaries of tokens, one for each row and head.

The model does not know how slots are kept. It is told keys, values, queries and who is padding, computes attention
token by token in float64, and evicts by the rule as it is written down.
"""

import copy
import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.layer.attention import LogitRule

H, G, D, SCALE, TIE = 2, 2, 4, 0.7, 1e-4


class Token:
    """A key, a value and what is known of them."""

    def __init__(self, position: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.position, self.key, self.value = position, key, value
        self.score, self.redundancy = 0.0, 0.0


class Row:
    """One batch row: tokens by position, for each KV head."""

    def __init__(self) -> None:
        self.seen = 0
        self.heads: list[dict[int, Token]] = [{} for _ in range(H)]

    def step(self, keys, values, query, valid, settings) -> torch.Tensor:
        """All arguments of this row: ``[heads, Q, D]``; ``valid`` is a list. The output ``[Hq, Q, D]``."""
        output = torch.zeros(H * G, len(valid), D, dtype=torch.float64)
        positions = []
        for real in valid:
            positions.append(self.seen if real else None)
            self.seen += real
        for h, held in enumerate(self.heads):
            for q, position in enumerate(positions):
                if position is None:  # padding: in a chunk it attends as in transformers, and does not vote
                    if len(valid) > 1 and held:
                        for g in range(G):
                            self.attend(held, query[h * G + g, q], output[h * G + g, q])
                    continue
                held[position] = Token(position, keys[h, q], values[h, q])
                for token in held.values():
                    if token.position < position:
                        cosine = torch.cosine_similarity(token.key, keys[h, q], dim=0).item()
                        token.redundancy = max(token.redundancy, cosine)
                for token in held.values():
                    token.score *= settings.score_decay
                for g in range(G):
                    weights = self.attend(held, query[h * G + g, q], output[h * G + g, q])
                    for token, weight in zip(held.values(), weights, strict=True):
                        token.score += weight.item()
        return output

    def attend(self, held, query, output) -> torch.Tensor:
        """Adds the attention of one query to ``output`` ``[D]``, and returns its weights."""
        weights = torch.stack([token.key @ query * SCALE for token in held.values()]).softmax(0)
        for token, weight in zip(held.values(), weights, strict=True):
            output += weight * token.value
        return weights

    def evict(self, settings) -> None:
        for held in self.heads:
            while len(held) > settings.slots:
                del held[min(held, key=lambda p: (self.eviction_score(held[p], settings), p))]

    def eviction_score(self, token: Token, settings) -> float:
        if token.position < settings.sink_tokens or token.position >= self.seen - settings.recent_tokens:
            return math.inf
        credited = token.score + G * settings.score_prior
        return credited * token.value.norm().item() * (1 - settings.redundancy * token.redundancy)


class CacheAgainstDictionaries(RuleBasedStateMachine):
    """Prefill, decode, chunks, pads, reorder, crop and deepcopy, in any order."""

    @initialize(B=st.integers(1, 3), cache_size=st.integers(1, 12), seed=st.integers(0, 2**20))
    def begin(self, B, cache_size, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = FixedSizeDynamicCache(cache_size=cache_size)
        self.settings, self.rows, self.columns = self.cache.settings, [Row() for _ in range(B)], 0

    def advance(self, Q: int, pads: list[int]) -> None:
        """One step; the first tokens of a row may be padding."""
        B = len(self.rows)
        x = torch.randn(B, 2 * H + H * G, Q, D, dtype=torch.float64, generator=self.generator)
        keys, values, query = x[:, :H], x[:, H : 2 * H], x[:, 2 * H :]
        valid = torch.ones(B, Q, dtype=torch.bool)
        for row, count in enumerate(pads[:B]):
            valid[row, : min(count, Q)] = False
        self.cache.update(keys, values, 0)
        output = self.cache.attend(0, query, valid if not valid.all() else None, LogitRule(SCALE))
        self.columns += Q
        for b, row in enumerate(self.rows):
            expected = row.step(keys[b], values[b], query[b], valid[b].tolist(), self.settings)
            torch.testing.assert_close(output[b], expected, rtol=1e-9, atol=1e-9)
            row.evict(self.settings)

    @rule(Q=st.integers(1, 9), pads=st.lists(st.integers(0, 4), min_size=3, max_size=3))
    def chunk(self, Q, pads):
        self.advance(Q, pads)

    @rule(steps=st.integers(1, 4))
    def decode(self, steps):
        for _ in range(steps):
            self.advance(1, [0, 0, 0])

    @rule(data=st.data())
    def reorder(self, data):
        if not self.columns:
            return
        order = data.draw(
            st.lists(st.integers(0, len(self.rows) - 1), min_size=len(self.rows), max_size=len(self.rows))
        )
        self.cache.reorder_cache(torch.tensor(order))
        self.rows = [copy.deepcopy(self.rows[i]) for i in order]

    @rule()
    def copied(self):
        self.cache = copy.deepcopy(self.cache)

    @rule(blocks=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
    def propose_and_take_back(self, blocks, data):
        """What is rejected leaves no trace: the model never hears of it."""
        self.cache.activate_past_recording()
        total = sum(blocks)
        x = torch.randn(len(self.rows), 2 * H + H * G, total, D, dtype=torch.float64, generator=self.generator)
        start = 0
        for Q in blocks:
            part = x[:, :, start : start + Q]
            self.cache.update(part[:, :H], part[:, H : 2 * H], 0)
            self.cache.attend(0, part[:, 2 * H :], None, LogitRule(SCALE))
            start += Q
        rejected = data.draw(st.integers(0, total))
        self.cache.crop(-rejected)
        self.cache.stop_past_recording()
        kept = total - rejected
        self.columns += kept
        for b, row in enumerate(self.rows):
            if kept:
                row.step(x[b, :H, :kept], x[b, H : 2 * H, :kept], x[b, 2 * H :, :kept], [True] * kept, self.settings)
            row.evict(self.settings)

    @invariant()
    def holds_the_same(self):
        assert self.cache.layers == [] or self.cache.get_seq_length() == self.columns
        if not self.columns:
            return
        layer = self.cache.layers[0]
        slots = layer.slots.tokens
        assert layer.slots.seen.tolist() == [row.seen for row in self.rows]
        for b, row in enumerate(self.rows):
            for h, held in enumerate(row.heads):
                found = {p: i for i, p in enumerate(slots.positions[b, h].tolist()) if p >= 0}
                assert found.keys() == held.keys()
                for p, i in found.items():
                    assert math.isclose(slots.scores[b, h, i].item(), held[p].score, rel_tol=TIE, abs_tol=TIE)
                    assert math.isclose(slots.redundancy[b, h, i].item(), held[p].redundancy, rel_tol=TIE, abs_tol=TIE)
                    assert torch.equal(layer.keys[b, h, i], held[p].key)
                    assert torch.equal(layer.values[b, h, i], held[p].value)


TestCache = CacheAgainstDictionaries.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
