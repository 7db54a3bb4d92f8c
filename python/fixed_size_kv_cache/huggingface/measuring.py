# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text that it reads through a cache of fixed size."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..compat.capability import forgets_state
from ..compat.transformers import CACHE_NAME
from ..dynamic_cache import FixedSizeDynamicCache
from ..settings import FixedSizeCacheConfig
from .enabling import enable
from .marks import enabled
from .unwrapping import unwrap


def perplexity(
    model: Any,
    ids: Tensor,
    cache_size: int | None = None,
    *,
    settings: FixedSizeCacheConfig | None = None,
    chunk_size: int | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
    **fields: Any,
) -> float:
    """Perplexity of a text that a model reads in parts, each of which sees what the cache has kept of the text before.

    One call of ``model(ids)`` would not do: it has no cache to lose tokens from. In parts of one token this is what the
    tokens would have cost while generating; larger ones are faster, and see up to ``chunk_size`` tokens more than
    ``cache_size``. With a cache that holds the whole text it is the perplexity of the stock model, but where rotary
    embeddings depend on the length (dynamic NTK, longrope): each part is rotated as it would be while generating.

    Args:
        model: what :func:`enable` takes; it is as before afterwards.
        ids: whole numbers ``[L]`` or ``[B, L]`` without padding, at least two tokens. The first one is not predicted.
        cache_size: tokens per layer and KV head. Default: that of an enabled model.
        settings: a :class:`FixedSizeCacheConfig`; or its fields one by one, as ``enable`` takes them.
        chunk_size: tokens read at a time. Default ``cache_size // 16``, at least 1; always 1 for Jamba.
        progress: what draws a bar around the parts, such as ``tqdm.tqdm`` or ``rich.progress.track``.
        **fields: see :func:`enable`.

    Returns:
        ``exp`` of the mean negative log-likelihood of the tokens but the first, over all rows.

    Raises:
        ValueError: for ids without a token to predict, or of another rank, and for settings out of range.
        NotImplementedError: for a model whose cache cannot be capped.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> perplexity(model, torch.arange(40), cache_size=16) > 1
        True
    """
    model = unwrap(model, "perplexity")
    rows = torch.as_tensor(ids)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1] < 2 or rows.is_floating_point():
        raise ValueError(
            f"perplexity: ids must be whole numbers [L] or [B, L] with at least 2 tokens; got {rows.dtype} of sizes "
            f"{list(rows.shape)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"perplexity: chunk_size must be at least 1; got {chunk_size}")
    if chunk_size is not None and chunk_size > 1 and forgets_state(model.config):
        raise ValueError(
            f"perplexity: chunk_size must be 1 for {type(model).__name__}, whose recurrent layers read several tokens "
            f"as if nothing had come before; got {chunk_size}"
        )
    cap = enabled(model)
    if cap is not None and settings is None and cache_size is None and not fields:
        settings = cap.settings
    with enable(model, cache_size, settings=settings, **fields) as handle, torch.inference_mode():
        chunk = default_chunk_size(model, handle.settings.average_size) if chunk_size is None else chunk_size
        cache = FixedSizeDynamicCache(config=model.config, settings=handle.settings)
        rows, total = rows.to(model.device), 0.0
        starts = range(0, rows.shape[1] - 1, chunk)  # the last token is only predicted
        for start in starts if progress is None else progress(starts):
            stop = min(start + chunk, rows.shape[1] - 1)
            logits = model(rows[:, start:stop], use_cache=True, **{CACHE_NAME: cache}).logits  # [B, Q, vocabulary]
            predicted = rows[:, start + 1 : stop + 1].flatten()
            total += cross_entropy(logits.flatten(0, 1).float(), predicted, reduction="sum").double()
    return math.exp(float(total) / (rows.shape[0] * (rows.shape[1] - 1)))


def default_chunk_size(model: Any, cache_size: int) -> int:
    """Tokens that are read at a time unless told otherwise."""
    return 1 if forgets_state(model.config) else max(1, cache_size // 16)
