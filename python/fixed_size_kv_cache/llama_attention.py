# SPDX-License-Identifier: Apache-2.0
"""``forward`` for ``LlamaAttention`` that keeps the cache at its size.

    LlamaAttention.forward = forward

It attends to what the cache holds and lets it evict. The attention implementation that the config names is not used, so
the line that sets "eager" is not needed any more. ``enable(model)`` does the same for every model, without a patch.
"""

import types
from typing import Any

from .compat import require  # noqa: F401  first: where there is none it says how to get it

# isort: split
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from .compat.capability import describe
from .compat.transformers import Cache
from .dynamic_cache import FixedSizeDynamicCache, trained_positions
from .layer.attention import LogitRule

_stock_forward = LlamaAttention.forward


def forward(
    self: LlamaAttention,
    hidden_states: Tensor,  # [B, Q, hidden]
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    cache_position: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one LLaMA layer over a cache of fixed size.

    Takes the arguments of every supported version of transformers (``past_key_value`` before 4.56, ``cache`` from 5.24
    on) and returns what all of them expect: the output ``[B, Q, hidden]`` and, if ``output_attentions`` asks for them,
    the attention weights ``[B, Hq, Q, columns]`` over what the cache held in this step. A stock ``DynamicCache``
    becomes one of ours. Without a cache it is the stock forward.
    """
    given = (cache, past_key_values, kwargs.pop("past_key_value", None))
    cache = next((x for x in given if x is not None), None)
    if cache is None:
        if unknown := [name for name, value in kwargs.items() if isinstance(value, Cache)]:
            raise TypeError(f"LlamaAttention: the cache must be called cache or past_key_values; got {unknown[0]}")
        kwargs = {"cache_position": cache_position, **kwargs} if cache_position is not None else kwargs
        return _stock_forward(self, hidden_states, position_embeddings, attention_mask, **kwargs)
    if self.training and self.attention_dropout > 0:
        raise RuntimeError("LlamaAttention: there is no dropout with a cache of fixed size; call model.eval()")

    B, Q, _ = hidden_states.shape
    query_states, key_states, value_states = (
        project(hidden_states).view(B, Q, -1, self.head_dim).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)

    cache = FixedSizeDynamicCache.from_legacy_cache(cache, self.layer_idx)
    if cache.last_layer is None:
        cache.last_layer = self.config.num_hidden_layers - 1
        cache.trained_positions, cache.made_for = trained_positions(self.config), describe(self.config)
    cache.update(key_states, value_states, self.layer_idx)
    rule, weights = LogitRule(self.scaling), None
    if kwargs.get("output_attentions") or self.config.output_attentions:
        weights = cache.layers[self.layer_idx].attention_weights(query_states, attention_mask, rule)
        weights = weights.to(query_states.dtype)
    attn_output = cache.attend(self.layer_idx, query_states, attention_mask, rule)
    return self.o_proj(attn_output.transpose(1, 2).reshape(B, Q, -1)), weights


def bind(model: Any) -> Any:
    """Gives ``forward`` to one LLaMA model instead of to the class, and returns the model.

    Raises:
        TypeError: for a model without LLaMA attention.
    """
    layers = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    if not layers:
        raise TypeError(f"bind: the model must have LlamaAttention; got {type(model).__name__}")
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)
    return model
