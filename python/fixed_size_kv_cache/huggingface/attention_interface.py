# SPDX-License-Identifier: Apache-2.0
"""The attention implementation "fsdc" of transformers: one function for attention, one for masks.

Importing registers both. With a :class:`FixedSizeDynamicCache` attention goes to the cache, which votes and evicts;
layers that keep transformers' own cache, and models without any cache, get PyTorch's attention.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ..compat.capability import has_window
from ..layer.attention import LogitRule, attend_with_weights, products_of
from ..layer.handoff import HANDOFF
from .causes import why_foreign_cache
from .marks import NAME, prefix_lengths

UNKNOWN = ("position_bias", "indices", "block_indices", "cache")  # arguments that change the result of other attention


def fsdc_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, Q, D]
    key: Tensor,  # [B, H, S, D]
    value: Tensor,  # [B, H, S, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [Hq]
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: the output ``[B, Q, Hq, D]``, and no weights."""
    taken = HANDOFF.take(module, key)
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f'{_name(module)}: output_attentions must be False with "fsdc"; got True; call disable(model) and use '
            '"eager"'
        )
    for argument in UNKNOWN:
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f'{_name(module)}: {argument} must be None, "fsdc" knows no such attention; call disable(model)'
            )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = LogitRule(scaling, softcap, s_aux)
    if taken is None:
        return _attend_elsewhere(module, query, key, value, attention_mask, dropout, rule, kwargs), None
    cache, layer_idx = taken
    if dropout > 0:
        raise RuntimeError(f"{_name(module)}: there is no dropout with a cache of fixed size; call model.eval()")
    layer = cache.layers[layer_idx]
    if sliding_window is not None or (not layer.has_attended and has_window(module, layer_idx)):
        raise NotImplementedError(
            f"{_name(module)}: layer {layer_idx} sees a window of the text, so it must keep transformers' own cache; "
            "got one of ours; make the cache with FixedSizeDynamicCache(config=model.config)"
        )
    if s_aux is not None:
        rule = rule._replace(sinks=s_aux.detach())  # a parameter: votes are no gradients
    return cache.attend(layer_idx, query, attention_mask, rule).transpose(1, 2).contiguous(), None


def _name(module: torch.nn.Module) -> str:
    return type(module).__name__


def _attend_elsewhere(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    rule: LogitRule,
    kwargs: dict,
) -> Tensor:
    """Keys that are in no cache of ours: there is none, or the layer keeps its own. ``[B, Q, Hq, D]``."""
    Q, S = query.shape[2], key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None or mask.dim() == 2:
        if S != Q and is_causal and not _follows_virtual_tokens(module, key, Q):
            raise RuntimeError(
                f"{type(module).__name__}: the cache must be a FixedSizeDynamicCache, others lose nothing and report "
                f"nothing; got {S} keys for {Q} queries; {why_foreign_cache(module)}"
            )
        if mask is not None or (S != Q and is_causal):
            mask = query.new_ones(1, S) if mask is None else mask
            mask = _causal(mask, Q, S) if is_causal else mask.bool()[:, None, None].expand(-1, 1, Q, -1)
    if rule.softcap is None and rule.sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=rule.scaling, is_causal=is_causal and mask is None
        )[0]
    if dropout > 0:
        raise NotImplementedError(
            f'{type(module).__name__}: "fsdc" has no dropout with softcap or sinks; call model.eval()'
        )
    if mask is None and is_causal:
        visible = torch.ones(Q, S, dtype=torch.bool, device=key.device).tril()[None, None]
    else:
        visible = mask if mask is None or mask.dtype == torch.bool else mask == 0
    visible = None if visible is None else visible[..., :S]
    output, _, _ = attend_with_weights(query, products_of(query, key, rule), value, visible, rule)
    return output.transpose(1, 2).contiguous()


def _follows_virtual_tokens(module: torch.nn.Module, key: Tensor, Q: int) -> bool:
    """Whether a text is read behind the virtual tokens of prefix tuning, in training or in evaluation."""
    if Q == 1:
        return False
    is_trained = torch.is_grad_enabled() and key.requires_grad
    return is_trained or key.shape[2] - Q in prefix_lengths(getattr(module, "config", None))


def _causal(mask: Tensor, Q: int, S: int) -> Tensor:
    """``[B, 1, Q, S]`` for a mask of real tokens ``[B, S]``; what sees none sees itself, so that no row is empty."""
    ordered = torch.ones(Q, S, dtype=torch.bool, device=mask.device).tril(S - Q)
    itself = ordered & ~ordered.tril(S - Q - 1)
    seen = ordered & mask.bool()[:, None, None, :]
    return seen | (itself & ~seen.any(-1, keepdim=True))


def fsdc_mask(
    *,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What ``fsdc_attention`` gets as its mask.

    For causal layers: which tokens are padding, ``[B, S + Q]``, or None; what the new ones see of the held ones is the
    cache's own knowledge. For a compiled step of the new tokens only, ``[B, Q]``, a copy with the same strides in every
    step. For windows, chunks and other patterns: the mask of transformers' sdpa, ``[B, 1, Q, columns]``.
    """
    if local_size is not None or mask_function is not causal_mask_function:
        if local_size is not None:
            kwargs["local_size"] = local_size
        return sdpa_mask(
            mask_function=mask_function, attention_mask=attention_mask, **{**kwargs, "allow_is_causal_skip": False}
        )
    if attention_mask is None:
        return None
    end = kwargs["kv_length"] + kwargs["kv_offset"]  # tokens seen, with the new ones
    if isinstance(end, int):  # while a graph is compiled it is not, and the mask ends with the new tokens
        attention_mask = attention_mask[:, :end]  # one mask may come with every part of a text
    if kwargs.get("allow_is_causal_skip", True) and not torch.compiler.is_compiling():
        return attention_mask
    Q = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]  # the latter up to 5.3
    # Not .contiguous(): one row of one token counts as contiguous with any stride.
    return attention_mask[:, -Q:].clone(memory_format=torch.contiguous_format)


AttentionInterface.register(NAME, fsdc_attention)
AttentionMaskInterface.register(NAME, fsdc_mask)
