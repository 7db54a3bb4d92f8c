# SPDX-License-Identifier: Apache-2.0
"""What Python adds to the operators of the compiled library: shapes for compilers, and two clear refusals."""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import check_accumulate_scores, check_truncate
from .chunk_checks import check_chunk_attention
from .decode_checks import check_decode_attention
from .load import BUILD
from .refusals import register as register_refusals

truncate = torch.ops.fsdc.truncate.default
accumulate_scores_ = torch.ops.fsdc.accumulate_scores_.default
decode_attention_ = torch.ops.fsdc.decode_attention_.default
chunk_attention_ = torch.ops.fsdc.chunk_attention_.default
OPERATORS = ("truncate", "accumulate_scores_", "decode_attention_", "chunk_attention_")  # in the order of csrc/ops.cpp
DEVICES = ("cpu", "cuda")  # types of those with kernels of all operators

_library = torch.library.Library("fsdc", "IMPL")  # registrations live as long as this object


@torch.library.register_fake("fsdc::truncate")
def _(keys: Tensor, values: Tensor, scores: Tensor, cache_size: int, *, include_skipped: bool = False):
    check_truncate(keys, values, scores, cache_size, include_skipped)
    B, H, S, D = keys.shape
    K = torch.sym_min(S, cache_size)
    return (
        keys.new_empty((B, H, K, D)),
        values.new_empty((B, H, K, values.shape[3])),
        keys.new_empty((B, H, K), dtype=torch.int64),
    )


@torch.library.register_fake("fsdc::accumulate_scores_")
def _(scores: Tensor, weights: Tensor, query_weights: Tensor | None = None, carry: Tensor | None = None) -> None:
    check_accumulate_scores(scores, weights, query_weights, carry)


@torch.library.register_fake("fsdc::decode_attention_")
def _(*args, **kwargs) -> Tensor:
    given = _by_name(torch.ops.fsdc.decode_attention_.default, args, kwargs)
    check_decode_attention(given)
    query, new_values = given["query"], given["new_values"]
    return query.new_empty((query.shape[0], query.shape[1], 1, new_values.shape[3]))


@torch.library.register_fake("fsdc::chunk_attention_")
def _(*args, **kwargs) -> Tensor:
    given = _by_name(torch.ops.fsdc.chunk_attention_.default, args, kwargs)
    check_chunk_attention(given)
    return given["query"].new_empty((*given["query"].shape[:3], given["values"].shape[-1]))


def _by_name(operator, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by their names in the schema, with defaults for those that were not given."""
    arguments = operator._schema.arguments
    defaults = {x.name: x.default_value for x in arguments if x.has_default_value()}
    return {**defaults, **{x.name: value for x, value in zip(arguments, args, strict=False)}, **kwargs}


def _refuse_gradients(operator, written: tuple[tuple[int, str], ...], *args, **kwargs):
    """The Autograd kernel of every operator: the stable C++ interface cannot see ``requires_grad``.

    ``written`` says where the arguments are that the operator writes: their place and name in the schema.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and (
                (torch.is_grad_enabled() and tensor.requires_grad) or _has_tangent(tensor)
            ):
                name = operator._schema.name.removeprefix("fsdc::")
                raise RuntimeError(
                    f"{name}: inputs must not require gradients, there is no backward; got an input with "
                    "requires_grad=True; call it under torch.no_grad() or torch.inference_mode(), or .detach() it"
                )
    with torch._C._AutoDispatchBelowAutograd():
        outputs = operator(*args, **kwargs)
    changed = [args[place] if place < len(args) else kwargs.get(name) for place, name in written]
    changed = [x for x in changed if x is not None and not x.is_inference()]
    if changed:
        torch.autograd.graph.increment_version(changed)  # a graph that saved one of them before must notice
    return outputs


def _has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation is under way with respect to the tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _refuse_cuda(name: str, *args, **kwargs):
    raise RuntimeError(
        f"{name}: tensors must be on the CPU, this build has no CUDA kernels; got tensors on a CUDA device; "
        "build again where nvcc is found (`fsdc info` shows what was built)"
    )


for _name in OPERATORS:
    _operator = getattr(torch.ops.fsdc, _name).default
    _written = tuple(
        (place, argument.name)
        for place, argument in enumerate(_operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    _library.impl(_name, functools.partial(_refuse_gradients, _operator, _written), "Autograd")
    register_refusals(_library, _operator)
    if BUILD["cuda"] is None:
        _library.impl(_name, functools.partial(_refuse_cuda, _name), "CUDA")
