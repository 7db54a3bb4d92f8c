# SPDX-License-Identifier: Apache-2.0
"""enable(), disable(), as_default() and attn_implementation="fsdc": what they change, refuse and undo."""

import copy
import types

import pytest
import torch
import transformers
from llamas import GREEDY, assert_held_within, new_cache, tiny_llama, tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration

import fixed_size_kv_cache

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import FixedSizeCacheConfig, FixedSizeDynamicCache, as_default, disable, enable
from fixed_size_kv_cache.compat.transformers import CACHE_NAME
from fixed_size_kv_cache.huggingface.attention_interface import fsdc_attention

FEW = dict(max_new_tokens=20, **GREEDY)


def cache_of(model, **kwargs):
    return model.generate(tokens(1, 20), **{**FEW, **kwargs}).past_key_values


def test_enable_caps_every_generate_until_disabled():
    model = tiny_llama()
    before = model.config._attn_implementation
    expected = model.generate(tokens(1, 20), **FEW).sequences
    enable(model, cache_size=12)
    for _ in range(2):
        cache = cache_of(model)
        assert type(cache) is FixedSizeDynamicCache and cache.get_seq_length() == 39
        assert_held_within(cache, 12)
    disable(model)
    assert model.config._attn_implementation == before
    assert type(cache_of(model)) is DynamicCache
    assert torch.equal(model.generate(tokens(1, 20), **FEW).sequences, expected)


def test_the_handle_disables_and_a_second_enable_replaces_the_first():
    model = tiny_llama()
    before = model.config._attn_implementation
    with enable(model, cache_size=12):
        assert cache_of(model).settings.cache_size == 12
    assert model.config._attn_implementation == before
    first = enable(model, cache_size=12)
    second = enable(model, settings=FixedSizeCacheConfig(cache_size=9))
    assert cache_of(model).settings.cache_size == 9
    first.disable()  # it is not the one that counts any more
    assert cache_of(model).settings.cache_size == 9
    assert repr(second) == "Enabled(LlamaForCausalLM, cache_size=9)"
    second.disable()
    assert model.config._attn_implementation == before
    second.disable()
    disable(model)  # no-ops


def test_disable_of_a_model_that_was_never_enabled_changes_nothing():
    model = tiny_llama()
    before = model.config._attn_implementation
    disable(model)
    assert model.config._attn_implementation == before


def test_a_copy_of_an_enabled_model_is_enabled_by_itself():
    model = tiny_llama()
    enable(model, cache_size=12)
    twin = copy.deepcopy(model)
    disable(model)
    assert_held_within(cache_of(twin), 12)
    disable(twin)
    assert type(cache_of(twin)) is DynamicCache


def test_nothing_is_saved_with_the_model(tmp_path):
    model = tiny_llama()
    enable(model, cache_size=12)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text() + (tmp_path / "generation_config.json").read_text()
    assert "fsdc" not in text and "fixed_size" not in text
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_an_explicit_cache_wins():
    model = tiny_llama()
    with enable(model, cache_size=12):
        cache = new_cache(model, 16)
        assert cache_of(model, past_key_values=cache) is cache
    assert_held_within(cache, 16)
    assert cache.layers[0].tokens_held == 16


def test_an_empty_dynamic_cache_is_adopted_and_others_raise():
    model = tiny_llama()
    with enable(model, cache_size=12):
        for empty in (DynamicCache(), DynamicCache(config=model.config)):
            assert cache_of(model, past_key_values=empty) is empty
            assert type(empty) is FixedSizeDynamicCache
            assert_held_within(empty, 12)
        filled = DynamicCache()
        filled.update(torch.ones(1, 4, 5, 8), torch.ones(1, 4, 5, 8), 0)
        with pytest.raises(ValueError, match=r"must be empty to be taken over; got one with 5 tokens"):
            cache_of(model, past_key_values=filled)
        static = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(TypeError, match=f"or an empty DynamicCache; got a StaticCache; pass {CACHE_NAME}="):
            cache_of(model, past_key_values=static)
        with pytest.raises(TypeError, match="got a StaticCache; leave cache_implementation='static' away"):
            cache_of(model, cache_implementation="static")


def test_our_cache_and_use_cache_false_contradict_each_other():
    model = tiny_llama()
    with (
        enable(model, cache_size=12),
        pytest.raises(ValueError, match="use_cache must be True with a FixedSizeDynamic"),
    ):
        cache_of(model, past_key_values=new_cache(model, 16), use_cache=False)


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_cache_the_attention_is_pytorchs(padded):
    model, ids, mask = tiny_llama(), tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, : 5 * padded] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    with enable(model, cache_size=12):
        got = model(ids, attention_mask=mask, use_cache=False).logits
        out = model.generate(ids[1:], use_cache=False, **FEW)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-12, atol=1e-12)
    assert out.past_key_values is None


def test_gradients_flow_without_a_cache():
    model, ids = tiny_llama(), tokens(2, 12)
    expected = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, model.lm_head.weight)[0]
    with enable(model, cache_size=12):
        got = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, model.lm_head.weight)[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_packed_texts_without_a_cache_do_not_see_each_other():
    model, ids = tiny_llama(), tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    with enable(model, cache_size=12):
        got = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_cache_of_somebody_else_is_noticed_at_the_second_forward():
    model, ids = tiny_llama(), tokens(1, 12)
    with enable(model, cache_size=12), torch.no_grad():
        stock = DynamicCache()
        model(ids, past_key_values=stock)
        with pytest.raises(
            RuntimeError, match=r"must be a FixedSizeDynamicCache.*got 13 keys for 1 queries.*let it make"
        ):
            model(ids[:, :1], past_key_values=stock)


def test_a_model_that_was_not_enabled_is_noticed_with_our_cache():
    model, cache = tiny_llama(), None
    cache = new_cache(model, 12)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"reported no scores.*Call enable\(model\)"):
        for _ in range(2):
            model(tokens(1, 5), past_key_values=cache)


def test_only_the_attention_set_needs_a_size_before_prefill(monkeypatch):
    monkeypatch.delenv("FSDC_KV_CACHE_SIZE", raising=False)
    config = tiny_llama().config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fsdc").eval()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("forward"))
    with pytest.raises(
        RuntimeError, match=r'"fsdc" must be told the size.*enable\(model, cache_size=...\), set FSDC_KV'
    ):
        model.generate(tokens(1, 20), **FEW)
    assert not calls
    monkeypatch.setenv("FSDC_KV_CACHE_SIZE", "11")
    assert cache_of(model).settings.cache_size == 11
    monkeypatch.delenv("FSDC_KV_CACHE_SIZE")
    with as_default(cache_size=10):
        assert cache_of(model).settings.cache_size == 10
    assert cache_of(model, past_key_values=new_cache(model, 13)).settings.cache_size == 13


def test_as_default_caps_every_model_and_undoes_it():
    models = [tiny_llama(), tiny_llama()]
    before = models[0].config._attn_implementation
    with as_default(cache_size=12):
        for model in models:
            assert_held_within(cache_of(model), 12)
    for model in models:
        assert model.config._attn_implementation == before
        assert type(cache_of(model)) is DynamicCache


def test_long_prompts_come_in_chunks():
    model, sizes = tiny_llama(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with enable(model, cache_size=12, prefill_chunk_size=8):
        cache_of(model, max_new_tokens=1)
        assert max(sizes) == 8 and sum(sizes) == 20
        sizes.clear()
        cache_of(model, max_new_tokens=1, prefill_chunk_size=16)  # what is said wins
        assert max(sizes) == 16 and sum(sizes) == 20
    sizes.clear()
    with enable(model, cache_size=12):
        cache_of(model, max_new_tokens=1)
    assert sizes == [20]
    with pytest.raises(ValueError, match="prefill_chunk_size must be a whole number of at least 1; got 0"):
        enable(model, prefill_chunk_size=0)


def test_pipelines_and_compiled_modules_are_unwrapped():
    from fixed_size_kv_cache.huggingface.unwrapping import unwrap

    model = tiny_llama()
    assert unwrap(torch.compile(model), "enable") is model
    assert unwrap(types.SimpleNamespace(get_base_model=lambda: model), "enable") is model  # as PEFT has it
    assert unwrap(types.SimpleNamespace(model=model, task="text-generation"), "enable") is model
    tuned = types.SimpleNamespace(get_base_model=lambda: torch.compile(model))
    assert unwrap(types.SimpleNamespace(model=tuned, task="text-generation"), "enable") is model
    for other in (torch.nn.Linear(2, 2), "gpt2", None):
        with pytest.raises(TypeError, match=f"must be a model of transformers.*got {type(other).__name__}"):
            enable(other)


def test_settings_are_checked():
    model = tiny_llama()
    with pytest.raises(TypeError, match=r"enable takes cache_size, .*; got budget"):
        enable(model, budget=3)
    with pytest.raises(ValueError, match="cache_size must be at least 1; got 0"):
        enable(model, cache_size=0)
    with pytest.raises(TypeError, match="one object or single fields, not both; got cache_size too"):
        enable(model, settings=FixedSizeCacheConfig(), cache_size=3)
    with pytest.raises(TypeError, match="settings must be a FixedSizeCacheConfig; got dict"):
        enable(model, settings={})
    assert model.config._attn_implementation == "sdpa"


def test_models_that_cannot_be_capped_are_refused_by_name():
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    with pytest.raises(NotImplementedError, match=r"decoder-only models; got t5, an encoder-decoder; use it without"):
        enable(t5)
    bloom = AutoModelForCausalLM.from_config(
        transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32)
    )
    with pytest.raises(NotImplementedError, match=r"on transformers' AttentionInterface; got Bloom\w+, which computes"):
        enable(bloom)
    assert bloom.config._attn_implementation != "fsdc"
    config = transformers.Gemma3nTextConfig(
        num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["full_attention"] * 4
    )
    with pytest.raises(NotImplementedError, match="gemma3n_text, whose layers share keys and values"):
        FixedSizeDynamicCache(config=config)


def test_a_model_of_windows_only_has_nothing_to_cap():
    config = transformers.MistralConfig(
        sliding_window=8,
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=99,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = model.generate(tokens(1, 20), pad_token_id=0, **FEW).sequences
    with pytest.warns(UserWarning, match="no layer whose cache grows"):
        handle = enable(model, cache_size=12)
    with handle:
        assert torch.equal(model.generate(tokens(1, 20), pad_token_id=0, **FEW).sequences, expected)


def test_what_the_attention_does_not_know_is_refused():
    module, x = tiny_llama().model.layers[0].self_attn, torch.ones(1, 8, 3, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r'output_attentions must be False with "fsdc"; got True.*eager'):
        fsdc_attention(module, x, x[:, :4], x[:, :4], None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="position_bias must be None"):
        fsdc_attention(module, x, x[:, :4], x[:, :4], None, position_bias=x)
    cache = new_cache(tiny_llama(), 12)
    keys, values = cache.update(x[:, :4], x[:, :4], 0)
    with pytest.raises(NotImplementedError, match=r"keys of attention must be those that the cache returned.*latent"):
        fsdc_attention(module, x, keys.clone(), values, None)
    cache.reset()
    keys, values = cache.update(x[:, :4], x[:, :4], 0)
    with pytest.raises(NotImplementedError, match=r"layer 0 sees a window of the text.*config=model.config"):
        fsdc_attention(module, x, keys, values, None, sliding_window=4)
    cache.reset()
    keys, values = cache.update(x[:, :4], x[:, :4], 0)
    with pytest.raises(RuntimeError, match=r"no dropout with a cache of fixed size; call model.eval\(\)"):
        fsdc_attention(module, x, keys, values, None, dropout=0.1)


def test_a_second_attention_to_the_same_keys_is_refused():
    """Keys that two layers share: the votes of the second would go to nobody, and it would attend to what is gone."""
    module, x = tiny_llama().model.layers[0].self_attn, torch.randn(1, 8, 5, 8, dtype=torch.float64)
    cache = FixedSizeDynamicCache(cache_size=4)
    for _ in range(2):
        keys, values = cache.update(x[:, :4], x[:, 4:], 0)
        fsdc_attention(module, x, keys, values, None)
        with pytest.raises(NotImplementedError, match=r"LlamaAttention: .*attends to them again.*call disable"):
            fsdc_attention(module, x, keys, values, None)
    assert cache.get_seq_length() == 10


def test_queries_with_gradients_are_refused():
    cache = new_cache(tiny_llama(), 12)
    x = torch.ones(1, 8, 3, 8, dtype=torch.float64)
    keys, values = cache.update(x[:, :4], x[:, :4], 0)
    with pytest.raises(RuntimeError, match="queries must not require gradients"):
        fsdc_attention(tiny_llama().model.layers[0].self_attn, x.requires_grad_(), keys, values, None)


def test_a_forward_that_broke_off_does_not_haunt_the_next():
    """Keys that no attention took are not held against a model without a cache."""
    model, cache = tiny_llama(), None
    with enable(model, cache_size=12), torch.no_grad():
        cache = new_cache(model, 12)
        cache.update(torch.ones(1, 4, 3, 8), torch.ones(1, 4, 3, 8), 1)
        model(tokens(1, 5), use_cache=False)


def test_names_of_the_package():
    assert {"enable", "disable", "as_default", "FixedSizeCacheConfig"} <= set(fixed_size_kv_cache.__all__)
    assert fixed_size_kv_cache.enable is enable
