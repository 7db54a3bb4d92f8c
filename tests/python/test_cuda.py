# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: streams, graphs, devices, tensors beyond 2^31 elements. Skipped where there is none."""

import pytest
import torch
from inputs import assert_all_same_bits, rows

from fixed_size_kv_cache import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
truncate = torch.ops.fsdc.truncate
accumulate_scores_ = torch.ops.fsdc.accumulate_scores_


def inputs(B=2, H=4, S=3000, D=64, device="cuda"):
    keys, values = (rows(B, H, S, D, torch.bfloat16, device) for _ in range(2))
    return keys, values, torch.rand(B, H, S, device=device)


def expected(keys, values, scores, cache_size, include_skipped=False):
    return reference.truncate(keys.cpu(), values.cpu(), scores.cpu(), cache_size, include_skipped=include_skipped)


def assert_is(actual, wanted):
    assert_all_same_bits([x.cpu() for x in actual], wanted)


@pytest.mark.parametrize("include_skipped", [False, True])
@pytest.mark.parametrize("B, H, S", [(1, 1, 100_003), (1, 8, 32_768), (64, 8, 1_000), (1, 2, 500_000)])
def test_every_launch_shape(B, H, S, include_skipped):
    arguments = inputs(B, H, S, 16)
    for cache_size in (2, 1024):
        actual = truncate(*arguments, cache_size, include_skipped=include_skipped)
        assert_is(actual, expected(*arguments, cache_size, include_skipped))


def test_same_bits_on_every_run():
    arguments = inputs(S=20_000)
    first = truncate(*arguments, 500, include_skipped=True)
    noise = torch.rand(2048, 2048, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            noise = (noise @ noise).clamp(0, 1)
        assert_all_same_bits(truncate(*arguments, 500, include_skipped=True), first)


def test_runs_on_the_current_stream():
    keys, values, scores = inputs()
    wanted = expected(keys, values, scores, 100)
    late_scores = torch.zeros_like(scores)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # were it on another stream, it would see the zeros
        late_scores.copy_(scores)
        actual = truncate(keys, values, late_scores, 100)
    stream.synchronize()
    assert_is(actual, wanted)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_is_captured_in_a_graph_and_replayed_with_new_inputs(include_skipped):
    keys, values, scores = inputs()
    weights = torch.rand(2, 8, 3, 3000, device="cuda")

    def step():
        accumulate_scores_(scores, weights)
        return truncate(keys, values, scores, 100, include_skipped=include_skipped)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3):
        torch.manual_seed(seed)
        for tensor in (keys, values, scores, weights):
            tensor.copy_(torch.rand_like(tensor))
        sums = scores.cpu()
        reference.accumulate_scores_(sums, weights.cpu())
        graph.replay()
        assert_is(out, reference.truncate(keys.cpu(), values.cpu(), sums, 100, include_skipped=include_skipped))


def test_cuda_graph():
    keys, scores = rows(1, 2, 500, 64, device="cuda"), torch.rand(1, 2, 500, device="cuda")
    truncate(keys, keys, scores, 100)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = truncate(keys, keys, scores, 100)
    for _ in range(3):
        keys.normal_()
        scores.uniform_()
        graph.replay()
        assert_all_same_bits(captured, truncate(keys, keys, scores, 100))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_runs_on_the_device_of_its_inputs():
    arguments = inputs(device="cuda:1")
    with torch.cuda.device(0):
        actual = truncate(*arguments, 100)
        assert all(x.device.index == 1 for x in actual)
        assert_is(actual, expected(*arguments, 100))


def test_offsets_beyond_32_bits():
    H, S, D = 3, 1 << 20, 1024  # 3 * 2^30 elements of keys, and as many bytes of each row
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("less than 16 GiB of free memory")
    keys = torch.arange(H * S, device="cuda").view(1, H, S, 1).remainder(251).to(torch.bfloat16).expand(1, H, S, D)
    keys = keys.contiguous()
    values = keys[..., :1].contiguous()
    scores = torch.rand(1, H, S, device="cuda")
    scores[0, :, -3:] = 2.0
    out_keys, out_values, indices = truncate(keys, values, scores, 1000)
    assert indices[0, :, -3:].tolist() == [[S - 3, S - 2, S - 1]] * H
    best = reference.truncate(values.cpu(), values.cpu(), scores.cpu(), 1000)
    assert_is((out_values, indices), best[1:])
    for head in range(H):
        assert torch.equal(out_keys[0, head], keys[0, head].index_select(0, indices[0, head]))


def test_many_small_rows():
    keys, values, scores = inputs(B=3000, H=8, S=40, D=4)
    assert_is(truncate(keys, values, scores, 7), expected(keys, values, scores, 7))
