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
        if isinstance(value, Tensor):
            check_dense(_name(operator), name, value)


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    kind, remedy = None, ".to_dense()"
    if tensor.is_nested:
        kind, remedy = "nested", "torch.nested.to_padded_tensor()"
    elif tensor.is_quantized:
        kind, remedy = "quantized", ".dequantize()"
    elif tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.").removeprefix("_")
    if kind is not None:
        raise RuntimeError(f"{op}: {name} must be dense; got one that is {kind}; call {remedy}")


def refuse_vmap(operator: torch._ops.OpOverload, *args, **kwargs):
    """Of operators that write in place; the others vmap calls once for each element."""
    raise RuntimeError(
        f"{_name(operator)}: tensors must not be batched by torch.vmap, they are written in place; got one that is; "
        "call it on the whole batch"
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
