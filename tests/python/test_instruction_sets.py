# SPDX-License-Identifier: Apache-2.0
"""Every instruction set that this processor has gives the bits of the specification."""

import itertools

import pytest
import torch
from decode_case import check, random_case
from inputs import FLOATING, assert_all_same_bits, assert_same_bits, hostile_scores, rows

from fixed_size_kv_cache import _C, reference


@pytest.fixture(params=["amx", "avx512", "avx2", "portable"])
def isa(request):
    best = _C.cpu_isa()
    if not _C.use_cpu_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    assert _C.cpu_isa() == request.param
    yield request.param
    assert _C.use_cpu_isa(best)


def test_an_unknown_instruction_set_is_refused():
    assert _C.use_cpu_isa("mmx") is False


@pytest.fixture(scope="module", params=itertools.product(FLOATING, [1, 80, 300]), ids=str)
def truncated(request) -> list[tuple]:
    """Arguments of truncate and what the specification makes of them, once for all instruction sets."""
    dtype, D = request.param
    torch.manual_seed(0)
    cases = list(hostile_scores(5000).values())
    scores = torch.stack(cases)[None]
    keys = rows(1, len(cases), 5000, D, dtype)[:, :, :, : max(1, D - 3)]
    values = keys[..., -7:]  # few columns: they go where those of the keys do
    found = []
    for cache_size, include_skipped in itertools.product((2, 700, 4999), (False, True)):
        arguments = (keys, values, scores, cache_size), dict(include_skipped=include_skipped)
        found.append((*arguments, reference.truncate(*arguments[0], **arguments[1])))
    return found


def test_truncate(isa, truncated):
    for positional, named, expected in truncated:
        assert_all_same_bits(torch.ops.fsdc.truncate(*positional, **named), expected)


@pytest.mark.parametrize("dtype", FLOATING)
def test_accumulate_scores(isa, dtype):
    straight = torch.rand(2, 6, 5, 1100).to(dtype)
    for weights in (straight, torch.rand(1100, 5, 6, 2).to(dtype).permute(3, 2, 1, 0)):
        scores = torch.rand(2, 3, 1100)
        scores[:, :, 7], scores[:, :, 8] = float("inf"), float("-inf")
        expected = scores.clone()
        optional = (torch.rand(2, 5), torch.tensor([0.0, 0.5]))
        torch.ops.fsdc.accumulate_scores_(scores, weights, *optional)
        reference.accumulate_scores_(expected, weights, *optional)
        assert_same_bits(scores, expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D, Dv, group", [(1, 3, 1), (8, 8, 2), (20, 70, 5), (128, 64, 4), (130, 100, 9)])
def test_decode_attention(isa, D, Dv, group, dtype):
    for slots in (3, 40, 700):
        for length in (0, slots - 1, slots + 1):
            check(random_case(1, 2, group, slots, D, Dv, length=length, dtype=dtype, entry="mean", softcap=4.0))
            check(
                random_case(
                    2, 2, group, slots, D, Dv, length=length, dtype=dtype, holes=0.3, sinks=torch.ones(2 * group)
                )
            )


def test_flushing_denormals_does_not_lose_float16(isa):
    """Small float16 numbers are subnormal there, but not in float32."""
    weights = torch.full((1, 1, 1, 100), 3e-5, dtype=torch.float16)
    expected = weights[:, :, 0].float()
    assert torch.set_flush_denormal(True)
    try:
        scores = torch.zeros(1, 1, 100)
        torch.ops.fsdc.accumulate_scores_(scores, weights)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(scores, expected)
