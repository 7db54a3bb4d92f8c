# SPDX-License-Identifier: Apache-2.0
"""torch.ops.fsdc.decode_attention_ against its specification, one step at a time."""

import pytest
import torch
from decode_case import (
    KEY_SCALES,
    REDUNDANCY,
    SCORES,
    VALUE_WEIGHTS,
    Case,
    check,
    random_case,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATING, INF, NAN, assert_all_same_bits, assert_same_bits

N = 12
LENGTHS = [0, 1, 5, N - 1, N, N + 1, 10 * N]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("entry", [None, "mean", "sum"])
@pytest.mark.parametrize("length", LENGTHS)
def test_from_the_first_token_on(length, entry, dtype, device):
    check(random_case(N=N, length=length, entry=entry, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("slots", [[3, 12, 1], [40, 2, 7]], ids=str)
def test_heads_with_different_numbers_of_slots(slots, length, dtype, device):
    check(random_case(H=3, slots=slots, length=length, dtype=dtype, device=device, holes=0.2))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D, Dv", [(1, 1), (1, 40), (3, 5), (8, 8), (15, 16), (17, 33), (64, 64), (80, 128), (300, 70)])
def test_head_dimensions(D, Dv, dtype, device):
    check(random_case(N=50, D=D, Dv=Dv, dtype=dtype, device=device, entry="mean"))
    check(random_case(N=50, D=D, Dv=Dv, dtype=dtype, device=device, holes=0.3))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("G", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_groups(G, dtype, device):
    check(random_case(N=70, G=G, D=40, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("slots", [1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 1100, 5000])
def test_long_rows_are_cut_into_runs(slots, dtype, device):
    for length in (slots // 2, slots + 1):
        check(random_case(B=1, N=slots, D=4, length=length, dtype=dtype, device=device, entry="mean"))
    check(random_case(B=1, H=1, N=slots, D=20, length=slots + 9, holes=0.05, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("entry", [None, "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_logit_rules(with_sinks, softcap, entry, dtype, device):
    sinks = torch.randn(6, device=device).to(dtype) if with_sinks else None
    for length in (4, 30):
        check(
            random_case(
                G=3, length=length, softcap=softcap, sinks=sinks, entry=entry, dtype=dtype, device=device, scaling=2.5
            )
        )


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("sinks", FLOATING)
def test_sinks_of_any_floating_type(sinks, dtype, device):
    check(random_case(sinks=torch.randn(4, device=device).to(sinks), dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("large", [1e3, 1e6])
def test_logits_far_apart(large, dtype, device):
    """Where one token has all the attention, and where exponentials underflow."""
    case = random_case(N=300, D=16, dtype=dtype, device=device, scaling=large)
    if dtype == torch.float32 or dtype == torch.float64:
        case.query[:] = case.new_keys.repeat_interleave(2, 1).sign()
    else:
        case.query[:] = 1
    output = case.clone().run()
    assert output.isfinite().all()
    case.keys[:] = 0
    case.keys[:, :, 7] = case.query[:, ::2, 0]  # nobody else comes near it
    case.new_keys[:] = 0
    output = case.run()
    assert_same_bits(output, case.values[:, :, 7].repeat_interleave(2, 1)[:, :, None])
    assert (case.facts[SCORES, :, :, 7] >= 2).all()


RULES = [
    dict(value_weight=False),
    dict(redundancy=0.0),
    dict(redundancy=1.0),
    dict(prior=0.0),
    dict(prior=2.0),
    dict(decay=1.0),
    dict(decay=0.25),
    dict(sink_tokens=0, recent_tokens=0),
    dict(sink_tokens=5, recent_tokens=7),
    dict(sink_tokens=100),
    dict(recent_tokens=100),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [5, N, 40])
def test_rules(length, rule, device):
    check(random_case(N=N, length=length, device=device, entry="mean", **rule))


def test_scores_that_are_not_finite_stay(device):
    case = random_case(B=1, H=1, N=6, device=device, length=6, sink_tokens=0, recent_tokens=1)
    case.positions[0, 0, :6] = torch.arange(6, dtype=torch.int32, device=device)
    case.facts[SCORES, 0, 0, :3] = torch.tensor([INF, NAN, -1.0], device=device)
    case.facts[SCORES, 0, 0, 3] = -1.5
    case.run()
    assert case.facts[SCORES, 0, 0, 0] == INF and case.facts[SCORES, 0, 0, 1].isnan()
    assert case.positions[0, 0].tolist() == [0, 1, 2, 6, 4, 5, -1]  # the least finite one went


def goes(positions, eviction, length=None, **more) -> int:
    """The position of the token that goes where old scores are ``eviction`` and hardly anybody votes."""
    slots = len(positions)
    case = random_case(B=1, H=1, G=1, N=slots, D=2, length=slots if length is None else length)
    case = case.with_(decay=1.0, prior=0.0, redundancy=0.0, value_weight=False, sink_tokens=0, recent_tokens=1, **more)
    case.query[:], case.keys[:], case.new_keys[:] = 100, -100, 100  # all attention to the new one
    case.positions[0, 0, :slots] = torch.tensor(positions, dtype=torch.int32)
    case.facts[SCORES, 0, 0, :slots] = torch.tensor(eviction)
    case.seen[:] = max(positions) + 1
    check(case)
    left = set(positions) - set(case.positions[0, 0].tolist())
    assert len(left) <= 1
    return left.pop() if left else int(case.seen[0]) - 1


def test_order_of_going(device):
    assert goes([4, 0, 3], [1.0, 2.0, 0.5]) == 3
    assert goes([4, 0, 3], [1.0, 1.0, 1.0]) == 0  # ties: the smaller position
    assert goes([4, 3, 0], [0.0, 0.0, -0.0]) == 0
    assert goes([4, 3, 0], [-0.0, 0.0, 0.0]) == 0
    assert goes([4, 0, 3], [NAN, INF, 9e9]) == 3
    assert goes([4, 0, 3], [NAN, INF, NAN]) == 3
    assert goes([4, 0, 3], [INF, INF, INF]) == 0  # all are protected
    assert goes([4, 0, 3], [1e-40, 2.0, 1e-39]) == 4


def test_an_empty_slot_goes_first_and_the_first_of_them(device):
    case = random_case(B=1, H=1, N=6, length=9, entry="mean", device=device)
    case.positions[0, 0] = torch.tensor([3, -1, 2, 1, -1, 0, -1], dtype=torch.int32, device=device)
    case.facts[SCORES, 0, 0, [1, 4]] = -INF
    case.seen[:] = 4
    before = case.clone()
    check(case)
    assert case.positions[0, 0].tolist() == [3, 4, 2, 1, -1, 0, -1]
    assert_all_same_bits(
        [case.skipped_keys, case.skipped_count], [before.skipped_keys, before.skipped_count]
    )  # nobody went


@pytest.mark.parametrize("entry", [None, "mean"])
def test_the_new_token_may_be_the_one_that_goes(entry, device):
    case = random_case(B=1, H=1, N=6, length=6, entry=entry, device=device)
    case = case.with_(sink_tokens=0, recent_tokens=0, prior=0.0)
    case.facts[SCORES, 0, 0, :6] += 10
    case.new_keys[:] = -100 * case.query[:, :1]
    before = case.clone()
    check(case)
    assert_all_same_bits([case.keys, case.values, case.positions], [before.keys, before.values, before.positions])
    assert case.seen.item() == before.seen.item() + 1
    if entry:
        assert case.skipped_count.item() == before.skipped_count.item() + 1
        torch.testing.assert_close(case.skipped_keys, before.skipped_keys + case.new_keys[:, :, 0])


def test_a_protected_token_enters_with_all_the_score_there_is(device):
    protected = torch.tensor([True, False], device=device)
    case = random_case(N=N, length=5, protected=protected, device=device)
    check(case)
    assert (case.facts[SCORES, 0, :, 5] == INF).all() and case.facts[SCORES, 1, :, 5].isfinite().all()


# ---- what is not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("length", [0, 5, 40])
@pytest.mark.parametrize("entry", [None, "mean", "sum"])
def test_a_padded_row_stays_as_it_was(entry, length, dtype, device):
    case = random_case(B=3, length=length, holes=0.2, entry=entry, dtype=dtype, device=device)
    case = case.with_(valid=torch.tensor([True, False, True], device=device))
    for name in ("query", "new_keys", "new_values"):
        getattr(case, name)[1] = NAN
    before = case.clone()
    output = check(case) and before.clone().run()
    assert (output[1] == 0).all()
    for name in case.written:
        batch = 1 if name == "facts" else 0
        assert_same_bits(getattr(case, name).select(batch, 1), getattr(before, name).select(batch, 1))


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("slots", [N, 700])
def test_bytes_of_empty_slots_never_count(slots, dtype, junk, device):
    case = random_case(N=slots, length=slots + 5, holes=0.4, dtype=dtype, device=device, entry="mean")
    clean = case.clone()
    empty = case.positions < 0
    for x in (case.keys, case.values):
        x[empty] = junk if abs(junk) != 3e38 else torch.finfo(dtype).max
    for plane in (VALUE_WEIGHTS, REDUNDANCY, KEY_SCALES):
        case.facts[plane][empty] = junk
    assert_same_bits(case.clone().run(), clean.run())
    check(case)
    assert case.facts[:, case.positions >= 0].isfinite().all()


@pytest.mark.parametrize("length", [3, 30])
def test_slots_behind_those_in_use_are_neither_read_nor_written(length, device):
    case = random_case(N=N, length=length, device=device, holes=0.2)
    behind = slice(min(length + 1, N), None)
    for x in (case.keys, case.values):
        x[:, :, behind] = NAN
    case.facts[:, :, :, behind] = NAN
    case.positions[:, :, behind] = 77
    before = case.clone()
    assert case.run().isfinite().all()
    for name in ("keys", "values", "positions"):
        assert_same_bits(getattr(case, name)[:, :, behind], getattr(before, name)[:, :, behind])
    assert_same_bits(case.facts[:, :, :, behind], before.facts[:, :, :, behind])


@pytest.mark.parametrize("B, H", [(0, 2), (2, 0), (0, 0)])
def test_nobody_there(B, H, device):
    case = random_case(B=B, H=H, device=device)
    assert case.run().shape == (B, 2 * H, 1, 8)


@pytest.mark.parametrize("D, Dv", [(0, 4), (4, 0), (0, 0)])
def test_no_dimensions(D, Dv, device):
    check(random_case(D=D, Dv=Dv, device=device, entry="mean"))


# ---- how it lies in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("slots", [None, [3, 20]], ids=str)
def test_strides_are_free(slots, dtype, device):
    sinks, valid = torch.randn(4, device=device), torch.tensor([True, False, True], device=device)
    for length in (4, 30):
        more = dict(sinks=sinks, valid=valid, protected=~valid, entry="mean", holes=0.2, length=length, slots=slots)
        straight = random_case(B=3, dtype=dtype, device=device, D=20, Dv=9, **more)
        case = straight.map(strided)
        assert not case.keys.is_contiguous() and not case.seen.is_contiguous()
        check(case)
        assert_same_bits(case.map(strided).run(), check(straight).clone().run())
        assert_all_same_bits([getattr(case, x) for x in case.written], [getattr(straight, x) for x in case.written])


def test_one_new_token_for_all_heads(device):
    case = random_case(B=3, H=2, device=device)
    case = case.with_(new_keys=case.new_keys[:1, :1].expand(3, 2, 1, 8), query=case.query[:1].expand(3, 4, 1, 8))
    check(case)


def test_equal_heads_in_one_row_give_the_same_bits(device):
    case = random_case(H=3, N=600, D=24, length=700, holes=0.1, entry="mean", device=device)
    layout = [[601 * h, 600, case.sink_tokens, case.recent_tokens] for h in range(3)]
    rows = case.clone()
    rows = rows.with_(
        keys=rows.keys.flatten(1, 2),
        values=rows.values.flatten(1, 2),
        facts=rows.facts.flatten(2, 3),
        positions=rows.positions.flatten(1, 2),
        head_layout=torch.tensor(layout, dtype=torch.int32, device=device),
    )
    assert_same_bits(rows.run(), case.run())
    for name in case.written:
        assert_same_bits(getattr(rows, name).view_as(getattr(case, name)), getattr(case, name))


def test_each_head_has_sinks_and_recents_of_its_own(device):
    case = random_case(B=1, H=2, N=8, slots=[8, 8], length=8, device=device)
    case.head_layout[1, 2:] = torch.tensor([0, 8], dtype=torch.int32)
    case.facts[SCORES, :, 9:17] = 0
    check(case)
    gone = [set(range(8)) - set(x.tolist()) for x in case.positions.view(2, 9)]
    assert gone[1] == {0}  # all others are recent


def test_addresses_stay(device):
    case = random_case(entry="mean", device=device)
    addresses = [getattr(case, name).data_ptr() for name in case.written]
    outputs = {case.run().data_ptr() for _ in range(3)}
    assert addresses == [getattr(case, name).data_ptr() for name in case.written]
    assert not outputs & set(addresses)


# ---- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slots, D", [(100, 8), (300, 64), (1000, 128), (4000, 64)])
def test_no_further_from_float64_than_torch(slots, D, dtype):
    mine, torchs = [], []
    for _ in range(10):
        case = random_case(B=1, H=2, G=4, N=slots, D=D, length=slots, dtype=dtype)
        keys, values = (
            torch.cat([old[:, :, :slots], new], dim=2)
            for old, new in ((case.keys, case.new_keys), (case.values, case.new_values))
        )
        wide = [x.double() for x in (case.query, keys, values)]
        logits = wide[0].view(1, 2, 4, D) @ wide[1].mT * case.scaling
        exact = (logits.softmax(-1) @ wide[2]).view(1, 8, 1, D)
        torchs.append(
            torch.nn.functional.scaled_dot_product_attention(
                case.query, keys, values, scale=case.scaling, enable_gqa=True
            ).double()
            - exact
        )
        mine.append(case.run().double() - exact)
    distance, allowed = (torch.stack(x).square().mean().sqrt().item() for x in (mine, torchs))
    assert distance <= 1.05 * allowed  # two ways of adding that are as good differ by less than that


@given(data=st.data())
def test_any_shape_and_numbers(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    B, H, G = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    D, Dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    slots = draw(st.integers(1, 40) | st.sampled_from([256, 511, 520]))
    slots = [draw(st.integers(1, slots)) for _ in range(H)] if draw(st.booleans()) else slots
    length = draw(st.integers(0, (slots if isinstance(slots, int) else max(slots)) + 9))
    dtype = draw(st.sampled_from(FLOATING))
    flags = st.none() | st.lists(st.booleans(), min_size=B, max_size=B).map(torch.tensor)
    case = random_case(
        B,
        H,
        G,
        slots if isinstance(slots, int) else max(slots),
        D,
        Dv,
        length=length,
        dtype=dtype,
        holes=draw(st.sampled_from([0.0, 0.3, 1.0])),
        slots=None if isinstance(slots, int) else slots,
        entry=draw(st.sampled_from([None, "mean", "sum"])),
        softcap=draw(st.sampled_from([None, 1.0, 50.0])),
        sinks=draw(st.sampled_from([None, torch.randn(H * G)])),
        valid=draw(flags),
        protected=draw(flags),
    ).with_(
        decay=draw(st.sampled_from([1.0, 0.9, 0.1])),
        prior=draw(st.sampled_from([0.0, 0.05, 10.0])),
        redundancy=draw(st.sampled_from([0.0, 0.95])),
        value_weight=draw(st.booleans()),
        sink_tokens=draw(st.integers(0, 5)),
        recent_tokens=draw(st.integers(0, 50)),
    )
    specials = draw(st.lists(st.sampled_from([INF, NAN, 0.0, -0.0, 1e-40, 1e30]), max_size=4))
    scores = case.facts[SCORES]
    for special in specials:
        held = (case.positions >= 0).nonzero()
        if len(held):
            scores[tuple(held[draw(st.integers(0, 999)) % len(held)])] = special
    if draw(st.booleans()):
        case = case.map(strided)
    check(case)
    assert_invariants(case)


def assert_invariants(case: Case) -> None:
    """What holds of every state: an empty slot is empty by position and score, and nobody comes from the future."""
    assert torch.equal(case.facts[SCORES] == -INF, case.positions < 0)
    assert (case.positions < case.seen.view(-1, *[1] * (case.positions.dim() - 1))).all()
