# SPDX-License-Identifier: Apache-2.0
"""Arguments that are no dense tensors, lie where elements cannot, or share memory with what is written."""

import contextlib
import re

import pytest
import torch
from decode_case import random_case
from torch._subclasses.fake_tensor import FakeTensorMode

TRUNCATE, ACCUMULATE = torch.ops.fsdc.truncate, torch.ops.fsdc.accumulate_scores_
DECODE = torch.ops.fsdc.decode_attention_
SLOTS = ("keys", "values", "facts", "positions", "seen")
B, H, S, D, HQ, Q = 1, 2, 6, 4, 4, 3
KEYS, SCORES, WEIGHTS = torch.ones(B, H, S, D), torch.ones(B, H, S), torch.ones(B, HQ, Q, S)


def refused(text):
    return pytest.raises(RuntimeError, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_none_is_no_tensor(mode):
    with mode():
        keys, scores, weights = torch.ones(B, H, S, D), torch.ones(B, H, S), torch.ones(B, HQ, Q, S)
        for name in ("keys", "values", "scores"):
            arguments = {"keys": keys, "values": keys, "scores": scores, name: None}
            with refused(f"truncate: {name} must be a tensor; got None"):
                TRUNCATE(**arguments, cache_size=2)
        for name in ("scores", "weights"):
            with refused(f"accumulate_scores_: {name} must be a tensor; got None"):
                ACCUMULATE(**{"scores": scores, "weights": weights, name: None})


@pytest.mark.parametrize("name", ["query", "new_keys", "new_values", *SLOTS])
def test_a_decode_step_without_a_tensor(name):
    case = random_case()
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        fake = mode.from_tensor if isinstance(mode, FakeTensorMode) else lambda x: x
        given = {key: fake(x) if isinstance(x, torch.Tensor) else x for key, x in case.arguments.items()}
        with mode, refused(f"decode_attention_: {name} must be a tensor; got None"):
            DECODE(**{**given, name: None})
    with refused(f"decode_attention_: {name} must be dense; got one that is sparse_coo; call .to_dense()"):
        DECODE(**{**case.arguments, name: getattr(case, name).to_sparse()})


@pytest.mark.parametrize("given", [[1.0], SCORES.numpy()], ids=["list", "array"])
def test_a_list_or_an_array_is_named_with_its_argument(given):
    """By torch, which reads the arguments before any operator of ours is asked."""
    said = "fsdc::truncate() Expected a value of type 'Tensor' for argument 'scores' but instead found type '{}'."
    with pytest.raises(RuntimeError, match=re.escape(said.format(type(given).__name__))):
        TRUNCATE(KEYS, KEYS, given, 2)


def dense_no_longer(kind, tensor):
    match kind:
        case "nested":
            return torch.nested.nested_tensor(list(tensor))
        case "jagged":
            return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)
        case "quantized":
            return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)
        case "sparse_csr":
            return torch.ones(4, 4).to_sparse_csr()
        case "mkldnn":
            return tensor.to_mkldnn()
        case "sparse_coo":
            return tensor.to_sparse()


REMEDIES = {
    "nested": "torch.nested.to_padded_tensor()",
    "jagged": "torch.nested.to_padded_tensor()",
    "quantized": ".dequantize()",
    "sparse_coo": ".to_dense()",
    "sparse_csr": ".to_dense()",
    "mkldnn": ".to_dense()",
}


@pytest.mark.filterwarnings("ignore")  # of torch, about nested and sparse tensors
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", REMEDIES)
def test_tensors_that_are_not_dense(kind, mode):
    said = f"must be dense; got one that is {'nested' if kind == 'jagged' else kind}; call {REMEDIES[kind]}"
    arguments = {"keys": KEYS, "values": KEYS, "scores": SCORES, "cache_size": 2}
    with mode():
        for name in ("keys", "values", "scores"):
            with refused(f"truncate: {name} {said}"):
                TRUNCATE(**{**arguments, name: dense_no_longer(kind, arguments[name])})
        arguments = {"scores": SCORES, "weights": WEIGHTS, "carry": torch.ones(B)}
        for name in arguments:
            if name == "carry" and kind in ("nested", "jagged"):
                continue  # not of one dimension
            with refused(f"accumulate_scores_: {name} {said}"):
                ACCUMULATE(**{**arguments, name: dense_no_longer(kind, arguments[name])})


def test_fake_tensors_that_are_not_dense():
    with FakeTensorMode(), refused("truncate: keys must be dense; got one that is sparse_coo; call .to_dense()"):
        TRUNCATE(torch.ones(B, H, S, D).to_sparse(), torch.ones(B, H, S, D), torch.ones(B, H, S), 2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_calls_what_is_functional_and_is_refused_by_what_writes():
    keys, scores = torch.rand(3, B, H, S, D), torch.rand(3, B, H, S)
    batched = torch.vmap(lambda keys, scores: TRUNCATE(keys, keys, scores, 2))(keys, scores)
    for i in range(3):
        for all_of_them, one in zip(batched, TRUNCATE(keys[i], keys[i], scores[i], 2), strict=True):
            assert torch.equal(all_of_them[i], one)
    with refused(
        "accumulate_scores_: tensors must not be batched by torch.vmap, they are written in place; got one that is; "
        "call it on the whole batch"
    ):
        torch.vmap(lambda weights: ACCUMULATE(SCORES.clone(), weights))(torch.ones(3, B, HQ, Q, S))


def at_odd_address(shape, dtype=torch.float32):
    tensor = torch.ones(shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.nbytes + 1), dtype=dtype, offset=1).view(shape)


def test_addresses_that_no_element_can_have():
    said = "must lie at a multiple of {} bytes, the size of its elements; got 1 more; call .clone()"
    arguments = {"keys": KEYS.double(), "values": KEYS.double(), "scores": SCORES, "cache_size": 2}
    for name, size in {"keys": 8, "values": 8, "scores": 4}.items():
        odd = at_odd_address(arguments[name].shape, arguments[name].dtype)
        with refused(f"truncate: {name} {said.format(size)}"):
            TRUNCATE(**{**arguments, name: odd})
    arguments = {"scores": SCORES, "weights": WEIGHTS, "query_weights": torch.ones(B, Q), "carry": torch.ones(B)}
    for name, tensor in arguments.items():
        with refused(f"accumulate_scores_: {name} {said.format(4)}"):
            ACCUMULATE(**{**arguments, name: at_odd_address(tensor.shape)})


def place(memory, at, shape):
    """A contiguous tensor from element `at` of the memory on."""
    return memory[at : at + torch.Size(shape).numel()].view(shape)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
@pytest.mark.parametrize("name, shape", [("weights", (B, HQ, Q, S)), ("query_weights", (B, Q)), ("carry", (B,))])
def test_scores_share_memory_with_nobody(name, shape, mode, device):
    size, count = SCORES.numel(), torch.Size(shape).numel()
    with mode():
        memory = torch.zeros(size + 2 * count, device=device)
        scores = place(memory, count, SCORES.shape)
        arguments = {"weights": torch.ones(WEIGHTS.shape, device=device)}
        for at in {1, count, count + size - 1}:  # up to the first score, at it, from the last on
            with refused(
                "accumulate_scores_: scores must share no memory with other arguments, it is written to; "
                f"got one that overlaps {name}; call .clone()"
            ):
                ACCUMULATE(scores, **{**arguments, name: place(memory, at, shape)})
        for at in (0, count + size):  # neighbours
            ACCUMULATE(scores, **{**arguments, name: place(memory, at, shape)})


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_scores_do_not_overlap_themselves(mode, device):
    with mode():
        memory = torch.zeros(200, device=device)
        for strides in [(0, 0, 1), (12, 0, 1), (12, 5, 1), (12, 1, 1), (6, 6, 1), (1, 6, 1), (60, 30, 0)]:
            with refused(
                "accumulate_scores_: scores must not overlap itself in memory, it is written to; "
                f"got strides {list(strides)}; call .clone()"
            ):
                ACCUMULATE(memory.as_strided((2, H, S), strides), torch.ones(2, HQ, Q, S, device=device))
        for strides in [(12, 6, 1), (6, 12, 1), (1, 2, 4), (100, 7, 1), (3, 1, 20)]:
            ACCUMULATE(memory.as_strided((2, H, S), strides), torch.ones(2, HQ, Q, S, device=device))
        one_row = memory.as_strided((1, H, S), (0, 6, 1))
        ACCUMULATE(one_row, torch.ones(1, HQ, Q, S, device=device))
