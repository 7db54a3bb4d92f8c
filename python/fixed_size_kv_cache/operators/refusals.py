# SPDX-License-Identifier: Apache-2.0
"""Tensors that no kernel takes: one sentence of ours, where torch would list the backends that it knows."""

import functools
import importlib.util

import torch
from torch import Tensor

# Of tensors that are not dense.
DISPATCH_KEYS = (
    *(f"{kind}{device}" for kind in ("Quantized", "Sparse", "SparseCsr", "NestedTensor") for device in ("CPU", "CUDA")),
    "MkldnnCPU",
)


def refuse_layouts(operator: torch._ops.OpOverload, *args, **kwargs):
    """The kernel of each of ``DISPATCH_KEYS``."""
    names = (argument.name for argument in operator._schema.arguments)
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, Tensor) and (found := _layout(value)):
            kind, remedy = found
            raise RuntimeError(f"{_name(operator)}: {name} must be dense; got a {kind} tensor; call {remedy}")


def _layout(tensor: Tensor) -> tuple[str, str] | None:
    """(what it is, what makes it dense), None if it is."""
    if tensor.is_nested:
        return "nested", "torch.nested.to_padded_tensor()"
    if tensor.is_quantized:
        return "quantized", ".dequantize()"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch._").removeprefix("torch."), ".to_dense()"
    return None


def refuse_vmap(operator: torch._ops.OpOverload, *args, **kwargs):
    """Of operators that write in place; the others vmap calls once for each element."""
    raise RuntimeError(
        f"{_name(operator)}: tensors must not be batched by torch.vmap, they are written in place; got one that is; "
        "call it without, B is its batch"
    )


def _name(operator: torch._ops.OpOverload) -> str:
    return operator._schema.name.removeprefix("fsdc::")


def register(library: torch.library.Library, operator: torch._ops.OpOverload) -> None:
    name = _name(operator)
    for key in DISPATCH_KEYS:
        library.impl(name, functools.partial(refuse_layouts, operator), key)
    if name.endswith("_"):
        library.impl(name, functools.partial(refuse_vmap, operator), "FuncTorchBatched")
    # Jagged tensors are a subclass that dispatches in Python. Where torch has moved it, they get torch's own error.
    if importlib.util.find_spec("torch.nested._internal.nested_tensor"):
        from torch.nested._internal.nested_tensor import NestedTensor

        def refuse_jagged(mode, operator, types, args=(), kwargs=None):
            refuse_layouts(operator, *args, **(kwargs or {}))

        torch.library.register_torch_dispatch(operator, NestedTensor, refuse_jagged, lib=library)
