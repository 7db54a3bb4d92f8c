# SPDX-License-Identifier: Apache-2.0
"""An enabled model in the world: nested blocks, other threads, assisted calls, odd masks, large numbers, copies."""

import copy
import math
import threading

import pytest
import torch
import transformers
from llamas import tiny_llama, tokens
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import FixedSizeDynamicCache, as_default, enable


def test_nested_blocks_restore_what_was_around_them():
    model, ids = tiny_llama(), tokens(1, 20)

    def size() -> int | None:
        cache = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0).past_key_values
        return cache.settings.cache_size if isinstance(cache, FixedSizeDynamicCache) else None

    with enable(model, cache_size=12):
        with enable(model, cache_size=8):
            assert size() == 8
        assert size() == 12
    assert size() is None
    with as_default(cache_size=12):
        with as_default(cache_size=8):
            assert size() == 8
        assert size() == 12
    assert size() is None


def test_an_assisted_call_leaves_a_capped_cache():
    """Recording ends with the call, so that whoever goes on with the cache evicts."""
    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, cache_size=12), torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=20, prompt_lookup_num_tokens=3, eos_token_id=99, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        cache = out.past_key_values
        assert all(layer.recorded is None for layer in cache.layers)
        for _ in range(5):
            model(ids[:, :1], past_key_values=cache)
            assert all(layer.recorded is None for layer in cache.layers)
        cache.activate_past_recording()
        cache.reset()
        model(ids, past_key_values=cache)
        assert all(layer.recorded is None for layer in cache.layers)


def test_threads_do_not_meet():
    """The step of another thread comes between a cache's update and its attention."""
    model, other, ids = tiny_llama(), tiny_llama(), tokens(1, 20)

    def run(which) -> torch.Tensor:
        return which.generate(ids, max_new_tokens=5, pad_token_id=0)

    with enable(model, cache_size=12), enable(other, cache_size=12):
        expected = run(other)
        found = []

        def between(*_) -> None:
            if not found:
                thread = threading.Thread(target=lambda: found.append(run(other)))
                thread.start()
                thread.join()

        original = FixedSizeDynamicCache.update

        def update(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            if threading.current_thread() is threading.main_thread():
                between()
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FixedSizeDynamicCache, "update", update)
            assert torch.equal(run(model), expected)
        assert torch.equal(found[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_queries_and_keys_do_not_overflow(dtype):
    """q @ k of float16 ends at 65504; scaled queries stay far below."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.fill_(40.0)
        layer.self_attn.k_proj.bias.data.fill_(40.0)
    model.to(dtype)
    ids = tokens(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        with enable(model, cache_size=32):
            cache = FixedSizeDynamicCache(config=config, cache_size=32)
            logits = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20)], dim=1)
    assert cache.layers[0].slots.tokens.scores[:, :, :20].isfinite().all()
    assert logits.isfinite().all()
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_mask_that_weighs_tokens_is_refused():
    model, ids = tiny_llama(), tokens(1, 20)
    mask = torch.zeros(1, 1, 20, 20, dtype=torch.float64).masked_fill(~torch.ones(20, 20).tril().bool(), -math.inf)
    with enable(model, cache_size=32), torch.no_grad():
        cache = FixedSizeDynamicCache(config=model.config, cache_size=32)
        with pytest.raises(ValueError, match="attention_mask must be 0 where a token is seen"):
            model(ids, past_key_values=cache, attention_mask=mask - 0.1 * torch.ones(20, 20).tril(-1))


def test_a_copy_made_in_inference_mode_can_be_used_outside():
    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, cache_size=12):
        cache = FixedSizeDynamicCache(config=model.config, cache_size=12)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
            copied = copy.deepcopy(cache)
        with torch.no_grad():
            assert torch.equal(
                model(ids[:, :1], past_key_values=copied).logits, model(ids[:, :1], past_key_values=cache).logits
            )


def test_one_mask_may_come_with_every_part_of_a_text():
    """Longer than what has been seen: stock attention reads its columns by position."""
    model, ids = tiny_llama(), tokens(2, 24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    @torch.no_grad()
    def logits(cache) -> torch.Tensor:
        parts = [slice(start, start + 8) for start in (0, 8, 16)]
        seen = [
            model(ids[:, p], attention_mask=mask, position_ids=positions[:, p], past_key_values=cache).logits
            for p in parts
        ]
        return torch.cat(seen, dim=1)[mask.bool()]

    expected = logits(DynamicCache(config=model.config))
    with enable(model, cache_size=64):
        actual = logits(FixedSizeDynamicCache(config=model.config, cache_size=64))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_under_autocast_values_are_narrower_than_keys():
    """Keys come rotated in float32, values in bfloat16. As near to stock's sdpa as stock's eager attention is."""
    model, ids = tiny_llama(torch.float32), tokens(1, 40)

    def read(cache):
        parts = ids.split([20, *[1] * 20], dim=1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = read(DynamicCache(config=model.config))
        with enable(model, cache_size=64):
            cache = FixedSizeDynamicCache(config=model.config, cache_size=64)
            ours = read(cache)
        with enable(model, cache_size=12):
            model.generate(ids, max_new_tokens=20, pad_token_id=0)
        model.set_attn_implementation("eager")
        eager = read(DynamicCache(config=model.config))
    assert cache.layers[0].keys.dtype == torch.bfloat16  # what attention makes of those of the stock cache
    assert (ours - expected).abs().max() <= 1.5 * (eager - expected).abs().max()
    cache = FixedSizeDynamicCache(cache_size=12)
    with pytest.raises(TypeError, match=r"values must have the type of keys, torch\.bfloat16"):
        cache.update(torch.ones(1, 1, 1, 4, dtype=torch.bfloat16), torch.ones(1, 1, 1, 4), 0)


def test_a_second_cache_in_generate_is_refused():
    """Classifier-free guidance runs the model by itself."""
    model = tiny_llama()
    with enable(model, cache_size=64), pytest.raises(NotImplementedError, match="guidance_scale must be 1"):
        model.generate(tokens(1, 20), guidance_scale=1.5, max_new_tokens=5)
