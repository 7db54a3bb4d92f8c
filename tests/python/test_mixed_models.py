# SPDX-License-Identifier: Apache-2.0
"""Models of which not all is plain text and full attention: windows, chunks, recurrent layers, images."""

import pytest
import torch
import transformers
from packaging.version import Version

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

import families
from llamas import tokens
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from fixed_size_kv_cache import FixedSizeDynamicCache, enable


def tiny_model(family: str):
    if family in ("qwen3_next", "jamba", "bamba") and Version(transformers.__version__) < Version("5"):
        pytest.skip("before transformers 5 recurrent layers had a cache of another kind")
    return families.tiny_model(family)


@torch.no_grad()
def generate(model, ids, **arguments):
    settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True)
    out = model.generate(ids, **settings, return_dict_in_generate=True, **arguments)
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
@pytest.mark.parametrize("prompt", [1, 20])
def test_reset_forgets_in_windows_and_recurrent_layers_too(family, prompt):
    model, ids = tiny_model(family), tokens(1, 20).clamp(max=90)
    cache, fresh = (FixedSizeDynamicCache(config=model.config, cache_size=64) for _ in range(2))
    with enable(model, cache_size=64):
        generate(model, ids, past_key_values=cache)
        cache.reset()
        after = generate(model, ids[:, :prompt], past_key_values=cache)
        assert torch.equal(after, generate(model, ids[:, :prompt], past_key_values=fresh))


@pytest.mark.parametrize(
    "family, said",
    [
        ("gemma2", "8 of 23 tokens held by 2 of 4 layers, cache_size=8"),
        ("mistral", "23 tokens seen, nothing capped: all layers are transformers' own"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*so there is nothing to cap")
def test_repr_says_which_layers_are_capped(family, said):
    model, ids = tiny_model(family), tokens(1, 20).clamp(max=90)
    cache = FixedSizeDynamicCache(config=model.config, cache_size=8)
    with enable(model, cache_size=8):
        generate(model, ids, past_key_values=cache)
    assert repr(cache) == f"FixedSizeDynamicCache({said})"


@pytest.mark.parametrize("family", ["gemma2", "llama4_text", "qwen3_next", "jamba"])
def test_a_cache_made_without_the_config_is_refused_where_it_matters(family):
    model, ids = tiny_model(family), tokens(1, 20).clamp(max=90)
    remedy = r"make the cache with FixedSizeDynamicCache\(config=model\.config\)"
    with enable(model, cache_size=64), pytest.raises(ValueError, match=remedy):
        generate(model, ids, past_key_values=FixedSizeDynamicCache(cache_size=64))


def test_a_window_in_one_of_our_layers_is_refused_in_a_forward_too():
    model, ids = tiny_model("gemma2"), tokens(1, 20).clamp(max=90)
    with (
        enable(model, cache_size=64),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="a window of the text"),
    ):
        model(ids, past_key_values=FixedSizeDynamicCache(cache_size=64))


@pytest.mark.parametrize("family", ["jamba", "bamba"])
def test_recurrent_layers_read_a_long_prompt_as_in_one_piece(family):
    """Those of Jamba read chunks wrongly, with the stock cache as well, so enable() gives it none."""
    model, ids = tiny_model(family), tokens(1, 30).clamp(max=90)
    expected = generate(model, ids)
    with enable(model, cache_size=64, prefill_chunk_size=7):
        assert families.close(generate(model, ids), expected)


def test_a_prompt_with_an_image_comes_in_one_piece():
    """The tokens of an image see each other, so none may be in another chunk."""
    text = Gemma3TextConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100, boi_token_index=101,
        eoi_token_index=102,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval().double()
    ids = tokens(1, 20).clamp(max=90)
    ids[:, 6:10] = config.image_token_id
    inputs = dict(pixel_values=torch.randn(1, 3, 16, 16).double(), token_type_ids=(ids == 100).long())
    chunks = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, given, named: chunks.append((given[0] if given else named["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    expected = generate(model, ids, **inputs)
    with enable(model, cache_size=64, prefill_chunk_size=8):
        chunks.clear()
        torch.testing.assert_close(generate(model, ids, **inputs), expected)
        assert chunks[:2] == [20, 1]
        chunks.clear()
        generate(model, tokens(1, 20).clamp(max=90))
        assert chunks[:2] == [8, 8]
