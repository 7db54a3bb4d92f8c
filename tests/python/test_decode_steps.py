# SPDX-License-Identifier: Apache-2.0
"""decode_attention_ and its specification against the plain step of a layer, token by token, and over many tokens."""

import math

import pytest
import torch
from decode_case import DEFAULTS, ENTRY, SCORES, Case, assert_same_step, decode_attention_, random_case

from fixed_size_kv_cache import reference
from fixed_size_kv_cache.layer import decode
from fixed_size_kv_cache.layer.attention import LogitRule
from fixed_size_kv_cache.layer.layer import FixedSizeLayer
from fixed_size_kv_cache.layer.protected_spans import in_spans
from fixed_size_kv_cache.settings import FixedSizeCacheConfig

B, H, G, D, C = 3, 2, 3, 8, 10
STEPS = 3 * C
TIGHT = {torch.float64: 1e-12, torch.float32: 5e-6}


def new_layer(**settings) -> FixedSizeLayer:
    return FixedSizeLayer(FixedSizeCacheConfig(cache_size=C, static=True, **settings.pop("rule", {})), **settings)


def step_of(layer: FixedSizeLayer, query, keys, values, rule: LogitRule, valid) -> Case:
    """The step that comes, on a copy of what the layer holds."""
    settings, slots = layer.settings, layer.slots
    protected = None if slots.spans is None else in_spans(slots.spans, slots.seen[:, None])[:, 0]
    entry = {} if slots.skipped is None else dict(zip(ENTRY, slots.skipped[:4], strict=True))
    case = Case(
        dict(
            query=query,
            new_keys=keys,
            new_values=values,
            **slots.tokens._asdict(),
            seen=slots.seen,
            length=layer.tokens_seen,
            valid=valid,
            protected=protected,
            scaling=rule.scaling,
            softcap=rule.softcap,
            sinks=rule.sinks,
            decay=settings.score_decay,
            prior=settings.score_prior,
            redundancy=settings.redundancy,
            value_weight=settings.value_weight,
            sink_tokens=settings.sink_tokens,
            recent_tokens=settings.recent_tokens,
            **entry,
            skipped_mean=settings.skipped_mode == "mean",
        )
    )
    return case.clone()


LAYERS = {
    "plain": {},
    "H2O": dict(rule=dict(score_decay=1.0, score_prior=0.0, value_weight=False, redundancy=0.0)),
    "no edges": dict(rule=dict(sink_tokens=0, recent_tokens=0)),
    "all kept": dict(rule=dict(sink_tokens=4, recent_tokens=6)),
    "spans": dict(protected_spans=[(2, 4), (13, 15)]),
    "spans of rows": dict(protected_spans=[[(2, 4)], [(7, 8), (20, 22)], []]),
    "entry": dict(rule=dict(include_skipped=True)),
    "sum": dict(rule=dict(include_skipped=True, skipped_mode="sum")),
}


@pytest.mark.parametrize(
    "operator, dtype",
    [
        pytest.param(decode_attention_, torch.float32, id="float32"),
        pytest.param(decode_attention_, torch.float64, id="float64"),
        pytest.param(reference.decode_attention_, torch.float64, id="reference"),
    ],
)
@pytest.mark.parametrize("logits", ["plain", "softcap and sinks"])
@pytest.mark.parametrize("pads", ["no pads", "left pads", "pads between"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_is_the_plain_step(kind, pads, logits, operator, dtype, monkeypatch):
    monkeypatch.setattr(decode, "is_fused", lambda settings, device: False)
    layer = new_layer(**LAYERS[kind])
    rule = LogitRule(0.7) if logits == "plain" else LogitRule(0.7, 2.0, torch.randn(H * G))
    layer.lazy_initialization(torch.zeros(B, H, 1, D, dtype=dtype), torch.zeros(B, H, 1, D + 1, dtype=dtype))
    for t in range(STEPS):
        query, keys = torch.randn(B, H * G, 1, D, dtype=dtype), torch.randn(B, H, 1, D, dtype=dtype)
        values = torch.randn(B, H, 1, D + 1, dtype=dtype)
        valid = None
        if pads == "left pads":
            valid = torch.tensor([t >= 2 * C, t >= 4, True])
        elif pads == "pads between":
            valid = torch.rand(B) < 0.7
        case = step_of(layer, query, keys, values, rule, valid)
        output = case.run(operator)
        layer.update(keys, values)
        plain = layer.attend(query, None if valid is None else valid[:, None], rule)
        torch.testing.assert_close(output, plain, rtol=TIGHT[dtype], atol=TIGHT[dtype])
        assert_same_step(case, step_of(layer, query, keys, values, rule, valid))


def test_the_operator_is_told_how_many_tokens_were_seen(monkeypatch):
    """Not how many are held: on CUDA a count that its positions cannot reach is refused."""
    told, operator = [], decode.decode_attention_
    monkeypatch.setattr(decode, "decode_attention_", lambda *x, **y: told.append(x[8]) or operator(*x, **y))
    layer = new_layer()
    for _ in range(C + 3):
        layer.update(torch.randn(B, H, 1, D), torch.randn(B, H, 1, D))
        layer.attend(torch.randn(B, H * G, 1, D), None, LogitRule(1.0))
    assert told == list(range(C + 3))


def test_many_steps_on_a_small_layer():
    """Scores stay finite, positions right, and nothing moves; the sinks and the last tokens are there."""
    case = random_case(B=1, H=2, N=16, D=4, length=0, entry="mean")
    for name in ENTRY:
        getattr(case, name).zero_()
    addresses = [getattr(case, name).data_ptr() for name in case.written]
    for t in range(3000):
        for name in ("query", "new_keys", "new_values"):
            getattr(case, name).normal_()
        assert case.with_(length=t).run().isfinite().all()
    assert addresses == [getattr(case, name).data_ptr() for name in case.written]
    assert case.facts[:, :, :, :16].isfinite().all() and (case.facts[SCORES, :, :, :16] >= 0).all()
    for head in case.positions[0, :, :16].tolist():
        assert len(set(head)) == 16 and {0, 2999, 2998} <= set(head)
    assert (case.skipped_count == 3000 - 16).all() and case.seen.tolist() == [3000]
    assert case.positions[0, :, 16].tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_among_others_is_the_row_alone(dtype):
    """Left-padded, in a batch; the same tokens stay and the outputs are equal."""
    pads, steps = [0, 3, 17], 60
    rows = [random_case(B=1, H=2, N=12, length=0, dtype=dtype) for _ in pads]
    batch = random_case(B=3, H=2, N=12, length=0, dtype=dtype)
    for t in range(steps):
        tokens = {name: torch.randn_like(getattr(batch, name)) for name in ("query", "new_keys", "new_values")}
        output = batch.with_(**tokens, length=t, valid=torch.tensor([t >= pad for pad in pads])).run()
        for b, (pad, row) in enumerate(zip(pads, rows, strict=True)):
            if t >= pad:
                alone = row.with_(**{name: x[b : b + 1].clone() for name, x in tokens.items()}, length=t - pad).run()
                torch.testing.assert_close(output[b : b + 1], alone)
    for b, row in enumerate(rows):
        for h in range(2):
            assert sorted(batch.positions[b, h].tolist()) == sorted(row.positions[0, h].tolist())


def test_as_much_room_as_tokens_is_plain_attention():
    case = random_case(B=2, H=2, G=2, N=40, length=0, dtype=torch.float64)
    keys, values = [], []
    for t in range(40):
        for name in ("query", "new_keys", "new_values"):
            getattr(case, name).normal_()
        keys.append(case.new_keys.clone())
        values.append(case.new_values.clone())
        expected = torch.nn.functional.scaled_dot_product_attention(
            case.query, torch.cat(keys, 2), torch.cat(values, 2), scale=case.scaling, enable_gqa=True
        )
        torch.testing.assert_close(case.with_(length=t).run(), expected, rtol=1e-12, atol=1e-12)
    assert case.positions[:, :, :40].tolist() == [[list(range(40))] * 2] * 2
    decayed = sum(DEFAULTS["decay"] ** t for t in range(40)) * 2  # each of two query heads gives 1 in each step
    assert math.isclose(case.facts[SCORES, 0, 0, :40].sum().item(), decayed, rel_tol=1e-5)
