# SPDX-License-Identifier: Apache-2.0
"""The operators under torch.library.opcheck, torch.compile and torch.export."""

import pytest
import torch
import torch._inductor.config
from decode_case import STATE, random_case
from inputs import FLOATING, assert_all_same_bits, rows
from test_chunk_attention import OPTIONS, case

TRUNCATE = torch.ops.fsdc.truncate.default
ACCUMULATE = torch.ops.fsdc.accumulate_scores_.default
CHUNK = torch.ops.fsdc.chunk_attention_.default
DECODE = torch.ops.fsdc.decode_attention_.default


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("scores", [(2, 4, 20), (2, 8, 3, 20)], ids=["scores", "weights"])
@pytest.mark.parametrize("cache_size, include_skipped", [(7, False), (7, True), (20, True), (99, False)])
def test_opcheck_truncate(cache_size, include_skipped, scores, dtype, device):
    keys, values = rows(2, 4, 20, 8, dtype, device), rows(2, 4, 20, 6, dtype, device)
    arguments = (keys, values, torch.rand(scores, device=device).to(dtype), cache_size)
    torch.library.opcheck(TRUNCATE, arguments, {"include_skipped": include_skipped})


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_accumulate_scores(optional, dtype, device):
    weights = torch.rand(2, 8, 3, 20, device=device).to(dtype)
    more = (torch.rand(2, 3, device=device), torch.rand(2, device=device)) if optional else ()
    torch.library.opcheck(ACCUMULATE, (torch.rand(2, 4, 20, device=device), weights, *more))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("more", [{}, {"entry": "mean", "softcap": 3.0}, {"slots": [5, 12], "length": 7}], ids=str)
def test_opcheck_decode_attention(more, dtype):
    optional = {"sinks": torch.zeros(4), "valid": torch.tensor([True, False]), "protected": torch.tensor([False, True])}
    for arguments in (
        random_case(dtype=dtype, **more).arguments,
        random_case(dtype=dtype, **more, **optional).arguments,
    ):
        torch.library.opcheck(DECODE, (), arguments)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_one_graph_for_any_length(include_skipped, device):
    def step(keys, values, scores, weights):
        scores = scores + 1
        torch.ops.fsdc.accumulate_scores_(scores, weights)
        return TRUNCATE(keys * 2, values, scores, 64, include_skipped=include_skipped)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    # Without caches: torch 2.11 adds guards of its own when it loads a graph from its cache.
    no_caches = torch._inductor.config.patch(force_disable_caches=True)
    with torch.no_grad(), no_caches, torch._dynamo.config.patch(error_on_recompile=True):
        for S in (40, 63, 64, 65, 300):
            keys, values = rows(2, 4, S, 8, device=device), rows(2, 4, S, 8, device=device)
            scores = torch.rand(2, 4, S, device=device)
            weights = torch.rand(2, 8, 3, S, device=device)
            arguments = (keys, values, scores, weights)
            assert_all_same_bits(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize("bounds", [{"min": 2, "max": 4096}, {}], ids=["bounded", "unbounded"])
def test_export(bounds, device):
    class Truncate(torch.nn.Module):
        def forward(self, keys, scores):
            return TRUNCATE(keys, keys, scores, 16)

    S = torch.export.Dim("S", **bounds)
    arguments = (rows(1, 2, 50, 4, device=device), torch.rand(1, 2, 50, device=device))
    program = torch.export.export(Truncate(), arguments, dynamic_shapes={"keys": {2: S}, "scores": {2: S}})
    for length in (10, 16, 17, 200):
        keys, scores = rows(1, 2, length, 4, device=device), torch.rand(1, 2, length, device=device)
        assert_all_same_bits(program.module()(keys, scores), TRUNCATE(keys, keys, scores, 16))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck_chunk_attention(options, dtype):
    arguments = case(B=2, T=11, Q=5, dtype=dtype, **options)
    torch.library.opcheck(CHUNK, [arguments.pop(name) for name in ("query", "keys", "values")], arguments)


def test_opcheck_chunk_attention_of_different_heads():
    arguments = case(H=1, T=25, Q=5)
    flat = [arguments["query"].repeat(1, 2, 1, 1), arguments["keys"][:, 0], arguments["values"][:, 0]]
    layout = torch.tensor([[0, 3], [8, 17]], dtype=torch.int32)
    torch.library.opcheck(CHUNK, flat, {"scaling": 1.0, "facts": arguments["facts"][:, :, 0], "head_layout": layout})


def attend(query, keys, values, facts):
    facts = facts + 1
    return CHUNK(query * 2, keys, values, scaling=0.5, facts=facts, redundancy=True), facts


def test_one_graph_of_chunk_attention():
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    no_caches = torch._inductor.config.patch(force_disable_caches=True)
    with torch.no_grad(), no_caches, torch._dynamo.config.patch(error_on_recompile=True):
        for T, Q in ((40, 5), (0, 64), (64, 65), (300, 7)):
            arguments = [x for name, x in case(T=T, Q=Q).items() if name not in ("scaling", "redundancy")]
            assert_all_same_bits(compiled(*arguments), attend(*arguments))


def test_export_of_chunk_attention():
    class Attend(torch.nn.Module):
        def forward(self, query, keys, values, facts):
            return attend(query, keys, values, facts)

    arguments = [x for name, x in case(T=40, Q=9).items() if name not in ("scaling", "redundancy")]
    with torch.no_grad():
        exported = torch.export.export(Attend(), tuple(arguments)).module()
        assert_all_same_bits(exported(*arguments), attend(*arguments))


def decode_steps(operator, case, steps: int) -> tuple[list, set]:
    """Outputs of so many steps with numbers of their own, and the addresses that the state had on the way."""
    generator, outputs, addresses = torch.Generator().manual_seed(1), [], set()
    for _ in range(steps):
        query, new_keys, new_values = (
            torch.randn(x.shape, generator=generator).to(x.dtype) for x in (case.query, case.new_keys, case.new_values)
        )
        outputs.append(operator(query, new_keys, new_values, *(getattr(case, name) for name in STATE)))
        addresses.add(tuple(getattr(case, name).data_ptr() for name in case.written))
    return outputs, addresses


def decode_step(case):
    """A step of a model around the operator, that looks at all slots: its shapes do not know how many are in use."""
    first = ("query", "new_keys", "new_values", *STATE)
    rest = {name: x for name, x in case.arguments.items() if name not in first} | {"length": 12}

    def step(query, new_keys, new_values, *state):
        return DECODE(query * 0.5, new_keys, new_values + 1, *state, **rest) * 2

    return step


@pytest.mark.parametrize("entry", [None, "mean"])
def test_one_graph_and_fixed_addresses_for_a_hundred_steps(entry):
    case = random_case(length=0, entry=entry)
    eager = case.clone()
    torch._dynamo.reset()
    compiled = torch.compile(decode_step(case), fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        outputs, addresses = decode_steps(compiled, case, 100)
        expected, _ = decode_steps(decode_step(eager), eager, 100)
    assert len(addresses) == 1
    assert_all_same_bits(outputs, expected)
    assert_all_same_bits([getattr(case, x) for x in case.written], [getattr(eager, x) for x in case.written])
    assert (case.positions[:, :, :12] >= 0).all() and case.seen.tolist() == [100, 100]


def test_export_of_a_step():
    case = random_case(length=0)
    eager = case.clone()

    class Step(torch.nn.Module):
        forward = staticmethod(decode_step(case))

    state = [getattr(case, name) for name in STATE]
    program = torch.export.export(Step(), (case.query, case.new_keys, case.new_values, *(x.clone() for x in state)))
    assert sum("decode_attention_" in str(node.target) for node in program.graph.nodes) == 1
    outputs, _ = decode_steps(program.module(), case, 20)
    expected, _ = decode_steps(decode_step(eager), eager, 20)
    assert_all_same_bits(outputs, expected)
    assert_all_same_bits(state, [getattr(eager, name) for name in STATE])
