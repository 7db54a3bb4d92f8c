# SPDX-License-Identifier: Apache-2.0
"""The simulator of benchmarks/quality keeps the very tokens that the product's cache keeps."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import transformers
from llamas import feed, held_positions, new_cache, tiny_llama, tokens

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("the simulator needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import FixedSizeCacheConfig, FixedSizeLayer, enable
from fixed_size_kv_cache.layer.attention import LogitRule

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks/quality"))
import real_rules
import simulator

RULES = [
    real_rules.DEFAULT,
    real_rules.ours(2, 0, 0),
    real_rules.ours(2, 0.02, 0.5),
    *real_rules.BASELINES,
]
LENGTHS = [150, 24, 1, 17, 1, 1]  # a prompt, a turn, steps
C = 40


def held_by(layer: simulator.Held) -> list[list[int]]:
    return [sorted(p for p in head if p >= 0) for head in layer.positions[0].tolist()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_it_keeps_what_the_product_keeps(rule):
    model, ids = tiny_llama(), tokens(1, sum(LENGTHS))
    cache = new_cache(model, **vars(rule.settings(C, C)))
    layers, start, errors = [], 0, [[1.0] * 4] * 3
    for length in LENGTHS:
        part = ids[:, start : start + length]
        with enable(model, C):
            expected = feed(model, cache, part, [length])
        with simulator.simulated(model):
            logits, layers = simulator.read(model, part, layers, [rule.vote(C)], logits=length)
        layers = rule.apply(layers, rule.sizes(errors, C, 999), C, group=2)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        assert [held_by(layer) for layer in layers] == [held_positions(layer) for layer in cache.layers]
        start += length
    assert model.config._attn_implementation == "sdpa"


def test_many_rules_from_one_reading():
    """Votes of several rules are what each of them alone would count."""
    model, ids = tiny_llama(), tokens(1, 150)
    votes = list(dict.fromkeys(rule.vote(C) for rule in RULES))
    assert len(votes) > 2
    with simulator.simulated(model):
        _, layers = simulator.read(model, ids, votes=votes)
        for rule in RULES:
            _, alone = simulator.read(model, ids, votes=[rule.vote(C)])
            kept = [rule.apply(read, [[C] * 4] * 3, C, 2) for read in (layers, alone)]
            assert [held_by(layer) for layer in kept[0]] == [held_by(layer) for layer in kept[1]]


def test_heads_of_different_size_keep_what_each_would_alone():
    """The same keys for layers of the product with other sizes: a head does not know of its neighbours."""
    sizes, rule, group = [15, 80, 50, 15], real_rules.ours(2, 0.02, 0.5), 2
    generator = torch.Generator().manual_seed(3)

    def some(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, 16, generator=generator, dtype=torch.float64)

    of_heads = rule.settings([sizes], C).of_layer(0)
    settings = dict(zip(sizes, of_heads, strict=True))
    products = {size: FixedSizeLayer(settings[size]) for size in sizes}
    held, logit_rule = None, LogitRule(1.0)
    for length in LENGTHS:
        query, keys, values = some(8, length), some(4, length), some(4, length)
        for layer in products.values():
            layer.update(keys, values)
        expected = {size: layer.attend(query, None, logit_rule) for size, layer in products.items()}
        step = simulator._Step([held] if held else [], [rule.vote(C)], True, None)
        output = step.attend(0, query, keys, values, logit_rule)
        held = simulator.cut(step.after[0], step.after[0].votes[rule.vote(C)], of_heads, group)
        for head, size in enumerate(sizes):
            of_head = slice(head * group, (head + 1) * group)
            torch.testing.assert_close(output[:, of_head], expected[size][:, of_head], rtol=1e-9, atol=1e-9)
            assert held_by(held)[head] == held_positions(products[size])[head]


def test_votes_of_other_kinds():
    """The decayed maximum and the mean, against sums written out."""
    model, ids = tiny_llama(), tokens(1, 30)
    with simulator.simulated(model):
        votes = [simulator.Vote("max", 0.9), simulator.Vote("sum", 1.0)]
        _, whole = simulator.read(model, ids, votes=votes)
        _, first = simulator.read(model, ids[:, :20], votes=votes)
        _, parts = simulator.read(model, ids[:, 20:], first, votes)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for one, two, weights in zip(whole, parts, attentions, strict=True):
        received = weights.view(1, 4, 2, 30, 30).sum(2).float()  # [B, H, Q, S]
        ages = 29 - torch.arange(30)
        largest = (received * (0.9**ages)[:, None]).amax(2)
        for layer in (one, two):
            torch.testing.assert_close(layer.votes[votes[0]], largest, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.votes[votes[1]], received.sum(2), rtol=1e-5, atol=1e-6)


def test_unequal_heads_keep_what_the_product_keeps():
    """Sizes by a profile, on a whole model."""
    rule = real_rules.unequal(dataclasses.replace(real_rules.DEFAULT, knobs=dict(sink_tokens=3)))
    model, ids = tiny_llama(), tokens(1, sum(LENGTHS))
    errors = [[0.1, 0.5, 0.0, 0.2], [0.9, 0.0, 0.3, 0.1], [0.2, 0.2, 0.1, 0.4]]
    sizes = rule.sizes(errors, C, 999)
    assert (
        min(map(min, sizes)) == C // 4 and sum(map(sum, sizes)) == 12 * C and len({*sizes[0], *sizes[1], *sizes[2]}) > 6
    )
    settings = rule.settings(sizes, C)
    assert {head.sink_tokens for i in range(3) for head in settings.of_layer(i)} == {1, 2, 3}
    cache, layers, start = new_cache(model, **vars(settings)), [], 0
    for length in LENGTHS:
        part = ids[:, start : start + length]
        with enable(model, C):
            expected = feed(model, cache, part, [length])
        with simulator.simulated(model):
            logits, layers = simulator.read(model, part, layers, [rule.vote(C)], logits=length)
        layers = rule.apply(layers, sizes, C, group=2)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        for i, layer in enumerate(layers):
            shown = [sorted(p for p in head if p >= 0) for head in cache.get_positions(i)[0].tolist()]
            assert held_by(layer) == shown
        start += length


def test_sizes():
    errors = [[0.0, 3.0], [1.0, 0.0]]
    rule = real_rules.unequal(real_rules.PLAIN, 0.25)
    assert rule.sizes(errors, 100, 200) == [[25, 200], [150, 25]]  # what one cannot use others get
    assert rule.sizes(errors, 100, 90) == real_rules.PLAIN.sizes(errors, 100, 999) == [[100, 100], [100, 100]]
    layers, pyramid = real_rules.SHARES[:2]
    assert layers.sizes(errors, 100, 999) == [[138, 138], [62, 62]]
    sizes = pyramid.sizes([[1.0] * 2] * 5, 100, 10_000)
    assert [layer[0] for layer in sizes] == sorted((layer[0] for layer in sizes), reverse=True)
    assert sizes[0][0] == 195 and sizes[-1][0] == 5 and sum(map(sum, sizes)) == 1000


def test_settings_follow_each_heads_size():
    """As those of a cache of the product with the same sizes."""
    rule, sizes = real_rules.unequal(real_rules.ours(2, 0, 0)), [[400, 25], [25, 30]]
    plain = FixedSizeCacheConfig(cache_size=sizes, score_decay=1 - 2 / 120, score_prior=0.0, redundancy=0.0)
    assert rule.settings(sizes, 120) == plain
    assert [head.recent_tokens for head in plain.of_layer(0)] == [100, 6]
