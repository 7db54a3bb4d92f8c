# SPDX-License-Identifier: Apache-2.0
"""The argument rules of decode_attention_ for fake tensors: csrc/decode_attention.h once more, in the same words.

What a fake tensor cannot show is left to the operator: the numbers in ``head_layout``.
"""

import torch
from torch import Tensor

from .checks import (
    _check_contiguous,
    _check_contiguous_rows,
    _check_floating,
    _check_like_query,
    _check_rank,
    _check_same_device,
    _check_sizes,
    _check_type,
    _multiple_of_heads,
    check_no_overlap,
)

OP = "decode_attention_"
SLOTS = {
    "keys": (4, "[B, H, N + 1, D]", "[B, rows, D]"),
    "values": (4, "[B, H, N + 1, Dv]", "[B, rows, Dv]"),
    "facts": (4, "[4, B, H, N + 1]", "[4, B, rows]"),
    "positions": (3, "[B, H, N + 1]", "[B, rows]"),
}
ENTRY = ("skipped_keys", "skipped_values", "skipped_count", "lost")
WRITTEN = ("keys", "values", "facts", "positions", "seen", *ENTRY)
TENSORS = ("query", "new_keys", "new_values", *WRITTEN, "valid", "protected", "sinks", "head_layout")


def check_decode_attention(given: dict) -> None:
    """``given`` holds every argument by its name in the schema."""
    tensors = {name: given[name] for name in TENSORS}
    query, new_keys, new_values = (tensors[name] for name in ("query", "new_keys", "new_values"))
    _check_rank(OP, "query", query, 4, "[B, Hq, 1, D]")
    _check_floating(OP, "query", query)
    _check_rank(OP, "new_keys", new_keys, 4, "[B, H, 1, D]")
    _check_rank(OP, "new_values", new_values, 4, "[B, H, 1, Dv]")
    (B, Hq, _, D), H, Dv = query.shape, new_keys.shape[1], new_values.shape[3]
    _check_sizes(OP, "query", query, [B, Hq, 1, D], "[B, Hq, 1, D]")
    _check_sizes(OP, "new_keys", new_keys, [B, H, 1, D], "[B, H, 1, D]")
    _check_sizes(OP, "new_values", new_values, [B, H, 1, Dv], "[B, H, 1, Dv]")
    torch._check(
        _multiple_of_heads(Hq, H), lambda: f"{OP}: query must have a multiple of the {H} KV heads; got {Hq} heads"
    )
    _check_contiguous_rows(OP, "query", query)
    for name in ("new_keys", "new_values"):
        _check_like_query(OP, name, tensors[name], query)
    _check_slots(tensors, B, H, D, Dv)
    _check_entry(tensors, B, H, D, Dv)
    for name in ("valid", "protected"):
        if tensors[name] is not None:
            _check_sizes(OP, name, tensors[name], [B], "[B]")
            _check_type(OP, name, tensors[name], torch.bool)
    if (sinks := tensors["sinks"]) is not None:
        _check_sizes(OP, "sinks", sinks, [Hq], "[Hq]")
        _check_floating(OP, "sinks", sinks)
        _check_contiguous_rows(OP, "sinks", sinks)
    length, sink_tokens, recent_tokens = given["length"], given["sink_tokens"], given["recent_tokens"]
    softcap = given["softcap"]
    torch._check(length >= 0, lambda: f"{OP}: length must be at least 0; got {length}")
    torch._check(
        sink_tokens >= 0 and recent_tokens >= 0,
        lambda: f"{OP}: sink_tokens and recent_tokens must be at least 0; got {sink_tokens} and {recent_tokens}",
    )
    torch._check(softcap is None or softcap > 0, lambda: f"{OP}: softcap must be above 0; got {softcap:g}")
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_same_device(OP, name, tensor, "query", query)
    written = {name: tensors.pop(name) for name in WRITTEN}
    check_no_overlap(OP, written, tensors)


def _check_slots(tensors: dict[str, Tensor | None], B: int, H: int, D: int, Dv: int) -> None:
    query, keys, layout = (tensors[name] for name in ("query", "keys", "head_layout"))
    if layout is None:
        _check_rank(OP, "keys", keys, 4, SLOTS["keys"][1])
        slots, shape = [B, H, keys.shape[2]], 1
    else:
        _check_rank(OP, "keys", keys, 3, "[B, rows, D] with a head_layout")
        slots, shape = [B, keys.shape[1]], 2
    torch._check(
        slots[-1] >= 2, lambda: f"{OP}: keys must have at least one slot and the free one; got sizes {list(keys.shape)}"
    )
    sizes = {"keys": [*slots, D], "values": [*slots, Dv], "facts": [4, *slots], "positions": slots}
    for name, expected in sizes.items():
        _check_sizes(OP, name, tensors[name], expected, SLOTS[name][shape])
    if layout is not None:
        _check_sizes(OP, "head_layout", layout, [H, 4], "[H, 4]")
        _check_type(OP, "head_layout", layout, torch.int32)
        _check_contiguous(OP, "head_layout", layout)
    for name in ("keys", "values"):
        _check_like_query(OP, name, tensors[name], query)
    for name, dtype in (("facts", torch.float32), ("positions", torch.int32)):
        _check_type(OP, name, tensors[name], dtype)
        _check_contiguous_rows(OP, name, tensors[name])
    _check_sizes(OP, "seen", tensors["seen"], [B], "[B]")
    _check_type(OP, "seen", tensors["seen"], torch.int32)


def _check_entry(tensors: dict[str, Tensor | None], B: int, H: int, D: int, Dv: int) -> None:
    given = [tensors[name] is not None for name in ENTRY]
    torch._check(
        all(given) or not any(given),
        lambda: f"{OP}: skipped_keys, skipped_values, skipped_count and lost must be given together; got some of them",
    )
    if not all(given):
        return
    wide = torch.float64 if tensors["query"].dtype == torch.float64 else torch.float32
    rules = {
        "skipped_keys": ([B, H, D], "[B, H, D]", wide),
        "skipped_values": ([B, H, Dv], "[B, H, Dv]", wide),
        "skipped_count": ([B, H], "[B, H]", torch.int32),
        "lost": ([B, H], "[B, H]", torch.float32),
    }
    for name, (sizes, shape, dtype) in rules.items():
        _check_sizes(OP, name, tensors[name], sizes, shape)
        _check_type(OP, name, tensors[name], dtype)
        _check_contiguous(OP, name, tensors[name])
