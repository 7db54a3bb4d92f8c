# SPDX-License-Identifier: Apache-2.0
"""FixedSizeDynamicCache by itself: what it keeps, what it is told, and what it refuses."""

import copy
import math
import types
import warnings

import pytest
import torch
from llamas import feed, held_positions, new_cache, recipe, tiny_llama, tokens
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig, StaticCache, cache_utils

import fixed_size_kv_cache
from fixed_size_kv_cache import reference
from fixed_size_kv_cache import settings as settings_module
from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.layer import FixedSizeLayer
from fixed_size_kv_cache.score_rule import eviction_scores, least, query_weights
from fixed_size_kv_cache.settings import Settings

PLAIN = dict(score_decay=1.0, value_weight=False, redundancy=0.0, sink_tokens=0, recent_tokens=0)


def step(cache, keys, values, weights, layer_idx=0):
    """One step with given attention weights [B, Hq, Q, T + Q]."""
    seen, _ = cache.update(keys, values, layer_idx)
    query = torch.zeros(*weights.shape[:3], keys.shape[-1])
    return cache.cache_truncate(layer_idx, query, seen, weights)


def one_token(value: float, H: int = 2, D: int = 3) -> torch.Tensor:
    return torch.full((1, H, 1, D), value)


def last_column(T: int, mass: float = 1.0, Hq: int = 2) -> torch.Tensor:
    weights = torch.zeros(1, Hq, 1, T)
    weights[..., -1] = mass
    return weights


# ---- which tokens stay ----------------------------------------------------------------------------------------------


def test_the_least_attended_token_goes_per_head():
    cache = FixedSizeDynamicCache(cache_size=3, **PLAIN)
    weights = torch.zeros(1, 2, 3, 3)
    weights[0, 0, 2] = torch.tensor([0.2, 0.5, 0.3])  # head 0: token 0 is the least
    weights[0, 1, 2] = torch.tensor([0.5, 0.1, 0.4])  # head 1: token 1
    keys = torch.arange(3.0)[None, None, :, None].expand(1, 2, 3, 3)
    step(cache, keys, keys, weights)
    held, _ = step(cache, one_token(3.0), one_token(3.0), last_column(4))
    assert sorted(held[0, 0, :, 0].tolist()) == [1.0, 2.0, 3.0]
    assert sorted(held[0, 1, :, 0].tolist()) == [0.0, 2.0, 3.0]


def test_each_kv_head_hears_its_own_group_only():
    """Four query heads on two KV heads: heads 0 and 1 vote for KV head 0, heads 2 and 3 for KV head 1."""
    cache = FixedSizeDynamicCache(cache_size=2, **PLAIN)
    weights = torch.zeros(1, 4, 2, 2)
    weights[0, :2, 1] = torch.tensor([0.9, 0.1])
    weights[0, 2:, 1] = torch.tensor([0.1, 0.9])
    keys = torch.arange(2.0)[None, None, :, None].expand(1, 2, 2, 3)
    step(cache, keys, keys, weights)
    step(cache, one_token(2.0), one_token(2.0), last_column(3, Hq=4))
    assert held_positions(cache.layers[0]) == [[0, 2], [1, 2]]


def test_scores_accumulate_over_steps():
    """Token 0 was attended to before, token 1 is now: the sum decides, not the last step."""
    cache = FixedSizeDynamicCache(cache_size=2, **PLAIN)
    step(cache, one_token(0.0), one_token(0.0), torch.ones(1, 2, 1, 1))
    step(cache, one_token(1.0), one_token(1.0), torch.tensor([0.3, 0.7]).expand(1, 2, 1, 2))
    step(cache, one_token(2.0), one_token(2.0), torch.tensor([0.0, 0.1, 0.9]).expand(1, 2, 1, 3))
    assert held_positions(cache.layers[0]) == [[0, 2]] * 2  # 1.3, 0.8, 0.9


def test_of_equal_scores_the_older_goes_on_both_paths():
    for chunks in ([1] * 6, [6], [3, 3]):
        cache = FixedSizeDynamicCache(cache_size=4, **PLAIN)
        for Q in chunks:
            T = min(cache.get_seq_length(), 4)
            step(cache, torch.ones(1, 2, Q, 3), torch.ones(1, 2, Q, 3), torch.zeros(1, 2, Q, T + Q))
        assert held_positions(cache.layers[0]) == [[2, 3, 4, 5]] * 2


@pytest.mark.parametrize("policy", ["attention", "streaming", "random"])
@pytest.mark.parametrize("chunks", [[1] * 40, [40], [7] * 5 + [5], [30, 1, 1, 8]])
def test_sinks_and_recent_tokens_stay(policy, chunks):
    cache = FixedSizeDynamicCache(cache_size=12, sink_tokens=2, recent_tokens=5, policy=policy)
    for Q in chunks:
        T = min(cache.get_seq_length(), 12)
        step(cache, torch.randn(1, 2, Q, 3), torch.randn(1, 2, Q, 3), torch.rand(1, 4, Q, T + Q))
    for head in held_positions(cache.layers[0]):
        assert len(head) == 12
        assert {0, 1, 35, 36, 37, 38, 39} <= set(head)
        if policy == "streaming":
            assert head == [0, 1, *range(30, 40)]


def test_a_cache_of_one_token_keeps_the_better_one():
    cache = FixedSizeDynamicCache(cache_size=1, score_decay=1.0, value_weight=False, redundancy=0.0)
    assert (cache.settings.sink_tokens, cache.settings.recent_tokens) == (0, 0)
    step(cache, one_token(0.0), one_token(0.0), torch.ones(1, 2, 1, 1))
    step(cache, one_token(1.0), one_token(1.0), torch.tensor([0.9, 0.1]).expand(1, 2, 1, 2))
    assert held_positions(cache.layers[0]) == [[0]] * 2


def test_the_score_rule():
    settings = Settings(cache_size=8, sink_tokens=1, recent_tokens=1, redundancy=0.5)
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[[0.1, 0.4, 0.4, nan, inf, -inf, 0.2]]])
    positions = torch.tensor([[[0, 1, 2, 3, 4, -1, 6]]], dtype=torch.int32)
    weights = torch.tensor([[[9.0, 2.0, 1.0, 5.0, 0.0, 1.0, 1.0]]])
    redundancy = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]])
    e = eviction_scores(scores, positions, weights, redundancy, torch.tensor([7]), settings)
    assert e[0, 0, [0, 4, 5, 6]].tolist() == [inf, inf, -inf, inf]
    assert e[0, 0, 1].item() == pytest.approx(0.4 * 2 * 0.5) and e[0, 0, 2].item() == pytest.approx(0.4)
    assert e[0, 0, 3].isnan()
    order = []
    for _ in range(7):
        slot = least(e, positions)[0, 0].item()
        order.append(slot)
        e[0, 0, slot], positions[0, 0, slot] = inf, 1000 + len(order)
    assert order[:4] == [5, 1, 2, 3]


def test_equal_scores_go_by_position():
    e = torch.tensor([[[0.5, 0.0, -0.0, 0.5]]])
    assert least(e, torch.tensor([[[1, 9, 4, 2]]], dtype=torch.int32)).item() == 2


def test_query_weights_of_a_padded_row():
    valid = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    weights, carry = query_weights(valid, 0.5)
    assert weights.tolist() == [[0.25, 0.5, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]
    assert carry.tolist() == [0.125, 0.25, 1.0]


def test_redundancy_is_the_largest_cosine_with_a_newer_key():
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 300, 4)
    for chunks in ([1] * 300, [300], [280, 20]):
        cache = FixedSizeDynamicCache(cache_size=400)
        start = 0
        for Q in chunks:
            new = keys[:, :, start : start + Q]
            step(cache, new, new, torch.zeros(1, 2, Q, start + Q))
            start += Q
        unit = torch.nn.functional.normalize(keys, dim=-1)
        cosine = (unit @ unit.mT).triu(1)  # row: the older token
        expected = cosine.amax(-1).clamp(min=0)
        torch.testing.assert_close(cache.layers[0].redundancy[:, :, :300], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [{}, PLAIN, dict(include_skipped=True), dict(policy="random")])
def test_chunks_score_as_their_tokens_one_by_one(settings):
    """Until something is evicted, chunk boundaries change nothing: positions, scores, redundancy, value weights."""
    model, ids = tiny_llama(), tokens(2, 48)
    with recipe():
        caches = [new_cache(model, 50, **settings) for _ in range(3)]
        for cache, chunks in zip(caches, ([48], [1] * 48, [13, 1, 20, 14]), strict=True):
            feed(model, cache, ids, chunks)
    for other in caches[1:]:
        for layer, same in zip(caches[0].layers, other.layers, strict=True):
            assert torch.equal(layer.positions, same.positions)
            for name in ("scores", "redundancy", "value_weights"):
                torch.testing.assert_close(getattr(layer, name), getattr(same, name), rtol=1e-5, atol=1e-6)


def test_decoding_evicts_as_a_sorted_list_would():
    """The slots against a plain list of tokens per head that is sorted at every step."""
    torch.manual_seed(0)
    C, H, D = 9, 2, 4
    cache = FixedSizeDynamicCache(cache_size=C, sink_tokens=1, recent_tokens=3)
    gamma, rho = cache.settings.score_decay, cache.settings.redundancy
    lists: list[list[dict]] = [[] for _ in range(H)]
    for position in range(60):
        key, value = torch.randn(1, H, 1, D), torch.randn(1, H, 1, D)
        seen, _ = cache.update(key, value, 0)
        layer = cache.layers[0]
        T = seen.shape[2] - 1
        weights = torch.rand(1, H, 1, T + 1)
        slots = layer.positions[0, :, :T].tolist()
        cache.cache_truncate(0, torch.zeros(1, H, 1, D), seen, weights)
        for h in range(H):
            mass = {p: weights[0, h, 0, i] for i, p in enumerate(slots[h])}
            new = dict(position=position, key=key[0, h, 0], norm=value[0, h, 0].norm(), s=torch.tensor(0.0), r=0.0)
            mass[position] = weights[0, h, 0, T]
            for token in lists[h]:
                cosine = torch.cosine_similarity(token["key"], new["key"], dim=0).item()
                token["r"] = max(token["r"], cosine)
            lists[h].append(new)
            for token in lists[h]:
                token["s"] = gamma * token["s"] + mass[token["position"]]
            if len(lists[h]) > C:
                free = [t for t in lists[h] if 1 <= t["position"] < position + 1 - 3]
                victim = min(free, key=lambda t: ((t["s"] * t["norm"] * (1 - rho * t["r"])).item(), t["position"]))
                lists[h].remove(victim)
            assert held_positions(layer)[h] == [t["position"] for t in lists[h]], (position, h)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_decode_path_and_chunk_path_evict_the_same(include_skipped, monkeypatch):
    """One token at a time, with eviction at every step, by argmin and row write or by selection and gather."""
    model, ids = tiny_llama(), tokens(2, 70)
    with recipe():
        decoded, selected = (new_cache(model, 16, include_skipped=include_skipped) for _ in range(2))
        logits = feed(model, decoded, ids)
        monkeypatch.setattr(FixedSizeLayer, "_fold_one", FixedSizeLayer._fold_chunk)
        torch.testing.assert_close(feed(model, selected, ids), logits, rtol=1e-6, atol=1e-6)
    for layer, other in zip(decoded.layers, selected.layers, strict=True):
        for row in range(2):
            assert held_positions(layer, row) == held_positions(other, row)


def test_the_chunk_path_calls_truncate_and_the_decode_path_does_not(monkeypatch):
    calls = []
    original = torch.ops.fsdc.truncate

    def counted(*args, **kwargs):
        calls.append(args[3])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.ops.fsdc, "truncate", counted)
    cache = FixedSizeDynamicCache(cache_size=8)
    step(cache, torch.randn(1, 2, 20, 3), torch.randn(1, 2, 20, 3), torch.rand(1, 2, 20, 20))
    assert calls == [8]
    step(cache, torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3), torch.rand(1, 2, 1, 9))
    assert calls == [8]


# ---- the entry of the skipped tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 20, [20], [9, 1, 1, 9]])
def test_the_last_entry_is_the_literal_sum_of_what_was_evicted(chunks):
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 20, 3), torch.randn(1, 2, 20, 3)
    cache = FixedSizeDynamicCache(cache_size=6, include_skipped=True)
    start = 0
    for Q in chunks:
        T = min(start, 5)
        new = slice(start, start + Q)
        held = step(cache, keys[:, :, new], values[:, :, new], torch.rand(1, 2, Q, T + Q))
        start += Q
        assert held[0].shape[2] == min(start, 6)
    for tensors, all_of_them in zip(held, (keys, values), strict=True):
        torch.testing.assert_close(tensors.sum(2), all_of_them.sum(2))
    assert cache.layers[0].skipped_count.tolist() == [[15, 15]]
    assert torch.equal(cache.key_cache[0], held[0])


def test_one_evicted_token_is_attended_to_as_itself():
    """n = 1: mean and log n are the token, so capacity C with the entry is exact up to C tokens."""
    model, ids = tiny_llama(), tokens(1, 24)
    with torch.no_grad():
        expected = model(ids).logits
    with recipe():
        logits = feed(model, new_cache(model, 24, include_skipped=True), ids)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_mean_and_sum_of_equal_tokens():
    """n equal evicted tokens: the mean with log n is exact, the literal sum is not."""
    from fixed_size_kv_cache.attention import Skipped, attend

    torch.manual_seed(0)
    key, value, query = (torch.randn(1, 1, 1, 4, dtype=torch.float64) for _ in range(3))
    others = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    n = 5
    exact, _ = attend(query, torch.cat([others, *[key] * n], 2), torch.cat([others, *[value] * n], 2), None, 0.5)
    outputs = {
        mode: attend(
            query, others, others, None, 0.5, Skipped(n * key[:, :, 0], n * value[:, :, 0], torch.tensor([[n]]), mode)
        )[0]
        for mode in ("mean", "sum")
    }
    torch.testing.assert_close(outputs["mean"], exact, rtol=1e-12, atol=1e-12)
    assert (outputs["sum"] - exact).abs().max() > 0.1


def test_what_nobody_sees_contributes_nothing_and_nan_is_not_hidden():
    from fixed_size_kv_cache.attention import attend

    nan = float("nan")
    query, keys, values = torch.ones(1, 2, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    keys[0, 0, 1], values[0, 0, 1] = nan, nan
    visible = torch.tensor([[[[True, False, True], [False, False, False]]]])
    output, weights = attend(query, keys, values, visible, 0.5)
    assert output[0, :, 0].eq(1).all() and output[0, :, 1].eq(0).all()
    assert weights[0, 0].tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert attend(query, keys, values, ~visible, 0.5)[0][0, 0].isnan().all()


def test_the_literal_sum_warns_once():
    settings_module._warn_of_sum.cache_clear()
    with pytest.warns(UserWarning, match="hurts quality"):
        FixedSizeDynamicCache(cache_size=8, include_skipped=True, skipped_mode="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FixedSizeDynamicCache(cache_size=8, include_skipped=True, skipped_mode="sum")


# ---- what it is told ------------------------------------------------------------------------------------------------


def test_a_positional_config_is_refused_with_the_right_form():
    with pytest.raises(TypeError, match=r"FixedSizeDynamicCache\(config=model.config, cache_size=1024\)"):
        FixedSizeDynamicCache(tiny_llama().config)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="got budget"):
        FixedSizeDynamicCache(budget=3)


@pytest.mark.parametrize(
    "settings, error, text",
    [
        (dict(cache_size=0), ValueError, "cache_size must be at least 1; got 0"),
        (dict(cache_size=1, include_skipped=True), ValueError, "cache_size must be at least 2; got 1"),
        (dict(cache_size=1.5), TypeError, "cache_size must be a whole number; got 1.5"),
        (dict(include_skipped="False"), TypeError, "include_skipped must be True or False; got 'False'"),
        (dict(cache_size=True), TypeError, "cache_size must be a whole number; got True"),
        (
            dict(cache_size=8, sink_tokens=4, recent_tokens=5),
            ValueError,
            "at most the 8 tokens that are held; got 4 ",
        ),
        (dict(sink_tokens=-1), ValueError, "sink_tokens must be at least 0; got -1"),
        (dict(score_decay=0.0), ValueError, "score_decay must be above 0 and at most 1; got 0.0"),
        (dict(score_decay=math.nan), ValueError, "score_decay must be above 0"),
        (dict(redundancy=1.1), ValueError, "redundancy must be from 0 to 1; got 1.1"),
        (dict(policy="lru"), ValueError, "policy must be one of attention, streaming, random; got 'lru'"),
        (dict(skipped_mode="max"), ValueError, "skipped_mode must be one of mean, sum; got 'max'"),
    ],
)
def test_settings_out_of_range(settings, error, text):
    with pytest.raises(error, match=text):
        FixedSizeDynamicCache(**settings)


@pytest.mark.parametrize(
    "size, sinks, recent, decay", [(1, 0, 0, 0.5), (2, 0, 1, 0.5), (7, 1, 3, 1 - 2 / 7), (1024, 4, 512, 1 - 2 / 1024)]
)
def test_default_settings(size, sinks, recent, decay):
    made = Settings(cache_size=size)
    assert (made.sink_tokens, made.recent_tokens, made.score_decay) == (sinks, recent, decay)


@pytest.mark.parametrize("text, value", [(" 7 ", 7), ("2048", 2048)])
def test_size_from_the_environment(text, value, monkeypatch):
    monkeypatch.setenv("FSDC_KV_CACHE_SIZE", text)
    assert FixedSizeDynamicCache().settings.cache_size == value
    assert FixedSizeDynamicCache(cache_size=5).settings.cache_size == 5  # what is said wins


@pytest.mark.parametrize("text", ["1e3", "-1", "0", "", " ", "1_000", "ten", "2.0", "٣"])
def test_size_from_the_environment_is_read_strictly(text, monkeypatch):
    monkeypatch.setenv("FSDC_KV_CACHE_SIZE", text)
    with pytest.raises(ValueError, match=f"FSDC_KV_CACHE_SIZE must be a whole number of at least 1; got {text!r}"):
        FixedSizeDynamicCache()


@pytest.mark.parametrize("name", ["FSDC_INCLUDE_SKIPPED", "FSDC_FREE_MEMORY"])
def test_switches_from_the_environment(name, monkeypatch):
    setting = name.removeprefix("FSDC_").lower()
    for text, value in {"True": 1, "FALSE": 0, " yes ": 1, "no": 0, "1": 1, "0": 0, "On": 1, "off": 0}.items():
        monkeypatch.setenv(name, text)
        assert getattr(FixedSizeDynamicCache().settings, setting) is bool(value)
        assert getattr(FixedSizeDynamicCache(**{setting: True}).settings, setting) is True
    for text in ("", "2", "enabled", "None"):
        monkeypatch.setenv(name, text)
        with pytest.raises(ValueError, match=f"{name} must be true, false, 1, 0, yes, no, on or off; got {text!r}"):
            FixedSizeDynamicCache()


def test_memory_is_freed_once_per_forward_and_never_in_a_decode_step(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("freed"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cache = FixedSizeDynamicCache(cache_size=8, free_memory=True)
    cache.expected_layers = 3
    cache.layers = [types.SimpleNamespace(device=torch.device("cuda")) for _ in range(3)]
    for queries, expected in ((20, 1), (1, 0)):
        calls.clear()
        for layer_idx in range(3):
            cache._free_memory(layer_idx, queries)
        assert len(calls) == expected
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cache._free_memory(2, 20)
    assert not calls


# ---- caches that come from elsewhere --------------------------------------------------------------------------------


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
    assert cache.layers[0].scores[:, :, :10].eq(0).all()


def test_from_legacy_cache_of_tuples_cuts_at_once(monkeypatch):
    monkeypatch.setenv("FSDC_KV_CACHE_SIZE", "8")
    keys = torch.arange(10.0)[None, None, :, None].expand(1, 2, 10, 3)
    cache = FixedSizeDynamicCache.from_legacy_cache(((keys, keys),))
    assert held_positions(cache.layers[0]) == [[0, 1, *range(4, 10)]] * 2  # two sinks, and the newest of equal ones
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


# ---- a step has two halves ------------------------------------------------------------------------------------------


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
    with pytest.raises(RuntimeError, match=r"layer 0 must be filled by update"):
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
    with pytest.raises(ValueError, match="key_states must have the 3 columns"):
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
    torch.testing.assert_close(caches[0].layers[0].scores, caches[1].layers[0].scores)


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


# ---- rows, copies, modes --------------------------------------------------------------------------------------------


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
    assert layer.seen.tolist() == [8, 10]
    layer.crop(-4)
    assert layer.seen.tolist() == [6, 6]
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
