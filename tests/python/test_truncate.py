# SPDX-License-Identifier: Apache-2.0
"""torch.ops.fsdc.truncate against its specification, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATING, INF, NAN, assert_all_same_bits, assert_copied, hostile_scores, rows

from fixed_size_kv_cache import reference

truncate = torch.ops.fsdc.truncate


def check(keys, values, scores, cache_size, include_skipped=False):
    actual = truncate(keys, values, scores, cache_size, include_skipped=include_skipped)
    expected = reference.truncate(keys.cpu(), values.cpu(), scores.cpu(), cache_size, include_skipped=include_skipped)
    assert_all_same_bits([x.cpu() for x in actual], expected)
    kept = actual[2].shape[2] - (include_skipped and cache_size < keys.shape[2])
    for out, source in zip(actual[:2], (keys, values), strict=True):
        assert_copied(out[:, :, :kept].cpu(), source.cpu(), actual[2][..., :kept].cpu())
    return actual


@pytest.mark.parametrize("cache_size", [1, 2, 99, 100, 101, 2**62])
@pytest.mark.parametrize("dtype", FLOATING)
def test_keeps_the_best_in_token_order(dtype, cache_size, device):
    keys, values = rows(2, 3, 100, 8, dtype, device), rows(2, 3, 100, 5, dtype, device)
    check(keys, values, torch.rand(2, 3, 100, device=device), cache_size)


@pytest.mark.parametrize("cache_size", [2, 3, 99, 100, 101, 2**62])
@pytest.mark.parametrize("dtype", FLOATING)
def test_skipped_tokens_are_summed_in_the_last_entry(dtype, cache_size, device):
    keys, values = rows(2, 3, 100, 8, dtype, device), rows(2, 3, 100, 300, dtype, device)
    scores = torch.rand(2, 3, 100, device=device)
    _, out_values, indices = check(keys, values, scores, cache_size, include_skipped=True)
    if cache_size < 100:
        assert (indices[..., -1] == -1).all()
        total = values.double().sum(2)
        torch.testing.assert_close(out_values.double().sum(2), total, atol=0.5, rtol=0.05)


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 127, 1000, 5000])
def test_hostile_scores(S, device):
    cases = hostile_scores(S)
    scores = torch.stack(list(cases.values()))[None].to(device)
    keys = torch.arange(S, dtype=torch.float32, device=device)[:, None].expand(1, len(cases), S, 1)
    for cache_size in {1, 2, S // 3, S // 2, S - 1, S} - {0}:
        check(keys, keys, scores, cache_size)
        if cache_size >= 2:
            check(keys, keys, scores, cache_size, include_skipped=True)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("step", [1, 2])
def test_a_thread_that_flushes_denormals_selects_the_same(step, dtype):
    S = 5000
    scale = 1e-6 if dtype == torch.float16 else 1e-38  # some of them normal
    scores = torch.randn(1, 1, S, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    scores[0, 0, ::7] = 0
    scores = scores.to(dtype).repeat_interleave(step, -1)[..., ::step]
    keys = torch.arange(S, dtype=torch.float32).view(1, 1, S, 1)
    expected = [truncate(keys, keys, scores, cache_size)[2] for cache_size in (1, 50, 1000, 2300, 2500, 4000)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        actual = [truncate(keys, keys, scores, x.shape[2])[2] for x in expected]
    finally:
        torch.set_flush_denormal(False)
    assert_all_same_bits(actual, expected)


def test_rank_and_ties_by_hand(device):
    scores = torch.tensor([1.0, NAN, -INF, INF, 0.0, -0.0, 2.0, 1.0], device=device).view(1, 1, 8)
    keys = rows(1, 1, 8, 4, device=device)
    best_first = [3, 1, 6, 7, 0, 5, 4, 2]
    for cache_size in range(1, 9):
        indices = truncate(keys, keys, scores, cache_size)[2]
        assert indices.flatten().tolist() == sorted(best_first[:cache_size])


def test_long_row(device):
    S = 100_001
    keys = rows(1, 2, S, 3, device=device)
    scores = torch.stack([hostile_scores(S)["lognormal over 30 decades"], torch.zeros(S)])[None].to(device)
    for cache_size in (1, 1024, S - 1):
        check(keys, keys, scores, cache_size)
    check(keys, keys, scores, 1024, include_skipped=True)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("Q", [0, 1, 7])
def test_attention_weights_are_summed_in_order(Q, group, dtype, device):
    B, H, S = 2, 2, 700
    keys = rows(B, H, S, 4, device=device)
    weights = torch.rand(B, H * group, Q, S, device=device).to(dtype)
    check(keys, keys, weights, 50)
    sums = torch.zeros(B, H, S, device=device)
    torch.ops.fsdc.accumulate_scores_(sums, weights)
    assert_all_same_bits(truncate(keys, keys, weights, 50), truncate(keys, keys, sums, 50))


@pytest.mark.parametrize("dtype", FLOATING)
def test_scores_of_any_floating_type(dtype, device):
    keys = rows(1, 2, 300, 4, device=device)
    check(keys, keys, torch.randn(1, 2, 300, device=device).to(dtype), 20)


def test_float64_scores_are_rounded_once(device):
    keys = rows(1, 1, 2, 4, device=device)
    scores = torch.tensor([[[1 + 2**-40, 1.0]]], dtype=torch.float64, device=device)  # equal in float32
    assert truncate(keys, keys, scores, 1)[2].item() == 1


def test_strides_are_free(device):
    B, H, S, D = 2, 3, 50, 8
    scores = torch.rand(B, H, S, device=device)
    transposed = torch.randn(B, S, H, D, device=device).transpose(1, 2)
    sliced = torch.randn(B, H, S + 7, D + 3, device=device)[:, :, 3 : 3 + S, 1 : 1 + D]
    unaligned = torch.randn(B * H * S * D + 1, device=device)[1:].view(B, H, S, D)
    one_token = torch.randn(B, H, 1, D, device=device).expand(B, H, S, D)
    one_head = torch.randn(B, 1, S, D, device=device).expand(B, H, S, D)
    for keys in (transposed, sliced, unaligned, one_token, one_head):
        check(keys, transposed, scores, 11)
        check(keys, sliced, scores, 11, include_skipped=True)
    for strided in (
        torch.rand(B, S, H, device=device).transpose(1, 2),
        torch.rand(B, H, 2 * S, device=device)[..., ::2],
        torch.rand(B, 1, S, device=device).expand(B, H, S),
        torch.rand(B, H, 1, device=device).expand(B, H, S),
    ):
        check(transposed, transposed, strided, 11)
    weights = torch.rand(B, S, 2, 2 * H, device=device).permute(0, 3, 2, 1)
    check(transposed, transposed, weights, 11)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D", [1, 3, 80])
def test_bits_of_every_kind_are_copied(D, dtype, device):
    size = (1, 2, 300, D * dtype.itemsize)
    keys, values = (torch.randint(256, size, dtype=torch.uint8, device=device).view(dtype) for _ in range(2))
    if D == 80:
        assert keys.isnan().any()
    scores = torch.rand(1, 2, 300, device=device)
    check(keys, values, scores, 200)
    check(keys, values, scores, 200, include_skipped=True)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D", [0, 1, 2, 3, 7, 80])
def test_head_dimensions(D, dtype, device):
    keys, values = rows(1, 2, 40, D, dtype, device), rows(1, 2, 41, 1, dtype, device)[:, :, 1:]
    scores = torch.rand(1, 2, 40, device=device)
    check(keys, values, scores, 9)
    check(keys, values, scores, 9, include_skipped=True)


def test_one_column_of_any_stride_counts_as_contiguous(device):
    keys = torch.randn(1, 2, 40, 6, device=device)[..., ::6]
    assert keys.shape[-1] == 1 and keys.stride(-1) != 1
    check(keys, keys, torch.rand(1, 2, 40, device=device), 9)


@pytest.mark.parametrize("B, H, S", [(0, 2, 5), (2, 0, 5), (2, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("include_skipped", [False, True])
def test_empty(B, H, S, include_skipped, device):
    keys = rows(B, H, S, 4, device=device)
    check(keys, keys, torch.rand(B, H, S, device=device), 3, include_skipped)
    check(keys, keys, torch.rand(B, 2 * H, 3, S, device=device), 3, include_skipped)


def test_outputs_are_fresh_even_where_nothing_is_cut(device):
    shared = rows(1, 1, 5, 4, device=device)
    before = shared.clone()
    keys, values, _ = truncate(shared, shared, torch.rand(1, 1, 5, device=device), 5)
    keys.zero_()
    values.fill_(1)
    assert_all_same_bits([shared], [before])
    assert (keys == 0).all()


def test_a_float16_sum_may_overflow(device):
    keys = torch.full((1, 1, 4, 1), 60000.0, dtype=torch.float16, device=device)
    out = truncate(keys, keys, torch.rand(1, 1, 4, device=device), 2, include_skipped=True)[0]
    assert out[0, 0, -1].item() == INF


def test_infinite_and_nan_rows_that_stay_do_not_enter_the_sum(device):
    keys = torch.ones(1, 1, 4, 2, device=device)
    keys[0, 0, 1] = NAN
    scores = torch.tensor([[[0.0, 9.0, 0.0, 0.0]]], device=device)
    assert truncate(keys, keys, scores, 2, include_skipped=True)[0][0, 0, -1].tolist() == [3.0, 3.0]


def test_truncating_twice_is_truncating_once(device):
    keys, scores = rows(2, 2, 200, 8, device=device), torch.rand(2, 2, 200, device=device)
    once = truncate(keys, keys, scores, 30)
    first = truncate(keys, keys, scores, 90)
    second = truncate(first[0], first[1], scores.gather(-1, first[2]), 30)
    assert_all_same_bits(second[:2], once[:2])


SPECIAL = [INF, -INF, NAN, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45]


@given(data=st.data())
def test_any_shape_and_scores(data):
    B, H, D = (data.draw(st.integers(0, 3)) for _ in range(3))
    S = data.draw(st.integers(0, 150))
    dtype = data.draw(st.sampled_from(FLOATING))
    cache_size = data.draw(st.integers(1, 160))
    include_skipped = cache_size >= 2 and data.draw(st.booleans())
    numbers = st.floats(width=32) | st.sampled_from(SPECIAL)
    few = data.draw(st.lists(numbers, min_size=1, max_size=12))
    scores = torch.tensor(few)[torch.randint(len(few), (B, H, S))]
    check(rows(B, H, S, D, dtype), rows(B, H, S, D, dtype), scores, cache_size, include_skipped)
