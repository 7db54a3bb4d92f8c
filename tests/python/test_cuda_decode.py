# SPDX-License-Identifier: Apache-2.0
"""decode_attention_ where only a GPU can show it: launch shapes, streams, graphs, devices. Skipped without one."""

import pytest
import torch
from decode_case import WRITTEN, Case, assert_same_step, check, random_case
from inputs import assert_all_same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
UNEQUAL = dict(B=1, H=3, G=4, D=64, slots=[100, 2000, 7], length=3000)  # its runs go through memory
EQUAL = dict(B=1, H=8, G=4, N=1024, D=128)


def state(case: Case) -> list[torch.Tensor]:
    return [getattr(case, name).cpu() for name in WRITTEN if case.arguments.get(name) is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, H, N", [(1, 1, 1), (1, 8, 1024), (1, 2, 60_000), (40, 8, 300), (2, 2, 5000)])
def test_every_launch_shape(B, H, N, dtype):
    check(random_case(B, H, 4, N, 64, dtype=dtype, device="cuda", entry="mean"))
    check(random_case(B, H, 9, N, 16, length=N // 2, dtype=dtype, device="cuda", holes=0.1))


@pytest.mark.parametrize("length", [0, 50, 3000])
def test_unequal_heads(length):
    check(random_case(**{**UNEQUAL, "length": length}, device="cuda", dtype=torch.float16))
    check(random_case(B=40, H=3, slots=[30, 700, 5], length=length, device="cuda"))


@pytest.mark.parametrize("shape", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_same_bits_on_every_run(shape):
    case = random_case(**shape, device="cuda", dtype=torch.bfloat16)
    first = case.clone()
    output = first.run()
    for _ in range(20):
        again = case.clone()
        assert_all_same_bits([again.run(), *state(again)], [output, *state(first)])


@pytest.mark.parametrize("shape", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_two_streams_at_once(shape):
    cases = [random_case(**shape, device="cuda", seen=torch.tensor([5000], dtype=torch.int32)) for _ in range(2)]
    expected = [case.clone() for case in cases]
    outputs = [[case.run() for _ in range(30)] for case in expected]
    streams = [torch.cuda.Stream() for _ in cases]
    actual = [[], []]
    torch.cuda.synchronize()
    for _ in range(30):
        for case, stream, found in zip(cases, streams, actual, strict=True):
            with torch.cuda.stream(stream):
                found.append(case.run())
    torch.cuda.synchronize()
    for one, other, found, wanted in zip(cases, expected, actual, outputs, strict=True):
        assert_all_same_bits([*found, *state(one)], [*wanted, *state(other)])


@pytest.mark.parametrize("shape", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_is_captured_in_a_graph_and_replayed_with_new_tokens(shape):
    case = random_case(**shape, device="cuda")
    case.clone().run()
    torch.cuda.synchronize()
    graph, eager = torch.cuda.CUDAGraph(), case.clone()
    with torch.cuda.graph(graph):
        output = case.run()
    for _ in range(5):
        for name in ("query", "new_keys", "new_values"):
            getattr(case, name).copy_(torch.randn_like(getattr(case, name)))
            getattr(eager, name).copy_(getattr(case, name))
        graph.replay()
        assert_all_same_bits([output, *state(case)], [eager.run(), *state(eager)])


def test_steps_of_the_cpu():
    case = random_case(**EQUAL, device="cuda", entry="mean", dtype=torch.float64)
    other = case.map(lambda _, x: x.cpu())
    for _ in range(5):
        case.run(), other.run()
    assert_same_step(case, other)


def test_more_tokens_than_seen_can_count_are_refused():
    case = random_case(**EQUAL, device="cuda")
    before = case.clone()
    text = r"^decode_attention_: length must be below 2\^29 on CUDA with 8 KV heads; got 536870912$"
    with pytest.raises(RuntimeError, match=text):
        case.with_(length=2**29).run()
    assert_all_same_bits(state(case), state(before))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_runs_on_the_device_of_its_inputs():
    with torch.cuda.device(0):
        check(random_case(**UNEQUAL, device="cuda:1"))
