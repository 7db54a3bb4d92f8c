# SPDX-License-Identifier: Apache-2.0
"""The operators in plain torch: the specification. Kernels match it bit for bit, but for attention, whose sums are
those of float64 here.

Letters, here and everywhere: ``B`` batch, ``H`` KV heads, ``G`` query heads per KV head, ``Hq = H * G``, ``Q`` new
queries, ``S`` tokens seen, ``D`` head dimension. A score says how much attention a token got; the larger stays.
"""

import itertools
import math

import torch
from torch import Tensor

from .reference_chunk import chunk_attention_

__all__ = ["accumulate_scores_", "chunk_attention_", "decode_attention_", "rank", "sum_skipped", "truncate"]

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
        scores: ``[B, H, S]`` in float32, any strides, but no element in the memory of another or of another argument
            (told by the range of bytes that a tensor spans). Autograd hears of the write, but not in
            ``torch.inference_mode()``: there a graph that saved these scores before would go on with the new ones.
        weights: attention weights ``[B, Hq, Q, S]`` in float32, float16, bfloat16 or float64 (rounded to float32 once),
            any strides. ``Hq`` is a multiple of ``H``; KV head ``h`` owns query heads ``h * G`` to ``h * G + G - 1``.
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


def decode_attention_(
    query: Tensor,  # [B, Hq, 1, D]
    new_keys: Tensor,  # [B, H, 1, D]
    new_values: Tensor,  # [B, H, 1, Dv]
    keys: Tensor,  # [B, H, N + 1, D], or [B, rows, D] with a head_layout
    values: Tensor,  # [B, H, N + 1, Dv]
    facts: Tensor,  # [4, B, H, N + 1]
    positions: Tensor,  # [B, H, N + 1]
    seen: Tensor,  # [B]
    length: int,
    *,
    scaling: float,
    decay: float,
    prior: float,
    redundancy: float,
    value_weight: bool,
    sink_tokens: int,
    recent_tokens: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
    valid: Tensor | None = None,  # [B]
    protected: Tensor | None = None,  # [B]
    head_layout: Tensor | None = None,  # [H, 4]
    skipped_keys: Tensor | None = None,  # [B, H, D]
    skipped_values: Tensor | None = None,  # [B, H, Dv]
    skipped_count: Tensor | None = None,  # [B, H]
    lost: Tensor | None = None,  # [B, H]
    skipped_mean: bool = True,
) -> Tensor:
    """One new token for every row of a cache of fixed size: attends to the slots and to the new token, adds the
    attention to the scores, raises redundancy, and puts the new token in the place of the one that goes. In place.

    KV head ``h`` has ``N`` slots, of which the first ``T = min(length, N)`` are in use. The new token goes to slot
    ``T`` while there is one, then to the slot of the least by eviction score ``(s + prior * G) * w * (1 - redundancy *
    r)``, which may be the new token itself: then it is not kept. From first to go to last: empty slots, finite scores,
    NaN, +inf and protected tokens; of equal ones the smaller position. See ``docs/eviction.md``.

    An empty slot has position -1 and score -inf, and contributes nothing whatever bytes it holds. One slot more than
    ``N`` lies behind those of each head; it is neither read nor written.

    Sums are kept in float32, in float64 for float64, in an order that depends on shapes and the device (a CPU's
    instruction set) only: the same bits on every run, for any number of threads. Here they are those of float64. A
    kernel's output is no further from them than that of ``scaled_dot_product_attention``, and the same token goes
    wherever two eviction scores differ by more than 1e-5 relative.

    Args:
        query: ``[B, Hq, 1, D]`` in float32, float16, bfloat16 or float64, any strides with a contiguous last dimension.
            ``Hq`` is a multiple of ``H``; KV head ``h`` owns query heads ``h * G`` to ``h * G + G - 1``.
        new_keys: ``[B, H, 1, D]``, as ``query``.
        new_values: ``[B, H, 1, Dv]``, as ``query``.
        keys: the slots ``[B, H, N + 1, D]``, as ``query``. With a ``head_layout`` the slots of all heads lie in one
            row, ``[B, rows, D]``, and so do those of the next three.
        values: ``[B, H, N + 1, Dv]``, as ``keys``.
        facts: ``[4, B, H, N + 1]`` in float32, contiguous in the last dimension: for each slot its score ``s``, the
            norm of its value ``w``, its redundancy ``r``, the largest cosine of its key with a newer one, and 1 over
            the norm of its key.
        positions: ``[B, H, N + 1]`` in int32, contiguous in the last dimension: how many real tokens of its row came
            before it, -1 for an empty slot.
        seen: ``[B]`` in int32: real tokens that each row has seen, the position of its new token; raised by one.
        length: tokens seen before this step, padding included. A compiled graph passes ``N``: then all slots are looked
            at, and the new token takes the first empty one.
        scaling: what the products of queries and keys are multiplied with.
        decay: what is left of a score after this step.
        prior: what every token is credited with, for each query head of the group.
        redundancy: how much a token loses when a newer key points the same way; 0: no redundancy is kept.
        value_weight: whether ``w`` is the norm of the value, or 1.
        sink_tokens: the first tokens of each row, which never go.
        recent_tokens: the last tokens of each row, which never go, the new one among them.
        softcap: logits become ``softcap * tanh(logit / softcap)``.
        sinks: attention sinks ``[Hq]`` of any of the four types: a logit that takes part in the softmax, without a
            value and without a vote.
        valid: ``[B]`` bool, False for padding: the state of that row stays bitwise as it was, its output is zero.
        protected: ``[B]`` bool: rows whose new token enters with a score of +inf, and so never goes.
        head_layout: ``[H, 4]`` in int32, where KV heads have different numbers of slots: the first row of each head,
            its ``N``, its sink tokens and its recent tokens, which take the place of the two arguments. Ascending.
        skipped_keys: sum of the keys ``[B, H, D]`` of the tokens that have gone, in float32 (float64 for float64), the
            entry: it takes part in the attention as so many tokens of their mean key and value. The token that goes in
            this step is added to it afterwards. All four of these, or none.
        skipped_values: sum of their values ``[B, H, Dv]``, likewise.
        skipped_count: how many they are, ``[B, H]`` in int32.
        lost: ``[B, H]`` in float32, written: the share of this step's attention that the entry has received.
        skipped_mean: False: the entry is one token, whose key and value are the literal sums.

    Returns:
        The attention's output ``[B, Hq, 1, Dv]``, in new memory.

    Raises:
        RuntimeError: for arguments other than these, where an argument that is written shares memory with another, and
            where a gradient would be needed.

    Example:
        >>> B, H, N, D = 1, 1, 2, 4
        >>> keys, values = torch.zeros(B, H, N + 1, D), torch.zeros(B, H, N + 1, D)
        >>> facts, positions = torch.zeros(4, B, H, N + 1), torch.full((B, H, N + 1), -1, dtype=torch.int32)
        >>> facts[0] = -torch.inf  # the scores of empty slots
        >>> seen = torch.zeros(B, dtype=torch.int32)
        >>> rule = dict(decay=1.0, prior=0.0, redundancy=0.0, value_weight=False, sink_tokens=0, recent_tokens=1)
        >>> for step in range(3):
        ...     token = torch.full((B, H, 1, D), float(step))
        ...     state = (keys, values, facts, positions, seen)
        ...     output = torch.ops.fsdc.decode_attention_(token, token, token, *state, step, scaling=0.5, **rule)
        >>> positions  # token 1 got the least attention
        tensor([[[ 0,  2, -1]]], dtype=torch.int32)

    Source: the attention of H2O (Zhang et al. 2023) with an eviction rule of our own, in one pass.
    """
    (B, Hq), H = query.shape[:2], new_keys.shape[1]
    output = query.new_zeros(B, Hq, 1, new_values.shape[3])
    for b, h in itertools.product(range(B), range(H)):
        if valid is not None and not valid[b]:
            continue
        group = slice(h * (Hq // H), (h + 1) * (Hq // H))
        layout = None if head_layout is None else head_layout[h].tolist()
        here = (b, h) if layout is None else (b, slice(layout[0], layout[0] + layout[1] + 1))
        head_keys, head_values, head_positions = keys[here], values[here], positions[here]
        head_facts = facts[(slice(None), *here)]  # [4, N + 1]
        scores, _, redundancies, key_scales = head_facts
        N = head_keys.shape[0] - 1
        T = min(length, N)
        new_key, new_value, position = new_keys[b, h, 0], new_values[b, h, 0], int(seen[b])

        # The tokens that take part: those held, and the new one last.
        held = (head_positions[:T] >= 0).nonzero()[:, 0]
        logits = (query[b, group, 0].double() * scaling) @ torch.cat([head_keys[held], new_key[None]]).double().mT
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        parts = [logits]  # [G, held + 1], then what else is in the denominator
        if skipped_keys is not None:
            count = int(skipped_count[b, h])
            each = max(count, 1) if skipped_mean else 1
            logit = (query[b, group, 0].double() * scaling) @ (skipped_keys[b, h].double() / each)
            if softcap is not None:
                logit = softcap * (logit / softcap).tanh()
            bias = -math.inf if count == 0 else math.log(each)
            parts.append((logit + bias)[:, None])
        if sinks is not None:
            parts.append(sinks[group, None].double())
        probabilities = torch.cat(parts, dim=1).softmax(dim=1)
        weights = probabilities[:, : held.numel() + 1]
        head_output = weights @ torch.cat([head_values[held], new_value[None]]).double()
        if skipped_keys is not None:
            of_entry = probabilities[:, held.numel() + 1]
            if count > 0:
                head_output += of_entry[:, None] * (skipped_values[b, h].double() / each)
            lost[b, h] = of_entry.mean()
        output[b, group, 0] = head_output.to(query.dtype)

        received = weights.sum(0).float()  # [held + 1]
        scores[held] = torch.where(scores[held].isfinite(), decay * scores[held] + received[:-1], scores[held])
        new_scale = 1 / new_key.float().norm().clamp(min=1e-12)
        if redundancy > 0:
            alike = head_keys[held].double() @ (new_key.double() * new_scale)
            redundancies[held] = torch.maximum(redundancies[held], (alike * key_scales[held]).float())

        is_protected = protected is not None and bool(protected[b])
        new_facts = torch.tensor(
            [math.inf if is_protected else received[-1], new_value.float().norm(), 0, new_scale]
        ).to(facts)
        slot = T
        if T == N:
            s, w, r, _ = torch.cat([head_facts[:, :N], new_facts[:, None]], dim=1)
            token_positions = torch.cat([head_positions[:N], seen[b : b + 1]])  # [N + 1], that of the new token last
            first_sinks, last_tokens = (sink_tokens, recent_tokens) if layout is None else layout[2:]
            eviction = (s + prior * (Hq // H)) * (w if value_weight else 1.0) * (1 - redundancy * r)
            eviction = torch.where(s.isfinite(), eviction, s)
            is_kept = (token_positions < first_sinks) | (token_positions > position - last_tokens)
            eviction = eviction.masked_fill(is_kept, math.inf).masked_fill(token_positions < 0, -math.inf)
            order = zip(rank(eviction).tolist(), token_positions.tolist(), range(N + 1), strict=True)
            _, gone, slot = min(order)
            if skipped_keys is not None and gone >= 0:
                skipped_keys[b, h] += new_key if slot == N else head_keys[slot]
                skipped_values[b, h] += new_value if slot == N else head_values[slot]
                skipped_count[b, h] += 1
            if slot == N:  # the new token itself goes
                continue
        head_keys[slot], head_values[slot], head_positions[slot] = new_key, new_value, position
        head_facts[:, slot] = new_facts
    seen += 1 if valid is None else valid.int()
    return output


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
