# SPDX-License-Identifier: Apache-2.0
"""Small LLaMAs and the recipe, for the tests of the cache."""

import contextlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.layer.layer import FixedSizeLayer
from fixed_size_kv_cache.llama_attention import forward

GREEDY = dict(do_sample=False, return_dict_in_generate=True)


def tiny_llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """Three layers, 8 query and 4 KV heads, weights large enough for attention to have preferences."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


@contextlib.contextmanager
def recipe():
    """LlamaAttention.forward = forward, undone at the end."""
    stock = LlamaAttention.forward
    LlamaAttention.forward = forward
    try:
        yield
    finally:
        LlamaAttention.forward = stock


def tokens(B: int, S: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 100, (B, S), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model, cache, ids: torch.Tensor, chunks: list[int] | None = None, **kwargs) -> torch.Tensor:
    """Runs the ids through the model in chunks (one by one if not given); the logits of all of them."""
    logits, start = [], 0
    for size in chunks or [1] * ids.shape[1]:
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True, **kwargs)
        logits.append(out.logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


def new_cache(model, cache_size: int, **settings) -> FixedSizeDynamicCache:
    return FixedSizeDynamicCache(config=model.config, cache_size=cache_size, **settings)


def held_positions(layer: FixedSizeLayer, row: int = 0) -> list[list[int]]:
    """The positions that each KV head of a row holds, ascending."""
    return [sorted(p for p in head if p >= 0) for head in layer.slots.tokens.positions[row].tolist()]


def assert_held_within(cache: FixedSizeDynamicCache, cache_size: int) -> None:
    for layer in cache.layers:
        tokens = layer.slots.tokens
        assert (tokens.positions >= 0).sum(-1).max() <= cache_size
        assert torch.equal(tokens.positions < 0, tokens.scores == float("-inf"))
        assert (tokens.positions[:, :, -1] == -1).all()
