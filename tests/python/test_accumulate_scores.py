# SPDX-License-Identifier: Apache-2.0
"""torch.ops.fsdc.accumulate_scores_ against its specification, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATING, INF, NAN, assert_same_bits

from fixed_size_kv_cache import reference

accumulate_scores_ = torch.ops.fsdc.accumulate_scores_


def check(scores, weights, query_weights=None, carry=None):
    expected = scores.cpu().clone()
    on_cpu = [None if x is None else x.cpu() for x in (weights, query_weights, carry)]
    reference.accumulate_scores_(expected, *on_cpu)
    assert accumulate_scores_(scores, weights, query_weights, carry) is None
    assert_same_bits(scores.cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("Q", [0, 1, 5])
@pytest.mark.parametrize("S", [0, 1, 511, 512, 1500])
def test_sums(S, Q, group, dtype, device):
    B, H = 2, 3
    weights = torch.rand(B, H * group, Q, S, device=device).to(dtype)
    query_weights, carry = torch.rand(B, Q, device=device), torch.rand(B, device=device)
    for optional in ((None, None), (query_weights, None), (None, carry), (query_weights, carry)):
        check(torch.rand(B, H, S, device=device), weights, *optional)


def test_scores_that_are_not_finite_stay(device):
    scores = torch.tensor([[[INF, -INF, NAN, 1.0]]], device=device)
    weights = torch.ones(1, 1, 1, 4, device=device)
    accumulate_scores_(scores, weights, carry=torch.zeros(1, device=device))
    assert scores[0, 0, :2].tolist() == [INF, -INF]
    assert scores[0, 0, 2].isnan()
    assert scores[0, 0, 3].item() == 1.0


def test_a_query_of_weight_zero_never_enters(device):
    weights = torch.tensor([[[[NAN, INF]], [[1.0, 2.0]]]], device=device).transpose(1, 2)  # queries 0 and 1
    scores = torch.zeros(1, 1, 2, device=device)
    accumulate_scores_(scores, weights, torch.tensor([[0.0, 1.0]], device=device))
    assert scores.flatten().tolist() == [1.0, 2.0]


def test_a_chunk_counts_as_its_queries_one_by_one(device):
    gamma, Q, S = 0.75, 6, 40
    weights = torch.rand(1, 4, Q, S, device=device)
    at_once = torch.rand(1, 2, S, device=device)
    step_by_step = at_once.clone()
    query_weights = gamma ** torch.arange(Q - 1, -1, -1, device=device).float()[None]
    accumulate_scores_(at_once, weights, query_weights, torch.tensor([gamma**Q], device=device))
    for q in range(Q):
        accumulate_scores_(step_by_step, weights[:, :, q : q + 1], None, torch.tensor([gamma], device=device))
    torch.testing.assert_close(at_once, step_by_step)


def test_each_head_hears_its_own_group_only(device):
    weights = torch.zeros(1, 6, 1, 3, device=device)
    weights[0, 2:4] = torch.tensor([1.0, 2.0, 3.0], device=device)  # the group of KV head 1 of 3
    scores = torch.zeros(1, 3, 3, device=device)
    accumulate_scores_(scores, weights)
    assert scores[0].tolist() == [[0.0] * 3, [2.0, 4.0, 6.0], [0.0] * 3]


def test_strides_are_free(device):
    B, H, Q, S = 2, 2, 3, 600
    permuted = torch.rand(S, Q, 2 * H, B, device=device).permute(3, 2, 1, 0)
    expanded = torch.rand(B, 1, Q, 1, device=device).expand(B, 2 * H, Q, S)
    unaligned = torch.rand(B * 2 * H * Q * S + 1, device=device)[1:].view(B, 2 * H, Q, S)
    query_weights = torch.rand(Q, 2 * B, device=device)[:, ::2].t()
    carry = torch.rand(1, device=device).expand(B)
    for weights in (permuted, expanded, unaligned):
        check(torch.rand(B, H, S, device=device), weights, query_weights, carry)
        check(torch.rand(S, H, B, device=device).permute(2, 1, 0), weights, query_weights, carry)
        check(torch.rand(B, H, 2 * S, device=device)[..., ::2], weights, query_weights, carry)


@pytest.mark.parametrize("B, H, S", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty(B, H, S, device):
    check(torch.rand(B, H, S, device=device), torch.rand(B, 2 * H, 3, S, device=device))


@given(data=st.data())
def test_any_shape_and_numbers(data):
    B, H, Q = (data.draw(st.integers(0, 3)) for _ in range(3))
    group = data.draw(st.integers(1, 3))
    S = data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from(FLOATING))
    numbers = st.floats(width=32) | st.sampled_from([INF, -INF, NAN, 0.0, -0.0])

    def draw(*sizes):
        few = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=8)))
        return few[torch.randint(len(few), sizes)]

    check(draw(B, H, S), draw(B, H * group, Q, S).to(dtype), draw(B, Q), draw(B))
