# SPDX-License-Identifier: Apache-2.0
"""The operators in plain torch: the specification that CPU and CUDA kernels match bit for bit.

Letters, here and everywhere: ``B`` batch, ``H`` KV heads, ``G`` query heads per KV head, ``Hq = H * G``, ``Q`` new
queries, ``S`` tokens seen, ``D`` head dimension. A score says how much attention a token got; the larger stays.
"""

import torch
from torch import Tensor

__all__ = ["accumulate_scores_", "rank", "sum_skipped", "truncate"]

SUM_SEGMENTS = 16
"""Runs of tokens that the skipped entry is summed over, see :func:`sum_skipped`."""


def truncate(
    keys: Tensor,  # [B, H, S, D]
    values: Tensor,  # [B, H, S, D]
    scores: Tensor,  # [B, H, S] or [B, Hq, Q, S]
    cache_size: int,
    *,
    include_skipped: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the ``min(S, cache_size)`` best-scored tokens of each KV head, in ascending token order.

    The rank of a score is: +inf first (so a caller protects a token with it), then NaN of any kind, then finite scores
    by value with -0 equal to +0, then -inf. Of equal scores the newer token, the one with the larger index, stays.

    Args:
        keys: ``[B, H, S, D]`` in float32, float16, bfloat16 or float64, with a contiguous last dimension. Strides are
            free otherwise, and may be 0.
        values: as ``keys``, with a ``D`` of its own.
        scores: ``[B, H, S]``, or attention weights ``[B, Hq, Q, S]``: 4-D is always read as weights, which are summed
            over the queries and over the group of query heads of each KV head, see :func:`accumulate_scores_`. Any of
            the four types, rounded to float32 once, and any strides.
        cache_size: tokens to keep per KV head, at least 1, at least 2 with ``include_skipped``.
        include_skipped: where ``S > cache_size``, keep ``cache_size - 1`` tokens and let the last entry be the sum of
            all others, keys and values each, with index -1. A float16 sum may overflow to inf.

    Returns:
        keys ``[B, H, K, D]``, values ``[B, H, K, D]`` and their indices ``[B, H, K]`` in int64, with
        ``K = min(S, cache_size)``, in new memory on the device of ``keys``. Nothing waits for the device.

    Raises:
        RuntimeError: for arguments other than these, naming the argument, the rule and what came; and where a gradient
            would be needed.

    Example:
        >>> keys = torch.arange(4.0).view(1, 1, 4, 1)
        >>> scores = torch.tensor([[[0.1, 0.9, 0.1, 0.5]]])
        >>> torch.ops.fsdc.truncate(keys, keys, scores, 2)[2]
        tensor([[[1, 3]]])

    Source: the selection of H2O (Zhang et al. 2023, section 4). We deviate in that ties are ruled, and that the order
    does not depend on the device.
    """
    B, H, S, _ = keys.shape
    if scores.dim() == 4:
        sums = torch.zeros(B, H, S, device=keys.device)
        accumulate_scores_(sums, scores)
        scores = sums
    has_skipped = include_skipped and cache_size < S
    kept = cache_size - 1 if has_skipped else min(S, cache_size)

    # A stable ascending sort leaves the newer of two equal tokens behind the older one, so it is kept.
    order = rank(scores.float()).sort(dim=-1, stable=True).indices
    indices = order[..., S - kept :].sort(dim=-1).values  # [B, H, kept]
    kept_keys, kept_values = (x.take_along_dim(indices[..., None], dim=2) for x in (keys, values))
    if not has_skipped:
        return kept_keys, kept_values, indices

    skipped = torch.ones(B, H, S, dtype=torch.bool, device=keys.device).scatter(-1, indices, False)
    return (
        torch.cat([kept_keys, sum_skipped(keys, skipped)], dim=2),
        torch.cat([kept_values, sum_skipped(values, skipped)], dim=2),
        torch.cat([indices, indices.new_full((B, H, 1), -1)], dim=2),
    )


def accumulate_scores_(
    scores: Tensor,  # [B, H, S]
    weights: Tensor,  # [B, Hq, Q, S]
    query_weights: Tensor | None = None,  # [B, Q]
    carry: Tensor | None = None,  # [B]
) -> None:
    """Adds the attention weights of new queries to the scores of their KV head, in place.

    ``scores = carry * scores + sum over q of query_weights[q] * (sum over the group of weights[q])``. A query of weight
    0 is skipped, so whatever a padded row holds never enters; a score that is not finite stays as it is.

    The order of the sum is part of the contract: queries ascending, within a query the heads of the group ascending,
    in float32, every product and sum rounded.

    Args:
        scores: ``[B, H, S]`` in float32, any strides that do not overlap; of those that do a stride of 0 is an error,
            others are not looked for. Autograd hears of the write, but not in ``torch.inference_mode()``: there a graph
            that saved these scores before would go on with the new ones.
        weights: attention weights ``[B, Hq, Q, S]`` in float32, float16, bfloat16 or float64 (rounded to float32 once),
            any strides, but not in the memory of ``scores``. ``Hq`` is a multiple of ``H``; KV head ``h`` owns query
            heads ``h * G`` to ``h * G + G - 1``.
        query_weights: ``[B, Q]`` in float32, what each query counts; all 1 if not given.
        carry: ``[B]`` in float32, what is left of the old scores; all 1 if not given.

    Raises:
        RuntimeError: for arguments other than these, and where a gradient would be needed.

    Example:
        >>> scores = torch.ones(1, 1, 2)
        >>> torch.ops.fsdc.accumulate_scores_(scores, torch.tensor([[[[0.25, 0.75]]]]), carry=torch.tensor([0.5]))
        >>> scores
        tensor([[[0.7500, 1.2500]]])

    Source: accumulated attention of H2O (Zhang et al. 2023), with a decay per query.
    """
    B, H, S = scores.shape
    Q = weights.shape[2]
    weights = weights.float().unflatten(1, (H, -1)) if H else weights.new_empty(B, 0, 0, Q, S)  # [B, H, G, Q, S]
    delta = torch.zeros_like(scores)
    for q in range(Q):
        group_sum = torch.zeros_like(scores)
        for g in range(weights.shape[2]):
            group_sum = weights[:, :, g, q] if g == 0 else group_sum + weights[:, :, g, q]
        if query_weights is None:
            delta = delta + group_sum
        else:
            query_weight = query_weights[:, q, None, None]
            delta = torch.where(query_weight == 0, delta, delta + query_weight * group_sum)
    carried = scores if carry is None else carry[:, None, None] * scores
    scores.copy_(torch.where(scores.isfinite(), carried + delta, scores))


def rank(scores: Tensor) -> Tensor:
    """The order of float32 scores as int64: -inf, finite, NaN, +inf."""
    bits = torch.where(scores == 0, torch.zeros_like(scores), scores).view(torch.int32).long()
    order = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    order = torch.where(scores.isnan(), 0x7F800000, order)
    return torch.where(scores == float("inf"), 0x7F800001, order)


def sum_skipped(rows: Tensor, skipped: Tensor) -> Tensor:
    """The sum of the rows ``[B, H, S, D]`` where ``skipped`` ``[B, H, S]`` says so, as ``[B, H, 1, D]``.

    The tokens are cut into 16 runs of equal length; each run is summed in ascending order, then the runs are, in
    float32 (float64 for float64), and the result is rounded to the type of the rows. Any number of threads or blocks
    can keep this order.
    """
    B, H, S, D = rows.shape
    accumulator = torch.float64 if rows.dtype == torch.float64 else torch.float32
    run = -(-S // SUM_SEGMENTS)
    terms = torch.zeros(B, H, SUM_SEGMENTS * run, D, dtype=accumulator, device=rows.device)
    terms[:, :, :S] = torch.where(skipped[..., None], rows.to(accumulator), 0)
    runs = terms.view(B, H, SUM_SEGMENTS, run, D)
    sums = torch.zeros(B, H, SUM_SEGMENTS, D, dtype=accumulator, device=rows.device)
    for i in range(run):
        sums = sums + runs[:, :, :, i]
    total = torch.zeros(B, H, D, dtype=accumulator, device=rows.device)
    for i in range(SUM_SEGMENTS):
        total = total + sums[:, :, i]
    return total.to(rows.dtype)[:, :, None]
