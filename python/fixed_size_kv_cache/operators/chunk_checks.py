# SPDX-License-Identifier: Apache-2.0
"""The argument rules of chunk_attention_ for fake tensors: csrc/chunk_attention.h once more, in the same words.

What a fake tensor cannot show is left to the operator: the numbers in ``head_layout``.
"""

import torch
from torch import Tensor

from .checks import (
    _check_contiguous,
    _check_contiguous_rows,
    _check_float32,
    _check_floating,
    _check_like_query,
    _check_rank,
    _check_same_device,
    _check_sizes,
    _check_type,
    _multiple_of_heads,
    check_no_overlap,
)

OP = "chunk_attention_"
WRITTEN = ("facts", "lost")
READ = ("query", "keys", "values", "positions", "query_weights", "carry", "sees", "sinks", "head_layout")
ENTRY = ("skipped_keys", "skipped_values", "skipped_count")


def check_chunk_attention(given: dict) -> None:
    """``given`` holds every argument by its name in the schema."""
    tensors = {name: given[name] for name in (*WRITTEN, *READ, *ENTRY)}
    query, facts = tensors["query"], tensors["facts"]
    _check_rank(OP, "query", query, 4, "[B, Hq, Q, D]")
    _check_floating(OP, "query", query)
    _check_contiguous_rows(OP, "query", query)
    H = _check_heads(tensors)
    B, Hq, Q, _ = query.shape
    if facts is not None:
        _check_float32(OP, "facts", facts)
        _check_contiguous_rows(OP, "facts", facts)
    torch._check(
        facts is not None or not given["redundancy"],
        lambda: f"{OP}: redundancy must be False without facts; got True",
    )
    if (positions := tensors["positions"]) is not None:
        _check_type(OP, "positions", positions, torch.int32)
        _check_contiguous_rows(OP, "positions", positions)
    for name, sizes, shape in (("query_weights", [B, Q], "[B, Q]"), ("carry", [B], "[B]")):
        if tensors[name] is not None:
            _check_sizes(OP, name, tensors[name], sizes, shape)
            _check_float32(OP, name, tensors[name])
    if (sees := tensors["sees"]) is not None:
        _check_sizes(OP, "sees", sees, [B, Q, Q], "[B, Q, Q]")
        _check_type(OP, "sees", sees, torch.bool)
    if (sinks := tensors["sinks"]) is not None:
        _check_sizes(OP, "sinks", sinks, [Hq], "[Hq]")
        _check_floating(OP, "sinks", sinks)
        _check_contiguous_rows(OP, "sinks", sinks)
    softcap = given["softcap"]
    torch._check(softcap is None or softcap > 0, lambda: f"{OP}: softcap must be above 0; got {softcap:g}")
    _check_entry(tensors, B, H)
    for name, tensor in tensors.items():
        if tensor is not None and name != "head_layout":
            _check_same_device(OP, name, tensor, "query", query)
    check_no_overlap(OP, {name: tensors.pop(name) for name in WRITTEN}, tensors)


def _check_heads(tensors: dict[str, Tensor | None]) -> int:
    """What lies along the tokens: ``[B, H, S, ...]``, or with a head_layout ``[B, rows, ...]``. Returns ``H``."""
    query, keys, values, layout = (tensors[name] for name in ("query", "keys", "values", "head_layout"))
    rank, where, with_layout = (4, "H, S", "") if layout is None else (3, "rows", " with a head_layout")
    _check_rank(OP, "keys", keys, rank, f"[B, {where}, D]{with_layout}")
    _check_rank(OP, "values", values, rank, f"[B, {where}, Dv]{with_layout}")
    B, Hq, Q, D = query.shape
    H, tokens = keys.shape[1], keys.shape[rank - 2]
    if layout is not None:
        _check_rank(OP, "head_layout", layout, 2, "[H, 2]")
        H = layout.shape[0]
        _check_sizes(OP, "head_layout", layout, [H, 2], "[H, 2]")
        _check_type(OP, "head_layout", layout, torch.int32)
        _check_contiguous(OP, "head_layout", layout)
        where_it_is = layout.device
        torch._check(
            where_it_is.type == "cpu",
            lambda: f"{OP}: head_layout must be on the CPU, where it is read; got {where_it_is}",
        )
    rows = [H, tokens] if layout is None else [tokens]
    _check_sizes(OP, "keys", keys, [B, *rows, D], f"[B, {where}, D]")
    _check_sizes(OP, "values", values, [B, *rows, values.shape[-1]], f"[B, {where}, Dv]")
    if tensors["facts"] is not None:
        _check_sizes(OP, "facts", tensors["facts"], [4, B, *rows], f"[4, B, {where}]")
    if tensors["positions"] is not None:
        _check_sizes(OP, "positions", tensors["positions"], [B, *rows], f"[B, {where}]")
    _check_like_query(OP, "keys", keys, query)
    _check_like_query(OP, "values", values, query)
    if isinstance(tokens, int):  # of a symbol it would become a bound
        torch._check(tokens < 1 << 31, lambda: f"{OP}: keys must have fewer than 2147483648 tokens; got {tokens}")
    if layout is None:
        torch._check(tokens >= Q, lambda: f"{OP}: keys must have at least the {Q} new tokens; got {tokens}")
    torch._check(
        _multiple_of_heads(Hq, H), lambda: f"{OP}: query must have a multiple of the {H} KV heads; got {Hq} heads"
    )
    return H


def _check_entry(tensors: dict[str, Tensor | None], B: int, H: int) -> None:
    given = [tensors[name] is not None for name in ENTRY]
    torch._check(
        all(given) or not any(given),
        lambda: f"{OP}: skipped_keys, skipped_values and skipped_count must be given together; got some of them",
    )
    torch._check(
        any(given) or tensors["lost"] is None, lambda: f"{OP}: lost must be given with skipped_keys only; got it alone"
    )
    if not all(given):
        return
    query, values = tensors["query"], tensors["values"]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    for name, sizes, shape, dtype in (
        ("skipped_keys", [B, H, query.shape[3]], "[B, H, D]", wide),
        ("skipped_values", [B, H, values.shape[-1]], "[B, H, Dv]", wide),
        ("skipped_count", [B, H], "[B, H]", torch.int32),
        ("lost", [B, H], "[B, H]", torch.float32),
    ):
        if tensors[name] is not None:
            _check_sizes(OP, name, tensors[name], sizes, shape)
            _check_type(OP, name, tensors[name], dtype)
            _check_contiguous(OP, name, tensors[name])
