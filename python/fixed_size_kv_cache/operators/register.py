# SPDX-License-Identifier: Apache-2.0
"""What Python adds to the operators of the compiled library: shapes for compilers, and two clear refusals."""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import check_accumulate_scores, check_truncate
from .load import BUILD

truncate = torch.ops.fsdc.truncate.default
accumulate_scores_ = torch.ops.fsdc.accumulate_scores_.default
OPERATORS = ("truncate", "accumulate_scores_")  # in the order of csrc/ops.cpp

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


def _refuse_gradients(operator, *args, **kwargs):
    """The Autograd kernel of every operator: the stable C++ interface cannot see ``requires_grad``."""
    name, arguments = operator._schema.name.partition("::")[2], operator._schema.arguments
    by_name = {**{argument.name: x for argument, x in zip(arguments, args, strict=False)}, **kwargs}
    for x in by_name.values():
        if isinstance(x, Tensor) and ((torch.is_grad_enabled() and x.requires_grad) or _has_tangent(x)):
            raise RuntimeError(
                f"{name}: inputs must not require gradients, there is no backward; got an input with "
                "requires_grad=True; call it under torch.no_grad() or torch.inference_mode(), or .detach() it"
            )
    with torch._C._AutoDispatchBelowAutograd():
        outputs = operator(*args, **kwargs)
    for argument in arguments:  # a graph that saved what is written must notice
        x = by_name.get(argument.name)
        if argument.is_write and isinstance(x, Tensor) and not x.is_inference():
            torch.autograd.graph.increment_version(x)
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
    _library.impl(_name, functools.partial(_refuse_gradients, getattr(torch.ops.fsdc, _name).default), "Autograd")
    if BUILD["cuda"] is None:
        _library.impl(_name, functools.partial(_refuse_cuda, _name), "CUDA")
