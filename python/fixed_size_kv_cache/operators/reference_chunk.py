# SPDX-License-Identifier: Apache-2.0
"""``chunk_attention_`` in plain torch, in float64: what the kernels approach."""

import torch
from torch import Tensor

SCORES, VALUE_WEIGHTS, REDUNDANCY, KEY_SCALES = range(4)
"""The planes of ``facts``."""


def chunk_attention_(
    query: Tensor,  # [B, Hq, Q, D]
    keys: Tensor,  # [B, H, S, D]
    values: Tensor,  # [B, H, S, Dv]
    *,
    scaling: float,
    facts: Tensor | None = None,  # [4, B, H, S]
    positions: Tensor | None = None,  # [B, H, S]
    query_weights: Tensor | None = None,  # [B, Q]
    carry: Tensor | None = None,  # [B]
    redundancy: bool = False,
    sees: Tensor | None = None,  # [B, Q, Q]
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
    head_layout: Tensor | None = None,  # [H, 2]
    skipped_keys: Tensor | None = None,  # [B, H, D]
    skipped_values: Tensor | None = None,  # [B, H, Dv]
    skipped_count: Tensor | None = None,  # [B, H]
    lost: Tensor | None = None,  # [B, H]
    skipped_mean: bool = True,
) -> Tensor:
    """Attention of many new tokens to the tokens held and to each other, which is added to the scores.

    Of the ``S = T + Q`` tokens of a KV head the ``T`` that it holds come first, then the new ones. A query sees those
    held and the new ones up to itself. A token with position -1 (an empty slot, padding) is seen by nobody and
    contributes nothing, whatever it holds. A query that sees nothing has output 0. Nothing is evicted: ``truncate``
    follows.

    One pass over the logits gives output and votes: ``scores = carry * scores + sum over q of query_weights[q] * (sum
    over the group of the attention of q)``. A query of weight 0 attends but does not vote, and a score that is not
    finite stays as it is, as in :func:`accumulate_scores_`. Sums are float32 (float64 for float64) in an order that
    depends on sizes only: the same bits on every run and for any number of threads. On CUDA products are those of
    ``torch.bmm``, with its settings, and repeat their bits as it does. The specification is float64, and the output is
    no further from it than that of PyTorch's own ``scaled_dot_product_attention``.

    Args:
        query: ``[B, Hq, Q, D]`` in float32, float16, bfloat16 or float64, with a contiguous last dimension and any
            other strides.
        keys: ``[B, H, S, D]``, as ``query``. With a ``head_layout`` ``[B, rows, D]``.
        values: ``[B, H, S, Dv]``, as ``query``. With a ``head_layout`` ``[B, rows, Dv]``.
        scaling: what the products of queries and keys are multiplied with.
        facts: ``[4, B, H, S]`` in float32 with a contiguous last dimension, in place: scores, norms of the values (not
            looked at), redundancy, and 1 over the norms of the keys. Nobody votes if not given. With a ``head_layout``
            ``[4, B, rows]``.
        positions: ``[B, H, S]`` in int32 with a contiguous last dimension, -1 for tokens that are not there; none is
            missing if not given. With a ``head_layout`` ``[B, rows]``.
        query_weights: ``[B, Q]`` in float32, what each query counts; all 1 if not given.
        carry: ``[B]`` in float32, what is left of the old scores; all 1 if not given.
        redundancy: whether to raise each token's redundancy to its largest cosine with a newer of the new keys.
        sees: ``[B, Q, Q]`` in bool, which new tokens a query sees, where that is not all up to itself.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: ``[Hq]``, attention sinks: logits in the denominator of the softmax, without value and vote.
        head_layout: ``[H, 2]`` in int32 on the CPU, for heads that hold different numbers of tokens: each head's first
            row, and how many it holds. Its new tokens follow them.
        skipped_keys: ``[B, H, D]`` in float32 (float64 for float64), the sum of the keys of evicted tokens, an entry
            that every query sees which sees anything.
        skipped_values: ``[B, H, Dv]``, the sum of their values.
        skipped_count: ``[B, H]`` in int32, how many they are.
        lost: ``[B, H]`` in float32, in place: the mean share of the voting queries' attention that the entry received.
        skipped_mean: the entry counts as so many tokens of the mean; otherwise as one, the sum itself.

    Returns:
        The attention ``[B, Hq, Q, Dv]`` in the type of ``query``.

    Raises:
        RuntimeError: for arguments other than these, and where a gradient would be needed.

    Example:
        >>> keys = torch.tensor([[[[0.0], [0.0]]]])  # one token held, one new
        >>> facts = torch.zeros(4, 1, 1, 2)
        >>> torch.ops.fsdc.chunk_attention_(keys[:, :, 1:], keys, keys + 3.0, scaling=1.0, facts=facts)
        tensor([[[[3.]]]])
        >>> facts[0]
        tensor([[[0.5000, 0.5000]]])

    Source: accumulated attention of H2O (Zhang et al. 2023). We deviate in that a KV head sums its own group only, with
    a decay per query.
    """
    B, Hq, Q, _ = query.shape
    H = keys.shape[1] if head_layout is None else len(head_layout)
    output = query.new_zeros(B, Hq, Q, values.shape[-1])
    query_weights = query.new_ones(B, Q, dtype=torch.float32) if query_weights is None else query_weights
    G = Hq // max(H, 1)
    for h in range(H):
        q = query[:, h * G : (h + 1) * G]  # [B, G, Q, D]
        rows = h
        if head_layout is not None:
            first, held = head_layout[h].tolist()
            rows = slice(first, first + held + Q)
        k, v = keys[:, rows], values[:, rows]  # [B, S, D], [B, S, Dv]
        # [4, B, S] and [B, S]
        of_facts, of_positions = (None if x is None else _of_head(x, head_layout, rows) for x in (facts, positions))
        visible = _visible(B, Q, k.shape[1], of_positions, sees, query.device)
        to_entry = entry_value = None
        if skipped_count is not None:
            entry_key, entry_value, bias = _entry(
                skipped_keys[:, h], skipped_values[:, h], skipped_count[:, h], skipped_mean
            )
            to_entry = _logits(q, entry_key[:, None], scaling, softcap) + bias[:, None, None, None]
        of_sinks = None if sinks is None else sinks[h * G : (h + 1) * G]
        probabilities, to_entry = _softmax(_logits(q, k, scaling, softcap), visible, of_sinks, to_entry)
        there = visible.any(1)[..., None]  # 0 * NaN is NaN: the value of what nobody sees must not be read
        attended = probabilities @ torch.where(there, v.double(), 0.0)[:, None]
        if to_entry is not None:
            attended = attended + to_entry * entry_value[:, None, None]
        output[:, h * G : (h + 1) * G] = attended.to(query.dtype)
        if facts is not None:
            _vote(of_facts[SCORES], probabilities, query_weights, carry)
            if redundancy:
                _raise_redundancy(of_facts[REDUNDANCY], of_facts[KEY_SCALES], k, of_positions, Q)
        if lost is not None:
            votes = (query_weights != 0).double()[:, None, :, None]
            share = torch.where(votes != 0, to_entry, 0.0).sum((1, 2, 3))
            lost[:, h] = (share / (votes.sum((1, 2, 3)) * G).clamp(min=1)).float()
    return output


def _of_head(x: Tensor, head_layout: Tensor | None, rows: int | slice) -> Tensor:
    """A head's part of ``[..., H, S]``, or of ``[..., rows]`` where heads lie flat."""
    return x[..., rows, :] if head_layout is None else x[..., rows]


def _logits(query: Tensor, keys: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Of ``[B, G, Q, D]`` with ``[B, S, D]``, as ``[B, G, Q, S]``."""
    logits = (query.double() * scaling) @ keys.double()[:, None].mT
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _visible(B: int, Q: int, S: int, positions: Tensor | None, sees: Tensor | None, device) -> Tensor:
    """``[B, Q, S]``: which tokens each query sees."""
    among_new = torch.ones(Q, Q, dtype=torch.bool, device=device).tril().expand(B, Q, Q) if sees is None else sees
    held = torch.ones(B, Q, S - Q, dtype=torch.bool, device=device)
    visible = torch.cat([held, among_new], dim=-1)
    return visible if positions is None else visible & (positions >= 0)[:, None]


def _entry(keys: Tensor, values: Tensor, count: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Key, value and what is added to the logit, -inf for none."""
    n = count.double()
    if not mean:
        return keys.double(), values.double(), torch.where(n > 0, 0.0, float("-inf"))
    size = n.clamp(min=1)[:, None]
    return keys.double() / size, values.double() / size, n.log()


def _softmax(
    logits: Tensor, visible: Tensor, sinks: Tensor | None, entry: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of the tokens ``[B, G, Q, S]`` and of the entry ``[B, G, Q, 1]``; zeros for a query that sees nothing."""
    B, G, Q, S = logits.shape
    logits = logits.masked_fill(~visible[:, None], float("-inf"))
    sees_nothing = ~visible.any(-1)[:, None, :, None]
    more = [] if entry is None else [entry]
    more += [] if sinks is None else [sinks.double().view(1, G, 1, 1).expand(B, G, Q, 1)]
    probabilities = torch.cat([logits, *more], dim=-1).softmax(-1).masked_fill(sees_nothing, 0.0)
    return probabilities[..., :S], None if entry is None else probabilities[..., S : S + 1]


def _vote(scores: Tensor, probabilities: Tensor, query_weights: Tensor, carry: Tensor | None) -> None:
    weights = query_weights.double()[:, None, :, None]
    votes = torch.where(weights != 0, weights * probabilities, 0.0).sum((1, 2))
    carried = scores.double() if carry is None else carry.double()[:, None] * scores.double()
    scores.copy_(torch.where(scores.isfinite(), (carried + votes).float(), scores))


def _raise_redundancy(redundancy: Tensor, key_scales: Tensor, keys: Tensor, positions: Tensor | None, Q: int) -> None:
    S = keys.shape[1]
    units = keys.double() * key_scales.double()[..., None]  # [B, S, D]
    cosines = units @ units[:, S - Q :].mT  # [B, S, Q]
    newer = torch.ones(S, Q, dtype=torch.bool, device=keys.device).triu(1 - (S - Q))
    if positions is not None:
        newer = newer & (positions >= 0)[:, None, S - Q :] & (positions >= 0)[:, :, None]
    if Q:
        redundancy.copy_(torch.maximum(redundancy, torch.where(newer, cosines, 0.0).amax(-1).float()))
