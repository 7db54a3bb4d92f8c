# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: streams, graphs, devices, tensors beyond 2^31 elements. Skipped where there is none."""

import pytest
import test_chunk_attention as chunk
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", chunk.OPTIONS.values(), ids=chunk.OPTIONS)
@pytest.mark.parametrize("sizes", [dict(B=2, T=70, Q=33), dict(T=900, Q=600)], ids=["small", "blocks"])
def test_chunk_attention_is_that_of_the_cpu(sizes, options, dtype):
    """As far as rounding goes, with what tells the two apart beside it: the products are cuBLAS's."""
    on_cpu = chunk.case(**sizes, D=32, Dv=48, dtype=dtype, **options)
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in on_cpu.items()}
    expected, actual = chunk.chunk_attention_(**on_cpu), chunk.chunk_attention_(**on_gpu)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.cpu(), expected, rtol=4 * unit, atol=4 * unit)
    for name in ("facts", "lost"):
        if name in on_cpu:
            torch.testing.assert_close(on_gpu[name].cpu(), on_cpu[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunk_attention_of_heads_of_different_lengths(dtype):
    on_cpu = chunk.case(H=3, G=2, T=90, Q=18, D=16, dtype=dtype)
    held, first = (90, 0, 33), (0, 108, 126)
    rows = [slice(90 - n, 108) for n in held]
    for name in ("keys", "values"):
        on_cpu[name] = torch.cat([on_cpu[name][:, h, at] for h, at in enumerate(rows)], dim=1)
    on_cpu["facts"] = torch.cat([on_cpu["facts"][:, :, h, at] for h, at in enumerate(rows)], dim=2)
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in on_cpu.items()}
    layout = torch.tensor(list(zip(first, held, strict=True)), dtype=torch.int32)
    expected = chunk.chunk_attention_(**on_cpu, head_layout=layout)
    actual = chunk.chunk_attention_(**on_gpu, head_layout=layout)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.cpu(), expected, rtol=4 * unit, atol=4 * unit)
    torch.testing.assert_close(on_gpu["facts"].cpu(), on_cpu["facts"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("garbage", [chunk.NAN, chunk.INF])
def test_chunk_attention_reads_nothing_of_empty_slots(garbage):
    on_cpu = chunk.with_holes(chunk.case(T=66, Q=20, D=16), 66, 3, 2, (0, 7, 64, 65), garbage)
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in on_cpu.items()}
    expected, actual = chunk.chunk_attention_(**on_cpu), chunk.chunk_attention_(**on_gpu)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on_gpu["facts"].cpu(), on_cpu["facts"], rtol=1e-5, atol=1e-5)


def test_chunk_attention_repeats_its_bits_and_is_captured_in_a_graph():
    arguments = {
        name: x.cuda() if isinstance(x, torch.Tensor) else x
        for name, x in chunk.case(T=500, Q=300, D=64, dtype=torch.bfloat16).items()
    }
    before = arguments["facts"].clone()
    expected = [chunk.chunk_attention_(**arguments), arguments["facts"].clone()]
    for _ in range(5):
        arguments["facts"].copy_(before)
        assert_all_same_bits([chunk.chunk_attention_(**arguments), arguments["facts"]], expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunk.chunk_attention_(**arguments)
    arguments["facts"].copy_(before)
    graph.replay()
    assert_all_same_bits([captured, arguments["facts"]], expected)


def test_many_small_rows():
    keys, values, scores = inputs(B=3000, H=8, S=40, D=4)
    assert_is(truncate(keys, values, scores, 7), expected(keys, values, scores, 7))
