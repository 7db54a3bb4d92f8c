# SPDX-License-Identifier: Apache-2.0
"""torch.ops.fsdc.chunk_attention_ against its specification in float64, and no further from it than torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATING, INF, NAN, assert_all_same_bits, assert_same_bits
from torch.nn.functional import scaled_dot_product_attention

from fixed_size_kv_cache import _C, reference

chunk_attention_ = torch.ops.fsdc.chunk_attention_
SCORES, REDUNDANCY, KEY_SCALES = 0, 2, 3


def case(B=1, H=2, G=2, T=20, Q=9, D=8, Dv=None, dtype=torch.float32, seed=0, spread=1.0, **options):
    """Arguments of one call. Options: what they are called, as tensors or True to make them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes):
        return torch.randn(*sizes, generator=generator)

    Dv, S = D if Dv is None else Dv, T + Q
    keys = randn(B, H, S, D).to(dtype)
    arguments = {
        "query": (spread * randn(B, H * G, Q, D)).to(dtype),
        "keys": keys,
        "values": randn(B, H, S, Dv).to(dtype),
        "scaling": max(D, 1) ** -0.5,
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if options.pop("facts", True):
        facts = torch.rand(4, B, H, S, generator=generator)
        facts[SCORES, :, :, T:] = 0
        facts[KEY_SCALES] = keys.float().norm(dim=-1).clamp(min=1e-12).reciprocal()
        arguments |= {"facts": facts, "redundancy": options.pop("redundancy", True)}
    make = {
        "positions": lambda: torch.arange(S, dtype=torch.int32).expand(B, H, S).clone(),
        "query_weights": lambda: torch.rand(B, Q, generator=generator),
        "carry": lambda: torch.rand(B, generator=generator),
        "sees": lambda: torch.rand(B, Q, Q, generator=generator) < 0.5,
        "softcap": lambda: 2.0,
        "sinks": lambda: randn(H * G),
        "skipped_keys": lambda: 3 * randn(B, H, D).to(wide),
        "skipped_values": lambda: 3 * randn(B, H, Dv).to(wide),
        "skipped_count": lambda: torch.randint(0, 3, (B, H), generator=generator, dtype=torch.int32),
        "lost": lambda: torch.zeros(B, H),
    }
    if options.pop("entry", False):
        options |= dict.fromkeys(("skipped_keys", "skipped_values", "skipped_count", "lost"), True)
    for name, value in options.items():
        arguments[name] = make[name]() if value is True and name in make else value
    return arguments


def cloned(arguments):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def error(actual, expected):
    return float((actual.double() - expected.double()).norm())


def check(arguments):
    """Runs it; compares everything with the specification in float64. Returns the output."""
    exact = {
        name: x.double() if isinstance(x, torch.Tensor) and name in ("query", "keys", "values") else x
        for name, x in cloned(arguments).items()
    }
    for name in ("skipped_keys", "skipped_values"):
        if name in exact:
            exact[name] = exact[name].double()
    expected = reference.chunk_attention_(**exact)
    before = cloned(arguments)
    output = chunk_attention_(**arguments)
    dtype = arguments["query"].dtype
    unit = torch.finfo(dtype).eps
    # What torch's own attention differs by where it can compute the same, and what rounding alone may differ by.
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    largest = float(arguments["values"].abs().max()) if arguments["values"].numel() else 0.0
    noise = wide * expected.numel() ** 0.5 * largest
    most = 4 * unit * float(expected.norm()) + noise
    plain = set(arguments) <= {"query", "keys", "values", "scaling", "facts", "redundancy"}
    if plain and dtype != torch.float64:
        Q, S = arguments["query"].shape[2], arguments["keys"].shape[2]
        mask = torch.ones(Q, S, dtype=torch.bool).tril(S - Q)
        own = scaled_dot_product_attention(
            *(arguments[name] for name in ("query", "keys", "values")),
            attn_mask=mask,
            scale=arguments["scaling"],
            enable_gqa=True,
        )
        slack = 1.6 if _C.cpu_isa() == "portable" else 1.1  # it rounds products
        most = max(slack * error(own, expected), unit * float(expected.norm())) + noise
    assert output.dtype == dtype
    assert error(output, expected) <= most
    for name, tolerance in (("facts", 2e-6), ("lost", 2e-6)):
        if name in arguments:
            low = dtype in (torch.float16, torch.bfloat16)
            torch.testing.assert_close(
                arguments[name], exact[name], rtol=1e-5, atol=tolerance * (4 if low else 1), equal_nan=True
            )
    for name, x in before.items():  # nothing else is written
        if isinstance(x, torch.Tensor) and name not in ("facts", "lost"):
            assert_same_bits(arguments[name], x)
    if "facts" in arguments:
        assert_same_bits(arguments["facts"][1], before["facts"][1])
        assert_same_bits(arguments["facts"][KEY_SCALES], before["facts"][KEY_SCALES])
        if not arguments["redundancy"]:
            assert_same_bits(arguments["facts"][REDUNDANCY], before["facts"][REDUNDANCY])
    return output


@pytest.fixture(params=["amx", "avx512", "avx2", "portable"])
def isa(request):
    best = _C.cpu_isa()
    if not _C.use_cpu_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert _C.use_cpu_isa(best)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("T, Q", [(0, 1), (0, 70), (5, 1), (64, 64), (130, 67)])
@pytest.mark.parametrize("G, D", [(1, 64), (4, 24), (3, 7)])
def test_plain(isa, G, D, T, Q, dtype):
    check(case(T=T, Q=Q, G=G, D=D, dtype=dtype))


OPTIONS = {
    "no votes": dict(facts=False),
    "no redundancy": dict(redundancy=False),
    "weights": dict(query_weights=True, carry=True),
    "softcap": dict(softcap=True),
    "sinks": dict(sinks=True),
    "entry": dict(entry=True),
    "entry as a sum": dict(entry=True, skipped_mean=False),
    "sees": dict(sees=True),
    "all": dict(query_weights=True, carry=True, softcap=True, sinks=True, entry=True, sees=True, positions=True),
}


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype, isa):
    check(case(B=2, T=70, Q=33, D=32, Dv=48, dtype=dtype, **options))


def with_holes(arguments, T, left=0, right=0, holes=(), garbage=NAN):
    """Held tokens, and new ones on the left and right, that are not there; what lies there is garbage."""
    S = arguments["keys"].shape[2]
    arguments["positions"] = torch.arange(S, dtype=torch.int32).expand(arguments["keys"].shape[:3]).clone()
    missing = [*holes, *range(T, T + left), *range(S - right, S)]
    arguments["positions"][:, :, missing] = -1
    arguments["keys"][:, :, missing] = garbage
    arguments["values"][:, :, missing] = garbage
    return arguments


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("garbage", [NAN, INF, 0.0])
def test_what_is_not_there_contributes_nothing(garbage, dtype, isa):
    B, T, Q = 2, 66, 20
    arguments = with_holes(case(B=B, T=T, Q=Q, D=16, dtype=dtype), T, 3, 2, (0, 7, 64, 65), garbage)
    there = (arguments["positions"][0, 0] >= 0).nonzero().flatten()
    solo = {name: x for name, x in arguments.items() if name != "positions"}
    solo = {name: x[:, :, there] if name in ("keys", "values") else x for name, x in solo.items()}
    solo |= {"query": arguments["query"][:, :, 3:-2], "facts": arguments["facts"][..., there].clone()}
    arguments["query_weights"] = torch.tensor([0.0] * 3 + [1.0] * (Q - 5) + [0.0] * 2).expand(B, Q).contiguous()
    before = arguments["facts"].clone()
    output = chunk_attention_(**arguments)
    expected = chunk_attention_(**solo)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(output[:, :, 3:-2], expected, rtol=4 * unit, atol=4 * unit)
    torch.testing.assert_close(arguments["facts"][..., there], solo["facts"], rtol=1e-5, atol=1e-5)
    missing = (arguments["positions"][0, 0] < 0).nonzero().flatten()
    assert_same_bits(arguments["facts"][REDUNDANCY][..., missing], before[REDUNDANCY][..., missing])
    torch.testing.assert_close(arguments["facts"][SCORES][..., missing], before[SCORES][..., missing])
    assert output.isfinite().all()  # padded queries attend like the others


def test_a_query_that_sees_nothing_has_output_zero(isa):
    arguments = with_holes(case(T=0, Q=12, entry=True, sinks=True), 0, left=4)
    arguments["skipped_count"].fill_(3)
    arguments["lost"].fill_(-1)
    output = chunk_attention_(**arguments)
    assert not output[:, :, :4].any()
    assert output[:, :, 4:].all(-1).all()
    assert (arguments["lost"] > 0).all()


def test_a_query_of_weight_zero_never_votes(isa):
    arguments = case(Q=20, query_weights=True, entry=True)
    arguments["query_weights"][:, ::3] = 0
    arguments["query"][:, :, ::3] = NAN
    output = chunk_attention_(**arguments)
    assert output[:, :, ::3].isnan().all()
    assert arguments["facts"].isfinite().all()
    assert arguments["lost"].isfinite().all()


def test_scores_that_are_not_finite_stay(isa):
    arguments = case(carry=True)
    special = torch.tensor([INF, -INF, NAN])
    arguments["facts"][SCORES, :, :, :3] = special
    arguments["carry"].zero_()
    chunk_attention_(**arguments)
    assert_same_bits(arguments["facts"][SCORES, 0, 0, :3], special)
    assert arguments["facts"][SCORES, :, :, 3:].isfinite().all()


def test_nan_and_infinity_spread_as_in_a_softmax(isa):
    arguments = case(T=10, Q=6)
    arguments["query"][0, 1, 2] = NAN
    arguments["keys"][0, 1, 12] = INF  # a new token: queries before it do not see it
    output = chunk_attention_(**arguments)
    assert output[0, 1, 2].isnan().all()
    assert output[0, 0].isfinite().all()
    assert output[0, 2:, :2].isfinite().all()


@pytest.mark.parametrize("T", [0, 40])
def test_a_chunk_counts_as_its_tokens_one_by_one(T, isa):
    Q, gamma = 30, 0.9
    at_once = case(B=2, T=T, Q=Q)
    at_once["query_weights"] = gamma ** torch.arange(Q - 1, -1, -1).float().expand(2, Q).contiguous()
    at_once["carry"] = torch.full((2,), gamma**Q)
    one_by_one, outputs = cloned(at_once), []
    facts = one_by_one["facts"]
    for q in range(Q):
        S = T + q + 1
        step = {name: one_by_one[name][:, :, :S] for name in ("keys", "values")}
        step |= {"query": one_by_one["query"][:, :, q : q + 1], "scaling": one_by_one["scaling"], "redundancy": True}
        outputs.append(chunk_attention_(**step, facts=facts[..., :S], carry=torch.full((2,), gamma)))
    output = chunk_attention_(**at_once)
    torch.testing.assert_close(output, torch.cat(outputs, dim=2))
    torch.testing.assert_close(at_once["facts"], facts)


@pytest.mark.parametrize("dtype", FLOATING)
def test_heads_of_different_lengths(dtype, isa):
    B, G, Q, D = 2, 2, 18, 16
    held = [0, 33, 70]
    heads = [case(B=B, H=1, G=G, T=T, Q=Q, D=D, dtype=dtype, seed=T, positions=True) for T in held]
    for one, T in zip(heads, held, strict=True):
        with_holes(one, T, left=2)
    flat = {name: torch.cat([one[name][:, 0] for one in heads], dim=1) for name in ("keys", "values")}
    flat["query"] = torch.cat([one["query"] for one in heads], dim=1)
    flat["positions"] = torch.cat([one["positions"][:, 0] for one in heads], dim=1)
    flat["facts"] = torch.cat([one["facts"][:, :, 0] for one in heads], dim=2)
    first = [0, held[0] + Q, held[0] + held[1] + 2 * Q]
    flat["head_layout"] = torch.tensor(list(zip(first, held, strict=True)), dtype=torch.int32)
    flat |= {"scaling": D**-0.5, "redundancy": True}
    exact = {name: x.double() if name in ("query", "keys", "values") else x for name, x in cloned(flat).items()}
    expected = reference.chunk_attention_(**exact)
    output = chunk_attention_(**flat)
    alone = torch.cat([chunk_attention_(**one) for one in heads], dim=1)
    assert_same_bits(output, alone)
    assert_same_bits(flat["facts"], torch.cat([one["facts"][:, :, 0] for one in heads], dim=2))
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(output, expected.to(dtype), rtol=4 * unit, atol=4 * unit)


def test_any_strides(isa):
    plain = case(B=2, H=3, T=40, Q=13, D=16, query_weights=True, carry=True, positions=True, sees=True)
    strided = cloned(plain)
    for name in ("query", "keys", "values"):  # as [B, S, H, D], with room between rows
        room = torch.full((*(plain[name].shape[i] for i in (0, 2, 1)), 24), NAN)
        strided[name] = room[..., 4:20].transpose(1, 2)
        strided[name].copy_(plain[name])
    for name in ("query_weights", "sees"):
        strided[name] = plain[name].mT.contiguous().mT
    strided["carry"] = plain["carry"].repeat_interleave(2)[::2]
    strided["positions"] = plain["positions"][:, :1].expand_as(plain["positions"])
    strided["facts"] = torch.zeros(4, 3, 2, 60)[..., 5:58].transpose(1, 2)
    strided["facts"].copy_(plain["facts"])
    assert_all_same_bits([chunk_attention_(**strided), strided["facts"]], [chunk_attention_(**plain), plain["facts"]])


@pytest.mark.parametrize("sizes", [dict(B=0), dict(Q=0), dict(Q=0, T=0), dict(H=0), dict(D=0), dict(Dv=0)])
def test_empty(sizes, isa):
    arguments = case(**{"Q": 4, **sizes}, redundancy=sizes.get("Q") != 0)
    output = chunk_attention_(**arguments)
    assert output.shape == (*arguments["query"].shape[:3], arguments["values"].shape[3])
    assert_same_bits(output, reference.chunk_attention_(**arguments))


@pytest.mark.parametrize("spread", [1e-30, 30.0, 1e3])
def test_logits_of_any_size(spread, isa):
    check(case(G=4, T=50, Q=40, spread=spread))


@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 150),
    st.integers(1, 90),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(FLOATING),
    st.lists(
        st.sampled_from(["query_weights", "carry", "softcap", "sinks", "entry", "sees", "positions"]), unique=True
    ),
    st.integers(0, 1000),
)
def test_any_sizes_and_options(B, H, G, T, Q, D, Dv, dtype, options, seed):
    arguments = case(B, H, G, T, Q, D, Dv, dtype, seed, **dict.fromkeys(options, True))
    if "positions" in options:
        missing = torch.rand(B, H, T + Q, generator=torch.Generator().manual_seed(seed)) < 0.2
        arguments["positions"].masked_fill_(missing, -1)
        for name in ("keys", "values"):
            arguments[name].masked_fill_(missing[..., None], 0.0)
        arguments["facts"][KEY_SCALES].masked_fill_(missing, 1.0)
    check(arguments)
