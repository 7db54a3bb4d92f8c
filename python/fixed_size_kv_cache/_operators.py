# SPDX-License-Identifier: Apache-2.0
"""What Python adds to the operators of the compiled library: shapes for compilers, and two clear refusals."""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import check_accumulate_scores, check_truncate
from ._load import BUILD

OPERATORS = ("truncate", "accumulate_scores_")

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


def _refuse_gradients(name: str, operator, *args, **kwargs):
    """The Autograd kernel of every operator: the stable C++ interface cannot see ``requires_grad``."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    for tensor in tensors:
        if (torch.is_grad_enabled() and tensor.requires_grad) or _has_tangent(tensor):
            raise RuntimeError(
                f"{name}: inputs must not require gradients, there is no backward; got an input with "
                "requires_grad=True; call it under torch.no_grad() or torch.inference_mode(), or .detach() it"
            )
    with torch._C._AutoDispatchBelowAutograd():
        outputs = operator(*args, **kwargs)
    if name.endswith("_") and not tensors[0].is_inference():
        torch.autograd.graph.increment_version(tensors[0])  # a graph that saved it before must notice
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
    _library.impl(_name, functools.partial(_refuse_gradients, _name, _operator), "Autograd")
    if BUILD["cuda"] is None:
        _library.impl(_name, functools.partial(_refuse_cuda, _name), "CUDA")
