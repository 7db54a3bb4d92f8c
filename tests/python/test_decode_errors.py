# SPDX-License-Identifier: Apache-2.0
"""Every argument rule of decode_attention_: its text, from operator and fake kernel, and that nothing is written."""

import re

import pytest
import torch
from decode_case import WRITTEN, Case, random_case
from inputs import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

B, H, N, D, DV = 2, 3, 4, 8, 6


def good() -> Case:
    """[2, 6, 1, 8] queries and 5 slots of 3 KV heads, with everything that can be given but a head_layout."""
    flags = {name: torch.ones(B, dtype=torch.bool) for name in ("valid", "protected")}
    return random_case(B, H, 2, N, D, DV, entry="mean", sinks=torch.zeros(6), softcap=1.0, **flags)


def unequal() -> Case:
    return random_case(B, H, 2, N, D, DV, slots=[4, 2, 3])


def ones(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(sizes, dtype=dtype)


def columns(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of these sizes, but not contiguous in the last dimension."""
    return torch.ones(*sizes[:-1], 2 * sizes[-1], dtype=dtype)[..., ::2]


FLOATING = "must be float32, float16, bfloat16 or float64; got int64"
LAST = "must have a contiguous last dimension; got strides"
INT32, INT64, BOOL, HALF, DOUBLE = torch.int32, torch.int64, torch.bool, torch.float16, torch.float64
ERRORS = {
    "query rank": (dict(query=ones(2, 6, 8)), "query must be [B, Hq, 1, D]; got sizes [2, 6, 8]"),
    "query type": (dict(query=ones(2, 6, 1, 8, dtype=INT64)), f"query {FLOATING}"),
    "query tokens": (
        dict(query=ones(2, 6, 2, 8)),
        "query must be [B, Hq, 1, D] = [2, 6, 1, 8]; got sizes [2, 6, 2, 8]",
    ),
    "query layout": (dict(query=columns(2, 6, 1, 8)), f"query {LAST} [96, 16, 16, 2]; call .contiguous()"),
    "query heads": (dict(query=ones(2, 5, 1, 8)), "query must have a multiple of the 3 KV heads; got 5 heads"),
    "no query heads": (dict(query=ones(2, 0, 1, 8)), "query must have a multiple of the 3 KV heads; got 0 heads"),
    "new_keys rank": (dict(new_keys=ones(2, 3, 8)), "new_keys must be [B, H, 1, D]; got sizes [2, 3, 8]"),
    "new_keys sizes": (
        dict(new_keys=ones(2, 3, 1, 7)),
        "new_keys must be [B, H, 1, D] = [2, 3, 1, 8]; got sizes [2, 3, 1, 7]",
    ),
    "new_keys tokens": (
        dict(new_keys=ones(2, 3, 2, 8)),
        "new_keys must be [B, H, 1, D] = [2, 3, 1, 8]; got sizes [2, 3, 2, 8]",
    ),
    "new_keys type": (
        dict(new_keys=ones(2, 3, 1, 8, dtype=HALF)),
        "new_keys must have the type of query, float32; got float16",
    ),
    "new_keys layout": (dict(new_keys=columns(2, 3, 1, 8)), f"new_keys {LAST} [48, 16, 16, 2]; call .contiguous()"),
    "new_values rank": (dict(new_values=ones(2, 3, 6)), "new_values must be [B, H, 1, Dv]; got sizes [2, 3, 6]"),
    "new_values sizes": (
        dict(new_values=ones(2, 2, 1, 6)),
        "new_values must be [B, H, 1, Dv] = [2, 3, 1, 6]; got sizes [2, 2, 1, 6]",
    ),
    "new_values type": (
        dict(new_values=ones(2, 3, 1, 6, dtype=HALF)),
        "new_values must have the type of query, float32; got float16",
    ),
    "new_values layout": (
        dict(new_values=columns(2, 3, 1, 6)),
        f"new_values {LAST} [36, 12, 12, 2]; call .contiguous()",
    ),
    "keys rank": (dict(keys=ones(2, 15, 8)), "keys must be [B, H, N + 1, D]; got sizes [2, 15, 8]"),
    "keys sizes": (
        dict(keys=ones(2, 3, 5, 9)),
        "keys must be [B, H, N + 1, D] = [2, 3, 5, 8]; got sizes [2, 3, 5, 9]",
    ),
    "keys slots": (
        dict(keys=ones(2, 3, 1, 8)),
        "keys must have at least one slot and the free one; got sizes [2, 3, 1, 8]",
    ),
    "keys type": (dict(keys=ones(2, 3, 5, 8, dtype=HALF)), "keys must have the type of query, float32; got float16"),
    "keys layout": (dict(keys=columns(2, 3, 5, 8)), f"keys {LAST} [240, 80, 16, 2]; call .contiguous()"),
    "values sizes": (
        dict(values=ones(2, 3, 4, 6)),
        "values must be [B, H, N + 1, Dv] = [2, 3, 5, 6]; got sizes [2, 3, 4, 6]",
    ),
    "values type": (
        dict(values=ones(2, 3, 5, 6, dtype=HALF)),
        "values must have the type of query, float32; got float16",
    ),
    "values layout": (dict(values=columns(2, 3, 5, 6)), f"values {LAST} [180, 60, 12, 2]; call .contiguous()"),
    "facts sizes": (
        dict(facts=ones(3, 2, 3, 5)),
        "facts must be [4, B, H, N + 1] = [4, 2, 3, 5]; got sizes [3, 2, 3, 5]",
    ),
    "facts type": (dict(facts=ones(4, 2, 3, 5, dtype=DOUBLE)), "facts must be float32; got float64"),
    "facts layout": (dict(facts=columns(4, 2, 3, 5)), f"facts {LAST} [60, 30, 10, 2]; call .contiguous()"),
    "positions sizes": (
        dict(positions=ones(2, 3, 4, dtype=INT32)),
        "positions must be [B, H, N + 1] = [2, 3, 5]; got sizes [2, 3, 4]",
    ),
    "positions type": (dict(positions=ones(2, 3, 5, dtype=INT64)), "positions must be int32; got int64"),
    "positions layout": (
        dict(positions=columns(2, 3, 5, dtype=INT32)),
        f"positions {LAST} [30, 10, 2]; call .contiguous()",
    ),
    "seen sizes": (dict(seen=ones(3, dtype=INT32)), "seen must be [B] = [2]; got sizes [3]"),
    "seen type": (dict(seen=ones(2, dtype=INT64)), "seen must be int32; got int64"),
    "half an entry": (
        dict(lost=None),
        "skipped_keys, skipped_values, skipped_count and lost must be given together; got some of them",
    ),
    "skipped_keys sizes": (
        dict(skipped_keys=ones(2, 3, 1, 8)),
        "skipped_keys must be [B, H, D] = [2, 3, 8]; got sizes [2, 3, 1, 8]",
    ),
    "skipped_keys type": (dict(skipped_keys=ones(2, 3, 8, dtype=DOUBLE)), "skipped_keys must be float32; got float64"),
    "skipped_keys layout": (
        dict(skipped_keys=columns(2, 3, 8)),
        "skipped_keys must be contiguous; got strides [48, 16, 2]",
    ),
    "skipped_values sizes": (
        dict(skipped_values=ones(2, 3, 8)),
        "skipped_values must be [B, H, Dv] = [2, 3, 6]; got sizes [2, 3, 8]",
    ),
    "skipped_count type": (dict(skipped_count=ones(2, 3)), "skipped_count must be int32; got float32"),
    "lost sizes": (dict(lost=ones(2, 6)), "lost must be [B, H] = [2, 3]; got sizes [2, 6]"),
    "lost type": (dict(lost=ones(2, 3, dtype=DOUBLE)), "lost must be float32; got float64"),
    "valid sizes": (dict(valid=ones(2, 1, dtype=BOOL)), "valid must be [B] = [2]; got sizes [2, 1]"),
    "valid type": (dict(valid=ones(2)), "valid must be bool; got float32"),
    "protected sizes": (dict(protected=ones(1, dtype=BOOL)), "protected must be [B] = [2]; got sizes [1]"),
    "protected type": (dict(protected=ones(2, dtype=INT64)), "protected must be bool; got int64"),
    "sinks sizes": (dict(sinks=ones(3)), "sinks must be [Hq] = [6]; got sizes [3]"),
    "sinks type": (dict(sinks=ones(6, dtype=INT64)), f"sinks {FLOATING}"),
    "sinks layout": (dict(sinks=columns(6)), f"sinks {LAST} [2]; call .contiguous()"),
    "length": (dict(length=-1), "length must be at least 0; got -1"),
    "sink_tokens": (dict(sink_tokens=-1), "sink_tokens and recent_tokens must be at least 0; got -1 and 2"),
    "recent_tokens": (dict(recent_tokens=-2), "sink_tokens and recent_tokens must be at least 0; got 1 and -2"),
    "softcap": (dict(softcap=0.0), "softcap must be above 0; got 0"),
    "negative softcap": (dict(softcap=-2.5), "softcap must be above 0; got -2.5"),
    **{
        f"{name} overlaps itself": (
            {name: x},
            f"{name} must not overlap itself in memory, it is written to; "
            f"got strides {list(x.stride())}; call .clone()",
        )
        for name, x in {
            "keys": ones(2, 1, 5, 8).expand(2, 3, 5, 8),
            "values": ones(1, 3, 5, 6).expand(2, 3, 5, 6),
            "facts": ones(1, 2, 3, 5).expand(4, 2, 3, 5),
            "positions": ones(1, 1, 5, dtype=INT32).expand(2, 3, 5),
            "seen": ones(1, dtype=INT32).expand(2),
        }.items()
    },
}
OF_UNEQUAL_HEADS = {
    "keys rank": (dict(keys=ones(2, 3, 5, 8)), "keys must be [B, rows, D] with a head_layout; got sizes [2, 3, 5, 8]"),
    "keys sizes": (dict(keys=ones(2, 12, 9)), "keys must be [B, rows, D] = [2, 12, 8]; got sizes [2, 12, 9]"),
    "values sizes": (dict(values=ones(2, 11, 6)), "values must be [B, rows, Dv] = [2, 12, 6]; got sizes [2, 11, 6]"),
    "facts sizes": (dict(facts=ones(4, 12)), "facts must be [4, B, rows] = [4, 2, 12]; got sizes [4, 12]"),
    "positions sizes": (
        dict(positions=ones(2, 3, 5, dtype=INT32)),
        "positions must be [B, rows] = [2, 12]; got sizes [2, 3, 5]",
    ),
    "layout sizes": (
        dict(head_layout=ones(2, 4, dtype=INT32)),
        "head_layout must be [H, 4] = [3, 4]; got sizes [2, 4]",
    ),
    "layout type": (dict(head_layout=ones(3, 4, dtype=INT64)), "head_layout must be int32; got int64"),
    "layout layout": (
        dict(head_layout=columns(3, 4, dtype=INT32)),
        "head_layout must be contiguous; got strides [8, 2]",
    ),
}
CASES = [
    pytest.param(make, changed, f"decode_attention_: {text}", id=f"{kind}{name}")
    for kind, make, errors in (("", good, ERRORS), ("unequal ", unequal, OF_UNEQUAL_HEADS))
    for name, (changed, text) in errors.items()
]


@pytest.mark.parametrize("make, changed, text", CASES)
def test_operator(make, changed, text):
    case = make().with_(**changed)
    before = case.clone()
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        case.run()
    for name in case.written:
        assert_same_bits(getattr(case, name), getattr(before, name))


@pytest.mark.parametrize("make, changed, text", CASES)
def test_fake_kernel_says_the_same(make, changed, text):
    case = make().with_(**changed)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        case = make_fake(mode, case)
        with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
            case.run()


def make_fake(mode: FakeTensorMode, case: Case) -> Case:
    return case.map(lambda _, x: mode.from_tensor(x))


@pytest.mark.parametrize("make", [good, unequal])
def test_what_is_allowed_passes_the_fake_kernel(make):
    case = make()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        output = make_fake(mode, case).run()
    assert output.shape == (B, 6, 1, DV) and output.dtype == torch.float32


@pytest.mark.parametrize(
    "layout",
    [
        [-1, 4, 0, 0],
        [0, 0, 0, 0],
        [0, 12, 0, 0],
        [2**31 - 1, 2**31 - 1, 0, 0],
        [0, 4, -1, 0],
        [0, 4, 0, -1],
        [8, 4, 0, 0],
    ],
    ids=str,
)
def test_numbers_of_a_head_layout(layout):
    case = unequal()
    case.head_layout[1] = torch.tensor(layout, dtype=INT32)
    text = (
        "decode_attention_: head_layout must hold (first row, slots, sink tokens, recent tokens) of heads one "
        f"behind the other within the 12 rows of keys; got {layout} for head 1"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        case.run()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_shares_memory_with_nobody(name):
    others = [x for x, value in good().arguments.items() if isinstance(value, torch.Tensor) and x != name]
    for other in others:
        case = good()
        size = max(getattr(case, x).nbytes for x in (name, other)) + 64
        memory = torch.zeros(size, dtype=torch.uint8)

        def placed(x: torch.Tensor, memory: torch.Tensor = memory) -> torch.Tensor:
            return memory[: x.nbytes].view(x.dtype).view(x.shape)

        shared = case.with_(**{name: placed(getattr(case, name)), other: placed(getattr(case, other))})
        with pytest.raises(RuntimeError, match=r"must share no memory with other arguments, it is written to; got one"):
            shared.run()


def test_what_is_only_read_may_share_memory():
    case = random_case(B=1, H=2, G=1)
    qkv = torch.randn(1, 2, 1, 8)
    case.with_(query=qkv, new_keys=qkv, new_values=qkv).run()


@pytest.mark.parametrize("name", ["query", "new_keys", "values", "facts", "skipped_keys", "lost"])
def test_gradients_are_refused(name):
    case = good()
    getattr(case, name).requires_grad_()
    with pytest.raises(RuntimeError, match=r"^decode_attention_: inputs must not require gradients"):
        case.run()
    with torch.no_grad():
        assert not case.run().requires_grad
    with torch.inference_mode():
        case.run()


@pytest.mark.parametrize("name", [x for x in WRITTEN if x not in ("positions", "seen", "skipped_count")])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_graph_that_saved_what_is_written_notices(mode, name):
    case = good()
    factor = torch.ones_like(getattr(case, name), requires_grad=True)
    total = (getattr(case, name) * factor).sum()
    with mode():
        case.run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_versions_of_all_that_is_written_are_raised():
    case = good()
    before = {
        name: getattr(case, name)._version for name in case.arguments if isinstance(case.arguments[name], torch.Tensor)
    }
    case.run()
    raised = {name for name, version in before.items() if getattr(case, name)._version > version}
    assert raised == set(WRITTEN)


TENSORS = [x for x, value in good().arguments.items() if isinstance(value, torch.Tensor) and x != "query"]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("elsewhere", ["meta", "cuda:0"])
@pytest.mark.parametrize("is_fake", [True, False], ids=["fake", "real"])
def test_devices_are_not_mixed(is_fake, elsewhere, name):
    if not is_fake and elsewhere != "meta" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    case = good()
    if is_fake:
        case = make_fake(FakeTensorMode(allow_non_fake_inputs=False), case)
        with case.query.fake_mode:  # tensors of no memory
            case = case.with_(**{name: torch.empty_like(getattr(case, name), device=elsewhere)})
    else:
        case = case.with_(**{name: getattr(case, name).to(elsewhere)})
    text = f"decode_attention_: {name} must be on the device of query, cpu; got {elsewhere}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        case.run()
