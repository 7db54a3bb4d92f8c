# SPDX-License-Identifier: Apache-2.0
"""Threads change nothing but the time."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decode_case import random_case
from inputs import FLOATING, assert_all_same_bits, rows


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arguments(rows_per_batch=3):
    keys = rows(1, rows_per_batch, 9000, 72)
    return keys, keys * 2, torch.rand(1, 2 * rows_per_batch, 3, 9000), 700


@pytest.mark.parametrize("heads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(heads, threads):
    inputs = arguments(heads)
    threads(1)
    expected = torch.ops.fsdc.truncate(*inputs, include_skipped=True)
    for number in (2, 3, 8):
        threads(number)
        assert_all_same_bits(torch.ops.fsdc.truncate(*inputs, include_skipped=True), expected)


def test_calls_from_several_python_threads():
    inputs = [arguments() for _ in range(4)]
    expected = [torch.ops.fsdc.truncate(*one, include_skipped=True) for one in inputs]

    def work(i):
        return [torch.ops.fsdc.truncate(*inputs[i], include_skipped=True) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for results, wanted in zip(pool.map(work, range(4)), expected, strict=True):
            for result in results:
                assert_all_same_bits(result, wanted)


def test_the_same_bits_every_time(device):
    inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments()]
    first = torch.ops.fsdc.truncate(*inputs, include_skipped=True)
    for _ in range(5):
        assert_all_same_bits(torch.ops.fsdc.truncate(*inputs, include_skipped=True), first)


def chunk(H, T=700, Q=150, dtype=torch.float32):
    facts = torch.rand(4, 1, H, T + Q)
    query, keys, values = rows(1, 3 * H, Q, 40, dtype), rows(1, H, T + Q, 40, dtype), rows(1, H, T + Q, 40, dtype)
    return {"query": query, "keys": keys, "values": values, "scaling": 0.2, "facts": facts, "redundancy": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H", [1, 3, 8])
def test_chunk_attention_gives_the_same_bits_for_any_number_of_threads(H, dtype, threads):
    arguments, results = chunk(H, dtype=dtype), []
    for number in (1, 1, 2, 3, 7):
        threads(number)
        facts = arguments["facts"].clone()
        results.append((torch.ops.fsdc.chunk_attention_(**{**arguments, "facts": facts}), facts))
        assert_all_same_bits(results[-1], results[0])


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("B, H, slots", [(1, 1, 5000), (1, 3, 1030), (5, 4, 600)])
def test_a_decode_step_gives_the_same_bits_for_any_number_of_threads(B, H, slots, dtype, threads):
    case = random_case(B, H, 3, slots, 24, length=slots + 5, holes=0.1, entry="mean", dtype=dtype)
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        step = case.clone()
        results.append([step.run(), step.run(), *(getattr(step, name) for name in step.written)])
    for result in results[1:]:
        assert_all_same_bits(result, results[0])


def test_decode_steps_from_several_python_threads():
    cases = [random_case(1, 2, 2, 300 * (i + 1), 16) for i in range(4)]
    expected = [[case.clone().run()] for case in cases]

    def work(i):
        return [[cases[i].clone().run()] for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for results, wanted in zip(pool.map(work, range(4)), expected, strict=True):
            for result in results:
                assert_all_same_bits(result, wanted)
