# SPDX-License-Identifier: Apache-2.0
"""FixedSizeDynamicCache by itself: caches from elsewhere, the two halves of a step, rows, copies and modes."""

import copy
import warnings

import pytest
import torch
from llamas import feed, held_positions, new_cache, recipe, tiny_llama, tokens
from steps import PLAIN, last_column, one_token, step
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig, StaticCache, cache_utils

import fixed_size_kv_cache
from fixed_size_kv_cache import reference
from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache, _warn_of_positions


def test_from_legacy_cache_of_nothing_ours_and_stock():
    from_legacy = FixedSizeDynamicCache.from_legacy_cache
    empty = from_legacy()
    assert isinstance(empty, FixedSizeDynamicCache) and empty.get_seq_length() == 0
    assert from_legacy(empty, 2) is empty
    stock = DynamicCache()
    assert from_legacy(stock, 0) is stock and isinstance(stock, FixedSizeDynamicCache)


def test_from_legacy_cache_of_tuples():
    keys = torch.arange(10.0)[None, None, :, None].expand(1, 2, 10, 3)
    cache = FixedSizeDynamicCache.from_legacy_cache(((keys, keys), (keys, keys)))
    assert len(cache.layers) == 2 and cache.get_seq_length() == 10
    assert held_positions(cache.layers[1]) == [list(range(10))] * 2
    assert cache.layers[0].slots.tokens.scores[:, :, :10].eq(0).all()


def test_from_legacy_cache_of_tuples_cuts_at_once(monkeypatch):
    monkeypatch.setenv("FSDC_KV_CACHE_SIZE", "8")
    keys = torch.arange(10.0)[None, None, :, None].expand(1, 2, 10, 3)
    cache = FixedSizeDynamicCache.from_legacy_cache(((keys, keys),))
    assert held_positions(cache.layers[0]) == [[*range(2, 10)]] * 2  # the largest values
    assert cache.get_seq_length() == 10


def test_a_stock_cache_with_tokens_of_earlier_steps_is_refused_and_unharmed():
    stock = DynamicCache()
    for layer_idx in range(2):
        stock.update(torch.ones(1, 2, 5, 3), torch.ones(1, 2, 5, 3), layer_idx)
    with pytest.raises(ValueError, match=r"got tokens in layers \[0, 1\]"):
        FixedSizeDynamicCache.from_legacy_cache(stock, 0)
    assert type(stock) is DynamicCache and stock.get_seq_length() == 5
    late = DynamicCache()
    late.update(torch.ones(1, 2, 5, 3), torch.ones(1, 2, 5, 3), 0)
    cache = FixedSizeDynamicCache.from_legacy_cache(late, 0)
    with pytest.raises(ValueError, match="query_states must be"):
        cache.cache_truncate(0, torch.ones(1, 2, 1, 3), torch.ones(1, 2, 5, 3))


def test_a_stock_cache_that_offloads_is_refused():
    stock = DynamicCache()
    stock.offloading = True
    with pytest.raises(TypeError, match="DynamicCache with offloading"):
        FixedSizeDynamicCache.from_legacy_cache(stock, 0)


def test_a_quantized_cache_is_refused_by_name():
    """Making one needs a quantizer that is not installed; its class is what matters."""
    quantized = cache_utils.QuantizedCache.__new__(cache_utils.QuantizedCache)
    with pytest.raises(TypeError, match=r"cannot take over a QuantizedCache.*FixedSizeDynamicCache"):
        FixedSizeDynamicCache.from_legacy_cache(quantized, 0)


@pytest.mark.skipif(not hasattr(cache_utils, "DynamicLayer"), reason="a cache has no layers before transformers 4.56")
def test_sliding_layers_are_refused_by_name():
    config = MistralConfig(num_hidden_layers=2, sliding_window=8, hidden_size=16, num_attention_heads=2)
    with pytest.raises(TypeError, match=r"DynamicCache with layers of type DynamicSlidingWindowLayer"):
        FixedSizeDynamicCache.from_legacy_cache(DynamicCache(config=config), 0)


def test_other_caches_are_refused_by_name():
    config = tiny_llama().config
    try:
        static = StaticCache(config=config, max_cache_len=8)
    except TypeError:  # up to 4.56 it wants to know the batch
        static = StaticCache(config, max_batch_size=1, max_cache_len=8, device="cpu", dtype=torch.float32)
    for cache in (static, EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(TypeError, match=f"cannot take over a {type(cache).__name__}.*FixedSizeDynamicCache"):
            FixedSizeDynamicCache.from_legacy_cache(cache, 0)


def test_a_step_that_nobody_ends_is_noticed_and_reset_helps():
    cache = FixedSizeDynamicCache(cache_size=4)
    cache.update(one_token(0.0), one_token(0.0), 0)
    with pytest.raises(RuntimeError, match=r"reported no scores.*reset"):
        cache.update(one_token(1.0), one_token(1.0), 0)
    cache.reset()
    step(cache, one_token(1.0), one_token(1.0), torch.ones(1, 2, 1, 1))
    assert held_positions(cache.layers[0]) == [[0]] * 2


def test_truncate_without_update_is_refused():
    cache = FixedSizeDynamicCache(cache_size=4)
    with pytest.raises(RuntimeError, match=r"layer 0 must be one of ours that update\(\) has filled"):
        cache.cache_truncate(0, torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3))


def test_stock_attention_with_our_cache_is_noticed():
    model = tiny_llama()
    cache = new_cache(model, 16)
    with pytest.raises(RuntimeError, match="reported no scores"):
        feed(model, cache, tokens(1, 10), [8, 1, 1])


def test_gradients_are_refused():
    model = tiny_llama()
    with recipe(), pytest.raises(RuntimeError, match="must not require gradients"):
        model(tokens(1, 5), past_key_values=new_cache(model, 16))


def test_dropout_is_refused():
    model = tiny_llama().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with recipe(), torch.no_grad(), pytest.raises(RuntimeError, match=r"no dropout.*model.eval\(\)"):
        model(tokens(1, 5), past_key_values=new_cache(model, 16))


def test_weights_of_another_step_are_refused_and_nothing_is_lost():
    cache = FixedSizeDynamicCache(cache_size=4)
    keys, _ = cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    query = torch.ones(1, 4, 3, 4)
    with pytest.raises(ValueError, match="3 queries and 3 columns"):
        cache.cache_truncate(0, query, keys, torch.ones(1, 4, 3, 2))
    with pytest.raises(ValueError, match="key_states must have the 3 tokens"):
        cache.cache_truncate(0, query, keys[:, :, 1:])
    with pytest.raises(ValueError, match="query_states must be"):
        cache.cache_truncate(0, query[:, :, 1:], keys)
    with pytest.raises(ValueError, match="a multiple of the 2 KV heads"):
        cache.cache_truncate(0, query[:, :3], keys, torch.ones(1, 3, 3, 3))
    held, _ = cache.cache_truncate(0, query, keys, torch.ones(1, 4, 3, 3))
    assert held.shape[2] == 3
    assert held_positions(cache.layers[0]) == [[0, 1, 2]] * 2


def test_padding_in_a_user_forward_is_refused_by_name():
    cache = FixedSizeDynamicCache(cache_size=8)
    keys, _ = cache.update(torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 4), 0)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match=r"padding.*fixed_size_kv_cache.llama_attention"):
        cache.cache_truncate(0, torch.ones(2, 4, 3, 4), keys, attention_mask=mask)


@pytest.mark.parametrize("boolean", [True, False])
def test_missing_weights_are_computed_from_queries_and_keys(boolean):
    """Scaled by 1/sqrt(D), for the right groups, causal among the new tokens, over what is held too."""
    torch.manual_seed(0)
    old, new, query = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 6, 3, 4)
    caches = [FixedSizeDynamicCache(cache_size=20) for _ in range(2)]
    for cache in caches:
        step(cache, old, old, torch.zeros(1, 6, 5, 5))
        keys, _ = cache.update(new, new, 0)
    causal = torch.ones(3, 8, dtype=torch.bool).tril(5)
    logits = query.unflatten(1, (2, 3)) @ keys[:, :, None].mT / 2
    weights = logits.masked_fill(~causal, float("-inf")).softmax(-1).flatten(1, 2)
    mask = causal[None, None] if boolean else torch.where(causal, 0.0, float("-inf"))[None, None]
    caches[0].cache_truncate(0, query, keys, weights, mask)
    caches[1].cache_truncate(0, query, keys, None, mask)
    torch.testing.assert_close(caches[0].layers[0].slots.tokens.scores, caches[1].layers[0].slots.tokens.scores)


def test_key_cache_accepts_only_what_truncate_returned_and_hides_nothing():
    cache = FixedSizeDynamicCache(cache_size=4)
    held = step(cache, one_token(0.0), one_token(1.0), torch.ones(1, 2, 1, 1))
    cache.key_cache[0], cache.value_cache[0] = held
    with pytest.raises(ValueError, match="accept only what cache_truncate"):
        cache.key_cache[0] = held[0].clone()
    assert len(cache.key_cache) == 1 and torch.equal(cache.value_cache[0], one_token(1.0))


def test_key_cache_of_a_padded_batch_is_refused():
    model, mask = tiny_llama(), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with recipe():
        cache = new_cache(model, 16)
        with torch.no_grad():
            model(tokens(2, 5), attention_mask=mask, past_key_values=cache)
        with pytest.raises(RuntimeError, match="batch with padding"):
            cache.key_cache[0]


def test_deepcopies_diverge():
    model, ids = tiny_llama(), tokens(1, 30)
    with recipe():
        cache = new_cache(model, 12)
        feed(model, cache, ids, [20, *([1] * 10)])
        other = copy.deepcopy(cache)
        feed(model, other, tokens(1, 8, seed=3))
        again = copy.deepcopy(cache)
        expected = feed(model, cache, tokens(1, 8, seed=4))
        torch.testing.assert_close(feed(model, again, tokens(1, 8, seed=4)), expected, rtol=0, atol=0)
    assert cache.get_seq_length() == 38


def test_batch_expansion_and_selection():
    model, ids = tiny_llama(), tokens(2, 30)
    with recipe():
        cache, expected = new_cache(model, 12), new_cache(model, 12)
        feed(model, cache, ids, [20, *([1] * 10)])
        feed(model, expected, ids.repeat_interleave(3, dim=0), [20, *([1] * 10)])
        cache.batch_repeat_interleave(3)
        more = tokens(6, 5, seed=1)
        torch.testing.assert_close(feed(model, cache, more), feed(model, expected, more), rtol=1e-9, atol=1e-9)
        cache.batch_select_indices(torch.tensor([0, 4]))
        expected.batch_select_indices(torch.tensor([0, 4]))
        more = tokens(2, 5, seed=2)
        torch.testing.assert_close(feed(model, cache, more), feed(model, expected, more), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_reset_keeps_buffers_and_another_batch_gets_new_ones(include_skipped):
    model = tiny_llama()
    with recipe():
        cache = new_cache(model, 12, include_skipped=include_skipped)
        first = feed(model, cache, tokens(1, 30), [20, *([1] * 10)])
        buffer = cache.layers[0].keys.data_ptr()
        cache.reset()
        assert cache.get_seq_length() == 0
        again = feed(model, cache, tokens(1, 30), [20, *([1] * 10)])
        assert cache.layers[0].keys.data_ptr() == buffer
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"call reset\(\) to begin anew"):
            feed(model, cache, tokens(3, 1))
        cache.reset()
        feed(model, cache, tokens(3, 5))
        assert cache.layers[0].keys.shape[0] == 3


def test_inference_mode_and_no_grad_may_be_mixed():
    model, ids = tiny_llama(), tokens(1, 30)
    with recipe():
        cache, expected = new_cache(model, 12), new_cache(model, 12)
        logits = []
        for i, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode] * 2):
            with mode():
                part = ids[:, 5 * i : 5 * i + 5]
                logits.append(model(part, past_key_values=cache).logits.clone())
                cache.reorder_cache(torch.tensor([0]))
        torch.testing.assert_close(torch.cat(logits, 1), feed(model, expected, ids, [5] * 6), rtol=0, atol=0)


def test_crop_takes_back_what_was_not_evicted():
    model, ids = tiny_llama(), tokens(1, 20)
    with recipe():
        cache = new_cache(model, 32)
        feed(model, cache, ids)
        for layer in cache.layers:
            layer.crop(-5)
        assert cache.get_seq_length() == 15
        assert held_positions(cache.layers[0]) == [list(range(15))] * 4
        feed(model, cache, tokens(1, 30, seed=1))
        with pytest.raises(RuntimeError, match="until something is evicted"):
            cache.layers[0].crop(-1)


def test_crop_of_a_padded_row_takes_back_its_real_tokens_only():
    model, mask = tiny_llama(), torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:9] = 0
    with recipe(), torch.no_grad():
        cache = new_cache(model, 32)
        model(tokens(2, 10), attention_mask=mask, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.slots.seen.tolist() == [8, 10]
    layer.crop(-4)
    assert layer.slots.seen.tolist() == [6, 6]
    assert held_positions(layer, 0)[0] == held_positions(layer, 1)[0] == list(range(6))


def test_what_is_shown_as_tuples_is_what_is_held():
    cache = FixedSizeDynamicCache(cache_size=4)
    held = step(cache, torch.randn(1, 2, 9, 3), torch.randn(1, 2, 9, 3), torch.rand(1, 2, 9, 9))
    for keys, values in (cache[0], next(iter(cache)), cache.to_legacy_cache()[0]):
        assert torch.equal(keys, held[0]) and torch.equal(values, held[1])


def test_a_layer_that_holds_nothing_says_so():
    cache = FixedSizeDynamicCache(config=tiny_llama().config, cache_size=4)
    with pytest.raises((RuntimeError, IndexError)):
        cache.key_cache[0]


def test_no_new_token_is_refused():
    cache = FixedSizeDynamicCache(cache_size=4)
    with pytest.raises(ValueError, match="there must be at least one new token"):
        cache.update(torch.ones(1, 2, 0, 3), torch.ones(1, 2, 0, 3), 0)


def test_random_eviction_differs_between_heads():
    cache = FixedSizeDynamicCache(cache_size=16, policy="random")
    step(cache, torch.randn(1, 4, 200, 3), torch.randn(1, 4, 200, 3), torch.zeros(1, 4, 200, 200))
    assert len({tuple(head) for head in held_positions(cache.layers[0])}) == 4


def test_a_nan_score_outlives_finite_ones():
    cache = FixedSizeDynamicCache(cache_size=2, **PLAIN)
    step(cache, one_token(0.0), one_token(0.0), torch.full((1, 2, 1, 1), float("nan")))
    for value in (1.0, 2.0, 3.0):
        T = min(cache.get_seq_length(), 2)
        step(cache, one_token(value), one_token(value), last_column(T + 1))
    assert held_positions(cache.layers[0]) == [[0, 3]] * 2


def test_repr_and_lazy_names():
    assert fixed_size_kv_cache.FixedSizeDynamicCache is FixedSizeDynamicCache
    cache = FixedSizeDynamicCache(cache_size=4)
    step(cache, torch.ones(1, 2, 9, 3), torch.ones(1, 2, 9, 3), torch.ones(1, 2, 9, 9))
    assert repr(cache) == "FixedSizeDynamicCache(4 of 9 tokens held, cache_size=4)"


def test_rank_is_the_order_of_the_operators():
    inf, nan = float("inf"), float("nan")
    ranks = reference.rank(torch.tensor([-inf, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, nan, inf]))
    assert ranks.tolist() == sorted(ranks.tolist()) and ranks[3] == ranks[4]
    assert len(set(ranks.tolist())) == 8


@pytest.mark.parametrize("passed", [True, False])
def test_past_the_trained_context_it_warns_once(passed):
    """With a cache that was made for the model, and with one that forward has taken over."""
    _warn_of_positions.cache_clear()
    model, ids = tiny_llama(), tokens(1, 20)
    model.config.max_position_embeddings = 30
    cache = FixedSizeDynamicCache(config=model.config, cache_size=8) if passed else DynamicCache()
    with recipe():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            feed(model, cache, ids, [20])
            feed(model, cache, ids[:, :10], [1] * 10)
        with pytest.warns(UserWarning, match="longer than the 30 tokens that the model was trained to read"):
            feed(model, cache, ids[:, :1], [1])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            feed(model, cache, ids[:, :1], [1])
