# SPDX-License-Identifier: Apache-2.0
"""Two capped runs that must be one: equal tokens, equal positions, unless two eviction scores lie within rounding."""

import torch

from fixed_size_kv_cache.layer.layer import FixedSizeLayer
from fixed_size_kv_cache.layer.score_rule import eviction_scores

TIE = 1e-5  # relative


def assert_same_run(one, other, row: int = 0, pads: int = 0) -> None:
    """Compares the output of two generate() calls: row ``row`` of the first, less its padding, with the only one of the
    second."""
    assert torch.equal(one.sequences[row, pads:], other.sequences[0])
    for first, second in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(first[row], second[0], rtol=1e-9, atol=1e-9)
    assert_same_tokens_held(one.past_key_values, other.past_key_values, row)


def assert_same_tokens_held(cache, other, row: int = 0) -> None:
    """Positions are equal, or those that differ have eviction scores that lie within 1e-5 of each other."""
    for layer, alone in zip(cache.layers, other.layers, strict=True):
        if not isinstance(layer, FixedSizeLayer):
            continue
        mine, theirs = (_scores_by_position(x, r) for x, r in ((layer, row), (alone, 0)))
        for head, (kept, expected) in enumerate(zip(mine, theirs, strict=True)):
            only = [kept[p] for p in kept.keys() - expected.keys()] + [
                expected[p] for p in expected.keys() - kept.keys()
            ]
            if only:
                least = min(min(kept.values()), min(expected.values()))
                assert max(only) - least <= TIE * abs(least), (head, sorted(kept), sorted(expected))


def _scores_by_position(layer: FixedSizeLayer, row: int) -> list[dict[int, float]]:
    tokens = layer.slots.tokens
    scores = eviction_scores(tokens, layer.slots.seen, layer.settings, layer.group)
    return [
        {p: s for p, s in zip(positions, values, strict=True) if p >= 0}
        for positions, values in zip(tokens.positions[row].tolist(), scores[row].tolist(), strict=True)
    ]
