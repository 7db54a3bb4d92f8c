# SPDX-License-Identifier: Apache-2.0
"""Every argument rule: the text of its error, from the operator and from the fake kernel, and that nothing is lost."""

import contextlib
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

K = dict(keys=(2, 4, 10, 8), values=(2, 4, 10, 8), scores=(2, 4, 10), cache_size=3)  # good, changed below
A = dict(scores=(2, 4, 10), weights=(2, 8, 3, 10))
C = dict(query=(2, 8, 3, 8), keys=(2, 4, 10, 8), values=(2, 4, 10, 6), scaling=1.0)

ROUNDED = "must be float32, float16, bfloat16 or float64; got int64"
TRUNCATE_ERRORS = {
    "keys rank": (dict(keys=(4, 10, 8)), "keys must be [B, H, S, D]; got sizes [4, 10, 8]"),
    "keys type": (dict(keys=torch.ones(2, 4, 10, 8, dtype=torch.int64)), f"keys {ROUNDED}"),
    "values rank": (dict(values=(2, 4, 10)), "values must be [B, H, S, D]; got sizes [2, 4, 10]"),
    "values type": (
        dict(values=torch.ones(2, 4, 10, 8, dtype=torch.float16)),
        "values must have the type of keys, float32; got float16",
    ),
    "values sizes": (
        dict(values=(2, 4, 9, 8)),
        "values must have the batch, heads and tokens of keys, [2, 4, 10]; got sizes [2, 4, 9, 8]",
    ),
    "keys layout": (
        dict(keys=torch.ones(2, 4, 8, 10).mT),
        "keys must have a contiguous last dimension; got strides [320, 80, 1, 10]; call .contiguous()",
    ),
    "values layout": (
        dict(values=torch.ones(2, 4, 10, 16)[..., ::2]),
        "values must have a contiguous last dimension; got strides [640, 160, 16, 2]; call .contiguous()",
    ),
    "scores rank": (
        dict(scores=(2, 10)),
        "scores must be [B, H, S], or attention weights [B, Hq, Q, S]; got sizes [2, 10]",
    ),
    "scores type": (dict(scores=torch.ones(2, 4, 10, dtype=torch.int64)), f"scores {ROUNDED}"),
    "scores sizes": (dict(scores=(2, 8, 10)), "scores must be [B, H, S] = [2, 4, 10]; got sizes [2, 8, 10]"),
    "weights sizes": (
        dict(scores=(2, 8, 3, 11)),
        "scores must be [B, Hq, Q, S] with B = 2 and S = 10; got sizes [2, 8, 3, 11]",
    ),
    "weights heads": (dict(scores=(2, 6, 3, 10)), "scores must have a multiple of the 4 KV heads; got 6 heads"),
    "no weights heads": (dict(scores=(2, 0, 3, 10)), "scores must have a multiple of the 4 KV heads; got 0 heads"),
    "cache_size": (dict(cache_size=0), "cache_size must be at least 1; got 0"),
    "negative cache_size": (dict(cache_size=-5), "cache_size must be at least 1; got -5"),
    "cache_size with skipped": (
        dict(cache_size=1, include_skipped=True),
        "cache_size must be at least 2 with include_skipped; got 1",
    ),
    "tokens": (
        dict(
            keys=torch.ones(1).expand(1, 1, 2**31, 1),
            values=torch.ones(1).expand(1, 1, 2**31, 1),
            scores=torch.ones(1).expand(1, 1, 2**31),
        ),
        "keys must have fewer than 2147483648 tokens; got 2147483648",
    ),
}
ACCUMULATE_ERRORS = {
    "scores rank": (dict(scores=(2, 10)), "scores must be [B, H, S]; got sizes [2, 10]"),
    "scores type": (dict(scores=torch.ones(2, 4, 10).half()), "scores must be float32; got float16"),
    "weights rank": (dict(weights=(2, 4, 10)), "weights must be [B, Hq, Q, S]; got sizes [2, 4, 10]"),
    "weights type": (dict(weights=torch.ones(2, 8, 3, 10, dtype=torch.int64)), f"weights {ROUNDED}"),
    "weights sizes": (
        dict(weights=(1, 8, 3, 10)),
        "weights must be [B, Hq, Q, S] with B = 2 and S = 10; got sizes [1, 8, 3, 10]",
    ),
    "weights heads": (dict(weights=(2, 5, 3, 10)), "weights must have a multiple of the 4 KV heads; got 5 heads"),
    "overlapping scores": (
        dict(scores=torch.ones(2, 1, 10).expand(2, 4, 10)),
        "scores must not overlap itself in memory, it is written to; got strides [10, 0, 1]; call .clone()",
    ),
    "query_weights type": (
        dict(query_weights=torch.ones(2, 3).double()),
        "query_weights must be float32; got float64",
    ),
    "query_weights sizes": (
        dict(query_weights=(2, 4)),
        "query_weights must be [B, Q] = [2, 3]; got sizes [2, 4]",
    ),
    "carry type": (dict(carry=torch.ones(2).half()), "carry must be float32; got float16"),
    "carry sizes": (dict(carry=(2, 1)), "carry must be [B] = [2]; got sizes [2, 1]"),
}


def entry(**changed):
    sums = dict(skipped_keys=(2, 4, 8), skipped_values=(2, 4, 6), skipped_count=torch.ones(2, 4, dtype=torch.int32))
    return {**sums, "lost": (2, 4), **changed}


FLAT = dict(keys=(2, 40, 8), values=(2, 40, 6), head_layout=torch.tensor([[0, 7], [10, 7], [20, 7], [30, 7]]).int())
CHUNK_ERRORS = {
    "query rank": (dict(query=(8, 3, 8)), "query must be [B, Hq, Q, D]; got sizes [8, 3, 8]"),
    "query type": (dict(query=torch.ones(2, 8, 3, 8, dtype=torch.int64)), f"query {ROUNDED}"),
    "query layout": (
        dict(query=torch.ones(2, 8, 8, 3).mT),
        "query must have a contiguous last dimension; got strides [192, 24, 1, 3]; call .contiguous()",
    ),
    "keys rank": (dict(keys=(2, 40, 8)), "keys must be [B, H, S, D]; got sizes [2, 40, 8]"),
    "flat keys rank": (
        {**FLAT, "keys": (2, 4, 10, 8)},
        "keys must be [B, rows, D] with a head_layout; got sizes [2, 4, 10, 8]",
    ),
    "values rank": (dict(values=(2, 4, 6)), "values must be [B, H, S, Dv]; got sizes [2, 4, 6]"),
    "flat values rank": (
        {**FLAT, "values": (2, 4, 10, 6)},
        "values must be [B, rows, Dv] with a head_layout; got sizes [2, 4, 10, 6]",
    ),
    "keys sizes": (dict(keys=(2, 4, 10, 9)), "keys must be [B, H, S, D] = [2, 4, 10, 8]; got sizes [2, 4, 10, 9]"),
    "flat keys sizes": ({**FLAT, "keys": (1, 40, 8)}, "keys must be [B, rows, D] = [2, 40, 8]; got sizes [1, 40, 8]"),
    "values sizes": (dict(values=(2, 4, 9, 6)), "values must be [B, H, S, Dv] = [2, 4, 10, 6]; got sizes [2, 4, 9, 6]"),
    "flat values sizes": (
        {**FLAT, "values": (2, 39, 6)},
        "values must be [B, rows, Dv] = [2, 40, 6]; got sizes [2, 39, 6]",
    ),
    "keys type": (
        dict(keys=torch.ones(2, 4, 10, 8).half()),
        "keys must have the type of query, float32; got float16",
    ),
    "values type": (
        dict(values=torch.ones(2, 4, 10, 6).double()),
        "values must have the type of query, float32; got float64",
    ),
    "keys layout": (
        dict(keys=torch.ones(2, 4, 8, 10).mT),
        "keys must have a contiguous last dimension; got strides [320, 80, 1, 10]; call .contiguous()",
    ),
    "heads": (dict(query=(2, 6, 3, 8)), "query must have a multiple of the 4 KV heads; got 6 heads"),
    "new tokens": (dict(query=(2, 8, 11, 8)), "keys must have at least the 11 new tokens; got 10"),
    "facts sizes": (dict(facts=(3, 2, 4, 10)), "facts must be [4, B, H, S] = [4, 2, 4, 10]; got sizes [3, 2, 4, 10]"),
    "flat facts sizes": (
        {**FLAT, "facts": (4, 2, 4, 10)},
        "facts must be [4, B, rows] = [4, 2, 40]; got sizes [4, 2, 4, 10]",
    ),
    "facts type": (dict(facts=torch.ones(4, 2, 4, 10).double()), "facts must be float32; got float64"),
    "facts layout": (
        dict(facts=torch.ones(4, 2, 10, 4).mT),
        "facts must have a contiguous last dimension; got strides [80, 40, 1, 4]; call .contiguous()",
    ),
    "overlapping facts": (
        dict(facts=torch.ones(4, 2, 1, 10).expand(4, 2, 4, 10)),
        "facts must not overlap itself in memory, it is written to; got strides [20, 10, 0, 1]; call .clone()",
    ),
    "redundancy": (dict(redundancy=True), "redundancy must be False without facts; got True"),
    "positions sizes": (
        dict(positions=torch.ones(2, 4, 7, dtype=torch.int32)),
        "positions must be [B, H, S] = [2, 4, 10]; got sizes [2, 4, 7]",
    ),
    "flat positions sizes": (
        {**FLAT, "positions": torch.ones(2, 39, dtype=torch.int32)},
        "positions must be [B, rows] = [2, 40]; got sizes [2, 39]",
    ),
    "positions type": (
        dict(positions=torch.ones(2, 4, 10, dtype=torch.int64)),
        "positions must be int32; got int64",
    ),
    "query_weights sizes": (dict(query_weights=(2, 4)), "query_weights must be [B, Q] = [2, 3]; got sizes [2, 4]"),
    "query_weights type": (dict(query_weights=torch.ones(2, 3).half()), "query_weights must be float32; got float16"),
    "carry sizes": (dict(carry=(3,)), "carry must be [B] = [2]; got sizes [3]"),
    "carry type": (dict(carry=torch.ones(2).double()), "carry must be float32; got float64"),
    "sees sizes": (
        dict(sees=torch.ones(2, 3, 10, dtype=torch.bool)),
        "sees must be [B, Q, Q] = [2, 3, 3]; got sizes [2, 3, 10]",
    ),
    "sees type": (dict(sees=(2, 3, 3)), "sees must be bool; got float32"),
    "sinks sizes": (dict(sinks=(4,)), "sinks must be [Hq] = [8]; got sizes [4]"),
    "sinks type": (dict(sinks=torch.ones(8, dtype=torch.int64)), f"sinks {ROUNDED}"),
    "sinks layout": (
        dict(sinks=torch.ones(16)[::2]),
        "sinks must have a contiguous last dimension; got strides [2]; call .contiguous()",
    ),
    "softcap": (dict(softcap=0.0), "softcap must be above 0; got 0"),
    "head_layout rank": (
        {**FLAT, "head_layout": torch.ones(8, dtype=torch.int32)},
        "head_layout must be [H, 2]; got sizes [8]",
    ),
    "head_layout sizes": (
        {**FLAT, "head_layout": torch.ones(4, 3, dtype=torch.int32)},
        "head_layout must be [H, 2] = [4, 2]; got sizes [4, 3]",
    ),
    "head_layout type": (
        {**FLAT, "head_layout": torch.ones(4, 2, dtype=torch.int64)},
        "head_layout must be int32; got int64",
    ),
    "head_layout layout": (
        {**FLAT, "head_layout": torch.ones(2, 4, dtype=torch.int32).mT},
        "head_layout must be contiguous; got strides [1, 4]",
    ),
    "part of an entry": (
        dict(skipped_keys=(2, 4, 8)),
        "skipped_keys, skipped_values and skipped_count must be given together; got some of them",
    ),
    "lost alone": (dict(lost=(2, 4)), "lost must be given with skipped_keys only; got it alone"),
    "skipped_keys sizes": (
        entry(skipped_keys=(2, 4, 6)),
        "skipped_keys must be [B, H, D] = [2, 4, 8]; got sizes [2, 4, 6]",
    ),
    "skipped_values sizes": (
        entry(skipped_values=(2, 4, 8)),
        "skipped_values must be [B, H, Dv] = [2, 4, 6]; got sizes [2, 4, 8]",
    ),
    "skipped_values type": (
        entry(skipped_values=torch.ones(2, 4, 6).double()),
        "skipped_values must be float32; got float64",
    ),
    "skipped_keys layout": (
        entry(skipped_keys=torch.ones(2, 8, 4).mT),
        "skipped_keys must be contiguous; got strides [32, 1, 4]",
    ),
    "skipped_count type": (entry(skipped_count=(2, 4)), "skipped_count must be int32; got float32"),
    "lost sizes": (entry(lost=(2, 8)), "lost must be [B, H] = [2, 4]; got sizes [2, 8]"),
}
OPERATORS = {
    "truncate": (K, TRUNCATE_ERRORS),
    "accumulate_scores_": (A, ACCUMULATE_ERRORS),
    "chunk_attention_": (C, CHUNK_ERRORS),
}
CASES = [
    pytest.param(op, {**good, **changed}, f"{op}: {text}", id=f"{op} {name}")
    for op, (good, errors) in OPERATORS.items()
    for name, (changed, text) in errors.items()
]


def on(device, arguments):
    made = {name: torch.ones(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in made.items()}


@pytest.mark.parametrize("op, arguments, text", CASES)
def test_operator(op, arguments, text, device):
    arguments = on(device, arguments)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.numel() < 1e6}
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        getattr(torch.ops.fsdc, op)(**arguments)
    for name, x in before.items():
        assert torch.equal(arguments[name], x)


@pytest.mark.parametrize("op, arguments, text", CASES)
def test_fake_kernel_says_the_same(op, arguments, text):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        arguments = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in on("cpu", arguments).items()
        }
        with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
            getattr(torch.ops.fsdc, op)(**arguments)


MIXED = [
    ("truncate", "keys", "values must be on the device of keys, {device}; got cpu"),
    ("truncate", "values", "values must be on the device of keys, cpu; got {device}"),
    ("truncate", "scores", "scores must be on the device of keys, cpu; got {device}"),
    ("accumulate_scores_", "scores", "weights must be on the device of scores, {device}; got cpu"),
    ("accumulate_scores_", "weights", "weights must be on the device of scores, cpu; got {device}"),
    ("accumulate_scores_", "query_weights", "query_weights must be on the device of scores, cpu; got {device}"),
    ("accumulate_scores_", "carry", "carry must be on the device of scores, cpu; got {device}"),
    ("chunk_attention_", "keys", "keys must be on the device of query, cpu; got {device}"),
    ("chunk_attention_", "facts", "facts must be on the device of query, cpu; got {device}"),
    ("chunk_attention_", "skipped_count", "skipped_count must be on the device of query, cpu; got {device}"),
]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
@pytest.mark.parametrize("elsewhere", ["meta", "cuda:0"])
@pytest.mark.parametrize("op, name, text", MIXED)
def test_devices_are_not_mixed(op, name, text, elsewhere, mode):
    if mode is not FakeTensorMode and elsewhere != "meta" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with mode():
        more = {
            "accumulate_scores_": dict(query_weights=(2, 3), carry=(2,)),
            "chunk_attention_": entry(facts=(4, 2, 4, 10)),
        }
        arguments = on("cpu", {**OPERATORS[op][0], **more.get(op, {})})
        arguments[name] = torch.empty_like(arguments[name], device=elsewhere)
        with pytest.raises(RuntimeError, match=f"^{re.escape(f'{op}: ' + text.format(device=elsewhere))}$"):
            getattr(torch.ops.fsdc, op)(**arguments)


def needing_gradients(op):
    arguments = on("cpu", OPERATORS[op][0])
    arguments[{"truncate": "scores", "accumulate_scores_": "weights"}.get(op, "query")].requires_grad_()
    return arguments


@pytest.mark.parametrize("op", OPERATORS)
def test_gradients_are_refused(op):
    text = f"{op}: inputs must not require gradients, there is no backward; got an input with requires_grad=True"
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}"):
        getattr(torch.ops.fsdc, op)(**needing_gradients(op))


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_inputs_may_require_gradients(op, mode):
    arguments = needing_gradients(op)
    with mode():
        outputs = getattr(torch.ops.fsdc, op)(**arguments)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs or ()
    assert not any(x.requires_grad for x in outputs)


def test_forward_mode_gradients_are_refused():
    arguments = on("cpu", A)

    def accumulate(weights):
        scores = torch.zeros(2, 4, 10)
        torch.ops.fsdc.accumulate_scores_(scores, weights)
        return scores

    with pytest.raises(RuntimeError, match="inputs must not require gradients"):
        torch.func.jvp(accumulate, (arguments["weights"],), (torch.ones_like(arguments["weights"]),))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_graph_that_saved_the_scores_notices_the_write(mode):
    scores, factor = torch.ones(2, 4, 10), torch.ones(2, 4, 10, requires_grad=True)
    total = (scores * factor).sum()
    with mode():
        torch.ops.fsdc.accumulate_scores_(scores, torch.ones(2, 8, 3, 10))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


NAMED = [torch.complex64, torch.uint16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bool, torch.int8]


@pytest.mark.parametrize("dtype", [*NAMED, torch.float4_e2m1fn_x2], ids=str)
def test_types_have_the_same_names_everywhere(dtype):
    keys, scores = torch.empty(1, 1, 4, 2, dtype=dtype), torch.zeros(1, 1, 4)
    texts = []
    for convert in (torch.Tensor.clone, FakeTensorMode().from_tensor):
        with pytest.raises(RuntimeError) as error:
            torch.ops.fsdc.truncate(convert(keys), convert(keys), convert(scores), 2)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert texts[0].endswith(f"got {str(dtype).removeprefix('torch.')}")


def test_empty_scores_of_any_stride_are_fine():
    torch.ops.fsdc.accumulate_scores_(torch.empty(2, 1, 0).expand(2, 3, 0), torch.empty(2, 3, 1, 0))


def test_what_is_written_shares_no_memory():
    facts = torch.ones(4, 2, 4, 10)
    arguments = {**on("cpu", C), "facts": facts, "query": facts.view(-1)[:192].view(2, 4, 3, 8)}
    text = (
        "chunk_attention_: facts must share no memory with other arguments, it is written to; got one that overlaps "
        "query; call .clone()"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        torch.ops.fsdc.chunk_attention_(**arguments)


@pytest.mark.parametrize("row, held", [(-1, 7), (0, -1), (31, 7), (30, 8)])
def test_a_head_layout_lies_within_the_rows(row, held):
    arguments = on("cpu", {**C, **FLAT})
    arguments["head_layout"] = torch.tensor([[0, 7], [10, 7], [20, 7], [row, held]], dtype=torch.int32)
    text = (
        "chunk_attention_: head_layout must hold (first row, tokens held) within the 40 rows of keys; got "
        f"[{row}, {held}] for head 3"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        torch.ops.fsdc.chunk_attention_(**arguments)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_a_head_layout_is_on_the_cpu(mode):
    with mode():
        arguments = on("cpu", {**C, **FLAT})
        arguments["head_layout"] = torch.empty(4, 2, dtype=torch.int32, device="meta")
        text = "chunk_attention_: head_layout must be on the CPU, where it is read; got meta"
        with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
            torch.ops.fsdc.chunk_attention_(**arguments)
