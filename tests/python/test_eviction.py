# SPDX-License-Identifier: Apache-2.0
"""Which tokens FixedSizeDynamicCache keeps, and the entry of those it does not."""

import itertools
import warnings

import pytest
import torch
from inputs import INF, NAN
from llamas import feed, held_positions, new_cache, recipe, tiny_llama, tokens
from steps import PLAIN, attend, last_column, one_token, step

from fixed_size_kv_cache import reference
from fixed_size_kv_cache import settings as settings_module
from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.layer import chunk, decode
from fixed_size_kv_cache.layer.attention import LogitRule, Skipped, attend_with_weights, products_of
from fixed_size_kv_cache.layer.new_tokens import Visibility
from fixed_size_kv_cache.layer.score_rule import eviction_scores, least, query_weights
from fixed_size_kv_cache.layer.slots import Tokens
from fixed_size_kv_cache.settings import FixedSizeCacheConfig


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
    settings = FixedSizeCacheConfig(cache_size=8, sink_tokens=1, recent_tokens=1, redundancy=0.5, score_prior=0.05)
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[[0.1, 0.4, 0.4, nan, inf, -inf, 0.2]]])
    positions = torch.tensor([[[0, 1, 2, 3, 4, -1, 6]]], dtype=torch.int32)
    weights = torch.tensor([[[9.0, 2.0, 1.0, 5.0, 0.0, 1.0, 1.0]]])
    redundancy = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]])
    facts = torch.stack([scores, weights, redundancy, torch.ones_like(scores)])  # [4, B, H, S]
    held = Tokens(torch.zeros(1, 1, 7, 2), torch.zeros(1, 1, 7, 2), facts, positions)
    e = eviction_scores(held, torch.tensor([7]), settings, group=2)
    assert e[0, 0, [0, 4, 5, 6]].tolist() == [inf, inf, -inf, inf]
    assert e[0, 0, 1].item() == pytest.approx(0.5 * 2 * 0.5) and e[0, 0, 2].item() == pytest.approx(0.5)
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


def test_the_victim_is_the_least_by_the_order_of_the_operators():
    """``least`` looks for one slot in another way than ``truncate`` sorts: every three scores in every order of age."""
    scores = [0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, NAN, -NAN, INF, -INF]
    cases = list(itertools.product(itertools.product(scores, repeat=3), itertools.permutations(range(3))))
    eviction = torch.tensor([case for case, _ in cases])[:, None]  # [cases, 1, 3]
    age = torch.tensor([order for _, order in cases], dtype=torch.int32)[:, None]
    positions = age.masked_fill(eviction == -INF, -1)  # an empty slot has none, and of those the first goes
    victims = least(eviction, positions).flatten().tolist()
    ranks = reference.rank(eviction).flatten(1).tolist()
    for case, rank, position, victim in zip(cases, ranks, positions.flatten(1).tolist(), victims, strict=True):
        assert victim == min(range(3), key=lambda slot: (rank[slot], position[slot], slot)), case


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
        torch.testing.assert_close(cache.layers[0].slots.tokens.redundancy[:, :, :300], expected, atol=1e-6, rtol=0)


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
            held, others = (x.slots.read(48) for x in (layer, same))
            assert torch.equal(held.positions, others.positions)
            for name in ("scores", "redundancy", "value_weights"):
                mine, theirs = (getattr(x, name) for x in (held, others))
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_chunk_of_several_blocks_decays_old_scores_once(path):
    """Queries are worked off 128 at a time; however many blocks there are, the tokens go in the order of one by one."""
    x = torch.randn(1, 8, 345, 4)
    chunks, singles = (FixedSizeDynamicCache(cache_size=305, sink_tokens=0, recent_tokens=0) for _ in range(2))
    assert chunks.settings.score_decay < 1
    for part in x[:, :, :305].split([5, 300], dim=2):
        attend(chunks, part)
    for part in x[:, :, :305].split(1, dim=2):
        attend(singles, part)
    for i in range(305, 345):
        for cache in (chunks, singles):
            attend(cache, x[:, :, i : i + 1])
        held, expected = (cache.get_positions(0).sort(-1).values for cache in (chunks, singles))
        assert torch.equal(held, expected), i


def test_decoding_evicts_as_a_sorted_list_would():
    """The slots against a plain list of tokens per head that is sorted at every step."""
    torch.manual_seed(0)
    C, H, D = 9, 2, 4
    cache = FixedSizeDynamicCache(cache_size=C, sink_tokens=1, recent_tokens=3)
    gamma, rho, prior = cache.settings.score_decay, cache.settings.redundancy, cache.settings.score_prior
    lists: list[list[dict]] = [[] for _ in range(H)]
    for position in range(60):
        key, value = torch.randn(1, H, 1, D), torch.randn(1, H, 1, D)
        seen, _ = cache.update(key, value, 0)
        layer = cache.layers[0]
        T = seen.shape[2] - 1
        weights = torch.rand(1, H, 1, T + 1)
        slots = layer.slots.tokens.positions[0, :, :T].tolist()
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
                victim = min(
                    free, key=lambda t: (((t["s"] + prior) * t["norm"] * (1 - rho * t["r"])).item(), t["position"])
                )
                lists[h].remove(victim)
            assert held_positions(layer)[h] == [t["position"] for t in lists[h]], (position, h)


def attend_as_a_chunk(slots, settings, stage, query, rule):
    visibility = Visibility(stage.held, 1, slots.read(stage.held).positions >= 0, stage.new)
    return chunk.attend(slots, settings, stage, query, rule, visibility, slots.skipped)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_decode_path_and_chunk_path_evict_the_same(include_skipped, monkeypatch):
    """One token at a time, with eviction at every step, by argmin and row write or by selection and gather."""
    model, ids = tiny_llama(), tokens(2, 70)
    with recipe():
        decoded, selected = (new_cache(model, 16, include_skipped=include_skipped) for _ in range(2))
        logits = feed(model, decoded, ids)
        monkeypatch.setattr(decode, "attend", attend_as_a_chunk)
        torch.testing.assert_close(feed(model, selected, ids), logits, rtol=1e-6, atol=1e-6)
    for layer, other in zip(decoded.layers, selected.layers, strict=True):
        for row in range(2):
            assert held_positions(layer, row) == held_positions(other, row)


def test_the_chunk_path_calls_truncate_and_the_decode_path_does_not(monkeypatch):
    calls = []
    original = chunk.truncate

    def counted(*args, **kwargs):
        calls.append(args[3])
        return original(*args, **kwargs)

    monkeypatch.setattr(chunk, "truncate", counted)
    cache = FixedSizeDynamicCache(cache_size=8)
    step(cache, torch.randn(1, 2, 20, 3), torch.randn(1, 2, 20, 3), torch.rand(1, 2, 20, 20))
    assert calls == [8]
    step(cache, torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3), torch.rand(1, 2, 1, 9))
    assert calls == [8]


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
    assert cache.layers[0].slots.skipped.count.tolist() == [[15, 15]]
    assert torch.equal(cache.key_cache[0], held[0])


def test_one_evicted_token_is_attended_to_as_itself():
    """n = 1: mean and log n are the token, so capacity C with the entry is exact up to C tokens."""
    model, ids = tiny_llama(), tokens(1, 24)
    with torch.no_grad():
        expected = model(ids).logits
    with recipe():
        logits = feed(model, new_cache(model, 24, include_skipped=True), ids)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def attention(query, keys, values, visible=None, skipped=None):
    if skipped is not None:
        keys_sum, values_sum, count, mode = skipped
        skipped = Skipped(keys_sum, values_sum, count, torch.zeros(count.shape), mode)
    rule = LogitRule(0.5)
    return attend_with_weights(query, products_of(query, keys, rule), values, visible, rule, skipped)


def test_mean_and_sum_of_equal_tokens():
    """n equal evicted tokens: the mean with log n is exact, the literal sum is not."""
    torch.manual_seed(0)
    key, value, query = (torch.randn(1, 1, 1, 4, dtype=torch.float64) for _ in range(3))
    others = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    n = 5
    exact = attention(query, torch.cat([others, *[key] * n], 2), torch.cat([others, *[value] * n], 2))[0]
    outputs = {
        mode: attention(
            query, others, others, skipped=(n * key[:, :, 0], n * value[:, :, 0], torch.tensor([[n]]), mode)
        )[0]
        for mode in ("mean", "sum")
    }
    torch.testing.assert_close(outputs["mean"], exact, rtol=1e-12, atol=1e-12)
    assert (outputs["sum"] - exact).abs().max() > 0.1


def test_what_nobody_sees_contributes_nothing_and_nan_is_not_hidden():
    nan = float("nan")
    query, keys, values = torch.ones(1, 2, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    keys[0, 0, 1], values[0, 0, 1] = nan, nan
    visible = torch.tensor([[[[True, False, True], [False, False, False]]]])
    output, weights, _ = attention(query, keys, values, visible)
    assert output[0, :, 0].eq(1).all() and output[0, :, 1].eq(0).all()
    assert weights[0, 0].tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert attention(query, keys, values, ~visible)[0][0, 0].isnan().all()


def test_the_literal_sum_warns_once():
    settings_module._warn_of_sum.cache_clear()
    with pytest.warns(UserWarning, match="hurts quality"):
        FixedSizeDynamicCache(cache_size=8, include_skipped=True, skipped_mode="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FixedSizeDynamicCache(cache_size=8, include_skipped=True, skipped_mode="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_likeness_is_the_same_in_one_step_and_in_many(dtype):
    """A key of zeros among them: 1 over its length is more than float16 can hold."""
    keys = torch.randn(1, 2, 30, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys[:, :, 5] = 0
    rule = LogitRule(0.5)
    single, chunk = FixedSizeDynamicCache(cache_size=30), FixedSizeDynamicCache(cache_size=30)
    for i in range(30):
        key = keys[:, :, i : i + 1]
        single.update(key, key, 0)
        single.attend(0, key, None, rule)
    chunk.update(keys, keys, 0)
    chunk.attend(0, keys, None, rule)
    one, many = (cache.layers[0].slots.tokens.redundancy[:, :, :30] for cache in (single, chunk))
    assert one.isfinite().all() and one.max() > 0.9
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)


def test_the_attention_of_padding_to_the_entry_of_the_evicted_is_not_counted():
    """Whatever the padding holds. In a decode step its output is zero."""
    tokens, rule = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0)), LogitRule(0.5)
    for queries in (3, 1):
        cache = FixedSizeDynamicCache(cache_size=4, include_skipped=True)
        cache.update(tokens, tokens, 0)
        cache.attend(0, tokens, None, rule)
        new = tokens[:, :, :queries].clone()
        new[:, :, 0] = float("nan")
        valid = torch.ones(1, queries, dtype=torch.bool)
        valid[0, 0] = False
        cache.update(new, new, 0)
        output = cache.attend(0, new, valid, rule)
        assert (output == 0).all() if queries == 1 else output[:, :, 1:].isfinite().all()
        lost = cache.lost_attention(0)
        assert (lost == 0).all() if queries == 1 else ((lost > 0) & (lost < 1)).all()
