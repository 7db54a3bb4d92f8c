# SPDX-License-Identifier: Apache-2.0
"""The argument rules of the operators for fake tensors: csrc/checks.h once more, with sizes that may be symbols.

A compiler must see the same errors, in the same words, as whoever runs the operator; tests compare the two texts.
"""

import itertools

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import sym_and, sym_or

from .refusals import check_dense

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_truncate(keys: Tensor, values: Tensor, scores: Tensor, cache_size: int, include_skipped: bool) -> None:
    op = "truncate"
    _check_rank(op, "keys", keys, 4, "[B, H, S, D]")
    _check_floating(op, "keys", keys)
    _check_rank(op, "values", values, 4, "[B, H, S, D]")
    torch._check(
        values.dtype == keys.dtype,
        lambda: f"{op}: values must have the type of keys, {_name(keys.dtype)}; got {_name(values.dtype)}",
    )
    _check_same_device(op, "values", values, "keys", keys)
    sizes = list(keys.shape[:3])
    torch._check(
        _equal(values.shape[:3], sizes),
        lambda: f"{op}: values must have the batch, heads and tokens of keys, {sizes}; got sizes {list(values.shape)}",
    )
    _check_contiguous_rows(op, "keys", keys)
    _check_contiguous_rows(op, "values", values)
    if isinstance(sizes[2], int):  # of a symbol it would become a bound, which a Dim of torch.export may not have
        torch._check(sizes[2] < 1 << 31, lambda: f"{op}: keys must have fewer than 2147483648 tokens; got {sizes[2]}")

    _check_given(op, "scores", scores)
    torch._check(
        scores.dim() in (3, 4),
        lambda: f"{op}: scores must be [B, H, S], or attention weights [B, Hq, Q, S]; got sizes {list(scores.shape)}",
    )
    _check_floating(op, "scores", scores)
    _check_same_device(op, "scores", scores, "keys", keys)
    if scores.dim() == 4:
        _check_weights(op, "scores", scores, *sizes)
    else:
        torch._check(
            _equal(scores.shape, sizes),
            lambda: f"{op}: scores must be [B, H, S] = {sizes}; got sizes {list(scores.shape)}",
        )

    torch._check(cache_size >= 1, lambda: f"{op}: cache_size must be at least 1; got {cache_size}")
    if include_skipped:
        torch._check(
            cache_size >= 2, lambda: f"{op}: cache_size must be at least 2 with include_skipped; got {cache_size}"
        )


def check_accumulate_scores(
    scores: Tensor, weights: Tensor, query_weights: Tensor | None, carry: Tensor | None
) -> None:
    op = "accumulate_scores_"
    _check_rank(op, "scores", scores, 3, "[B, H, S]")
    _check_float32(op, "scores", scores)
    _check_rank(op, "weights", weights, 4, "[B, Hq, Q, S]")
    _check_floating(op, "weights", weights)
    _check_same_device(op, "weights", weights, "scores", scores)
    B, Q = scores.shape[0], weights.shape[2]
    _check_weights(op, "weights", weights, *scores.shape)
    if query_weights is not None:
        _check_float32(op, "query_weights", query_weights)
        _check_same_device(op, "query_weights", query_weights, "scores", scores)
        torch._check(
            query_weights.dim() == 2 and _equal(query_weights.shape, [B, Q]),
            lambda: f"{op}: query_weights must be [B, Q] = [{B}, {Q}]; got sizes {list(query_weights.shape)}",
        )
    if carry is not None:
        _check_float32(op, "carry", carry)
        _check_same_device(op, "carry", carry, "scores", scores)
        torch._check(
            carry.dim() == 1 and _equal(carry.shape, [B]),
            lambda: f"{op}: carry must be [B] = [{B}]; got sizes {list(carry.shape)}",
        )
    check_no_overlap(op, {"scores": scores}, {"weights": weights, "query_weights": query_weights, "carry": carry})


def _equal(sizes, others):
    return sym_and(*(size == other for size, other in zip(sizes, others, strict=True)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_given(op: str, name: str, tensor: Tensor | None) -> None:
    torch._check(tensor is not None, lambda: f"{op}: {name} must be a tensor; got None")
    check_dense(op, name, tensor)


def _check_rank(op: str, name: str, tensor: Tensor, rank: int, shape: str) -> None:
    _check_given(op, name, tensor)
    torch._check(tensor.dim() == rank, lambda: f"{op}: {name} must be {shape}; got sizes {list(tensor.shape)}")


def _check_sizes(op: str, name: str, tensor: Tensor, sizes: list, shape: str) -> None:
    _check_given(op, name, tensor)
    torch._check(
        tensor.dim() == len(sizes) and _equal(tensor.shape, sizes),
        lambda: f"{op}: {name} must be {shape} = {list(sizes)}; got sizes {list(tensor.shape)}",
    )


def _check_type(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    torch._check(tensor.dtype == dtype, lambda: f"{op}: {name} must be {_name(dtype)}; got {_name(tensor.dtype)}")


def _check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.is_contiguous(), lambda: f"{op}: {name} must be contiguous; got strides {list(tensor.stride())}"
    )


def _check_floating(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in FLOATING,
        lambda: f"{op}: {name} must be float32, float16, bfloat16 or float64; got {_name(tensor.dtype)}",
    )


def _check_float32(op: str, name: str, tensor: Tensor) -> None:
    torch._check(tensor.dtype == torch.float32, lambda: f"{op}: {name} must be float32; got {_name(tensor.dtype)}")


def _check_same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    torch._check(
        tensor.device == other.device,
        lambda: f"{op}: {name} must be on the device of {other_name}, {other.device}; got {tensor.device}",
    )


def _check_contiguous_rows(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        sym_or(tensor.shape[-1] <= 1, tensor.stride(-1) == 1),
        lambda: (
            f"{op}: {name} must have a contiguous last dimension; got strides {list(tensor.stride())}; "
            "call .contiguous()"
        ),
    )


def _check_like_query(op: str, name: str, tensor: Tensor, query: Tensor) -> None:
    torch._check(
        tensor.dtype == query.dtype,
        lambda: f"{op}: {name} must have the type of query, {_name(query.dtype)}; got {_name(tensor.dtype)}",
    )
    _check_contiguous_rows(op, name, tensor)


def check_no_overlap(op: str, written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """csrc/overlap.h for fake tensors: those that are views of one storage show who shares memory with whom."""
    written = {name: tensor for name, tensor in written.items() if tensor is not None}
    for name, tensor in written.items():
        _check_no_self_overlap(op, name, tensor)
    given = [*written.items(), *((name, tensor) for name, tensor in read.items() if tensor is not None)]
    for (name, tensor), (other, other_tensor) in itertools.combinations(given, 2):
        if name in written and _share_bytes(tensor, other_tensor):
            raise RuntimeError(
                f"{op}: {name} must share no memory with other arguments, it is written to; "
                f"got one that overlaps {other}; call .clone()"
            )


def _check_no_self_overlap(op: str, name: str, tensor: Tensor) -> None:
    """Of symbolic sizes only what strides of 0 show: to compare the others would guard on their order."""
    dims = list(zip(tensor.stride(), tensor.shape, strict=True))
    if _is_known(tensor):
        wide, reach, apart = sorted((stride, size) for stride, size in dims if size > 1), 0, True
        for stride, size in wide:
            apart &= stride > reach
            reach += (size - 1) * stride
        apart |= tensor.numel() == 0
    else:
        apart = sym_and(*(sym_or(tensor.numel() == 0, size <= 1, stride != 0) for stride, size in dims))
    torch._check(
        apart,
        lambda: (
            f"{op}: {name} must not overlap itself in memory, it is written to; "
            f"got strides {list(tensor.stride())}; call .clone()"
        ),
    )


def _is_known(tensor: Tensor) -> bool:
    return all(isinstance(x, int) for x in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def _share_bytes(tensor: Tensor, other: Tensor) -> bool:
    """By the range of bytes that each spans in the storage that they have in common."""
    if not (_is_known(tensor) and _is_known(other)) or tensor.numel() == 0 or other.numel() == 0:
        return False
    if tensor.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    (begin, end), (other_begin, other_end) = _byte_range(tensor), _byte_range(other)
    return begin < other_end and other_begin < end


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    begin = tensor.storage_offset() * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize


def _multiple_of_heads(query_heads: int, H: int):
    return query_heads == 0 if isinstance(H, int) and H == 0 else sym_and(query_heads > 0, query_heads % H == 0)


def _check_weights(op: str, name: str, weights: Tensor, B: int, H: int, S: int) -> None:
    torch._check(
        _equal([weights.shape[0], weights.shape[3]], [B, S]),
        lambda: f"{op}: {name} must be [B, Hq, Q, S] with B = {B} and S = {S}; got sizes {list(weights.shape)}",
    )
    query_heads = weights.shape[1]
    torch._check(
        _multiple_of_heads(query_heads, H),
        lambda: f"{op}: {name} must have a multiple of the {H} KV heads; got {query_heads} heads",
    )
