# SPDX-License-Identifier: Apache-2.0
"""Parts of a prompt that are never evicted, as a user names them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..settings import FixedSizeCacheConfig

Span = tuple[int, int]  # first position, and the one after the last


def read_spans(spans: Sequence | None, settings: FixedSizeCacheConfig, by: str = "") -> list[list[Span]]:
    """Spans per row: one list for all rows, or one for each.

    Args:
        spans: ``[(start, stop), ...]``, half-open positions of real tokens (padding is not counted), or a list of such
            lists.
        settings: whose slots they must leave room in.
        by: whose these are, for the error.

    Raises:
        TypeError: for anything that is not a list of pairs of whole numbers.
        ValueError: for an empty span, and where sinks, recent tokens and spans do not fit into the slots.
    """
    spans = [] if spans is None else spans.tolist() if hasattr(spans, "tolist") else spans  # of NumPy and torch
    if isinstance(spans, str) or not isinstance(spans, Sequence):
        raise TypeError(f"protected_spans must be a list of pairs (start, stop), or one for each row; got {spans!r}")
    rows = spans if spans and all(_is_list_of_pairs(row) for row in spans) else [spans]
    for row in rows:
        for span in row:
            _check_span(span)
        sinks, recent = settings.sink_tokens, settings.recent_tokens
        more, end = 0, sinks  # positions beyond the sinks, each counted once
        for start, stop in sorted(row):
            more += max(0, stop - max(start, end))
            end = max(end, stop)
        if sinks + recent + more > settings.slots:
            raise ValueError(
                f"protected_spans must leave room in the {settings.slots} tokens that are held{by}; got {sinks} "
                f"sink_tokens + {recent} recent_tokens + {more} tokens of spans; use a larger cache_size or fewer "
                "recent_tokens"
            )
    return [[(int(start), int(stop)) for start, stop in row] for row in rows]


def spans_as_tensor(rows: list[list[Span]], B: int, device: torch.device) -> Tensor | None:
    """int32 ``[B, spans, 2]``, None without spans. Each list stands for as many rows as the batch has for it."""
    most = max(len(row) for row in rows)
    if most == 0:
        return None
    if B % len(rows) != 0:
        raise ValueError(
            f"protected_spans must be one list for all rows or one for each of the {B} rows; got {len(rows)} lists"
        )
    filled = [row + [(0, 0)] * (most - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int32, device=device).repeat_interleave(B // len(rows), dim=0)


def in_spans(spans: Tensor, positions: Tensor) -> Tensor:
    """Which of the positions ``[B, Q]`` lie in one of the spans ``[B, spans, 2]``, bool ``[B, Q]``."""
    positions = positions[:, :, None]
    return ((positions >= spans[:, None, :, 0]) & (positions < spans[:, None, :, 1])).any(-1)


def _is_whole(number: object) -> bool:
    return hasattr(number, "__index__") and not isinstance(number, bool)


def _is_list_of_pairs(row: object) -> bool:
    return isinstance(row, Sequence) and all(isinstance(span, Sequence) for span in row)


def _check_span(span: object) -> None:
    whole = isinstance(span, Sequence) and len(span) == 2 and all(_is_whole(number) for number in span)
    if not whole:
        raise TypeError(f"protected_spans must be pairs (start, stop) of whole numbers; got {span!r}")
    if not 0 <= span[0] < span[1]:
        raise ValueError(f"protected_spans must have 0 <= start < stop; got {span!r}")
