# SPDX-License-Identifier: Apache-2.0
"""KV heads of different sizes: each is what it would be in a layer of its own, and memory is the sum of their sizes."""

import copy

import pytest
import torch
from llamas import held_positions
from steps import step

from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.layer.attention import LogitRule
from fixed_size_kv_cache.layer.layer import FixedSizeLayer
from fixed_size_kv_cache.layer.unequal import UnequalLayer
from fixed_size_kv_cache.settings import FixedSizeCacheConfig

SIZES = [24, 5, 12, 7]
B, H, G, D = 2, len(SIZES), 2, 4
S = 90
RULES = {
    "plain": LogitRule(0.5),
    "softcap and sinks": LogitRule(0.5, 2.0, torch.linspace(-1, 1, H * G)),
}
CHUNKS = {
    "one by one": [1] * S,
    "a prompt, then steps": [40] + [1] * 30,
    "chunks": [3, 1, 1, 20, 1, 30, 1, 1, 9, 1],
    "not full": [4, 1, 2],
}
SETTINGS = {
    "plain": {},
    "no edges": dict(sink_tokens=0, recent_tokens=0),
    "entry": dict(include_skipped=True),
    "sum": dict(include_skipped=True, skipped_mode="sum"),
    "spans": dict(protected_spans=[(2, 3), (13, 14)]),
    "spans of rows": dict(protected_spans=[[(2, 4)], [(7, 8)]], sink_tokens=0),
    "H2O": dict(score_decay=1.0, score_prior=0.0, value_weight=False, redundancy=0.0),
}


def inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H * G, S, D), (B, H, S, D), (B, H, S, D + 1)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def unequal(settings, sizes=SIZES) -> UnequalLayer:
    cache = FixedSizeDynamicCache(cache_size=[sizes], **settings)
    layer = cache.new_layer(0)
    assert type(layer) is UnequalLayer
    return layer


def alone(settings, sizes=SIZES) -> list[FixedSizeLayer]:
    """Each head as a layer of its own."""
    settings = dict(settings)
    spans = settings.pop("protected_spans", None)
    heads = FixedSizeCacheConfig(cache_size=[sizes], **settings).of_layer(0)
    return [FixedSizeLayer(head, spans) for head in heads]


class Both:
    """An unequal layer and its heads alone, which go through the same."""

    def __init__(self, settings, rule=RULES["plain"], dtype=torch.float64, mask=None, seed=0):
        self.layer, self.heads, self.rule, self.mask = unequal(settings), alone(settings), rule, mask
        self.query, self.keys, self.values = inputs(dtype, seed)
        self.at = 0
        self.rows = torch.arange(B)

    def attend(self, Q):
        here = slice(self.at, self.at + Q)
        query, keys, values = (x[self.rows, :, here] for x in (self.query, self.keys, self.values))
        mask = None if self.mask is None else self.mask[self.rows, here]
        self.layer.update(keys, values)
        output = self.layer.attend(query, mask, self.rule)
        expected = []
        for h, head in enumerate(self.heads):
            group = slice(h * G, (h + 1) * G)
            head.update(keys[:, h : h + 1], values[:, h : h + 1])
            sinks = None if self.rule.sinks is None else self.rule.sinks[group]
            expected.append(head.attend(query[:, group], mask, self.rule._replace(sinks=sinks)))
        torch.testing.assert_close(output, torch.cat(expected, dim=1), rtol=1e-10, atol=1e-10)
        self.at += Q
        self.check()

    def check(self):
        slots = self.layer.slots
        if slots is None:
            return
        for h, (mine, head) in enumerate(zip(slots.of_heads(self.layer.tokens_held), self.heads, strict=True)):
            theirs = head.slots.read(head.tokens_held)
            assert torch.equal(mine.positions, theirs.positions), h
            held = mine.positions >= 0  # what an empty slot holds means nothing
            for name in ("keys", "values", "scores", "value_weights", "redundancy", "key_scales"):
                x, y = (getattr(tokens, name)[held] for tokens in (mine, theirs))
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
            assert (mine.scores[~held] == -torch.inf).all()
            if slots.skipped is not None:
                for x, y in zip(slots.skipped[:4], head.slots.skipped[:4], strict=True):
                    torch.testing.assert_close(x[:, h : h + 1], y, rtol=1e-6, atol=1e-6)
        assert torch.equal(slots.seen, self.heads[0].slots.seen)
        assert (self.layer.positions[:, 1, SIZES[1] :] == -1).all()

    def all(self, name, *arguments):
        for each in (self.layer, *self.heads):
            getattr(each, name)(*arguments)
        self.check()


@pytest.mark.parametrize("pads", ["no pads", "left pads", "pads between"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_each_head_is_a_layer_of_its_own(settings, chunks, rule, pads):
    mask = None
    if pads != "no pads":
        mask = torch.ones(B, S, dtype=torch.long)
        mask[0, : 30 if pads == "left pads" else 2] = 0
        mask[1, slice(1) if pads == "left pads" else slice(20, 50, 3)] = 0
    both = Both(SETTINGS[settings], RULES[rule], mask=mask)
    for Q in CHUNKS[chunks]:
        both.attend(Q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype):
    layer, (query, keys, values) = unequal({}), inputs(dtype)
    for start, Q in ((0, 40), (40, 1), (41, 5), (46, 1)):
        here = slice(start, start + Q)
        layer.update(keys[:, :, here], values[:, :, here])
        output = layer.attend(query[:, :, here], None, RULES["plain"])
        assert output.dtype == dtype and output.isfinite().all() and output.shape == (B, H * G, Q, D + 1)
    assert (layer.positions >= 0).sum(-1).tolist() == [SIZES] * B


# ---- memory ----------------------------------------------------------------------------------------------------------

SLOT = B * ((D + D + 1) * 8 + 5 * 4)  # bytes of a slot of all rows
REST = B * 4 + 8 + H * 4 * 4  # seen, columns, layout


def bytes_of(capacity: int) -> int:
    return SLOT * sum(min(capacity, size) + 1 for size in SIZES) + REST


def test_memory_is_the_sum_of_the_sizes_and_grows_up_to_it():
    layer, (query, keys, values), grown = unequal({}), inputs(), []
    for t in range(S):
        layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        layer.attend(query[:, :, t : t + 1], None, RULES["plain"])
        grown.append(layer.nbytes)
    capacities = [1, 2, 4, 4, 8, 8, 8, 8, *[16] * 8, *[24] * 74]
    assert grown == [bytes_of(capacity) for capacity in capacities]
    assert len({x.data_ptr() for x in layer.slots.tensors}) == 7  # none is empty


def test_full_buffers_do_not_move():
    layer, (query, keys, values) = unequal({"static": True}), inputs()
    places = set()
    for start, Q in ((0, 1), (1, 40), (41, 1), (42, 9), (51, 1)):
        here = slice(start, start + Q)
        layer.update(keys[:, :, here], values[:, :, here])
        layer.attend(query[:, :, here], None, RULES["plain"])
        places.add(tuple(x.data_ptr() for x in layer.slots.tensors))
        assert layer.nbytes == bytes_of(24)
    assert len(places) == 1


def test_bytes_are_those_of_equal_heads():
    sizes = [[100, 700, 64, 160], [256, 256, 256, 256]]
    caches = [FixedSizeDynamicCache(cache_size=[row], static=True) for row in sizes]
    for cache in caches:
        cache.update(torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 1, 64), 0)
    unequal_bytes, equal_bytes = (cache.nbytes for cache in caches)
    assert type(caches[1].layers[0]) is FixedSizeLayer
    assert unequal_bytes - equal_bytes == 4 * 4 * 4  # the layout


# ---- tokens taken back, rows, copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kept, blocks", [(0, [4]), (1, [4]), (3, [5]), (5, [5]), (6, [3, 1, 4]), (1, [1, 1, 1])])
@pytest.mark.parametrize("settings", ["plain", "entry"])
def test_recorded_tokens_are_taken_back(settings, kept, blocks, padded):
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, :3] = mask[1, 22:24] = 0
    both = Both(SETTINGS[settings], mask=mask if padded else None)
    both.attend(20)
    both.all("activate_past_recording")
    for Q in blocks:
        both.attend(Q)
    both.all("crop", -(sum(blocks) - kept))
    both.all("stop_past_recording")
    both.at = 20 + kept
    for Q in (1, 6, 1):
        both.attend(Q)


def test_crop_until_something_is_evicted():
    both = Both({})
    both.attend(3)
    both.attend(1)
    both.all("crop", 2)
    both.at = 2
    both.attend(1)
    both.attend(4)
    with pytest.raises(RuntimeError, match="only until something is evicted, up to 5 tokens; got 7 tokens seen"):
        both.layer.crop(-1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    "change, argument, rows",
    [
        ("reorder_cache", torch.tensor([1, 1]), [1, 1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("batch_select_indices", torch.tensor([1]), [1]),
    ],
)
def test_rows_move_as_a_whole(change, argument, rows, recorded, padded):
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, :3] = 0
    both = Both(SETTINGS["entry"], mask=mask if padded else None)
    both.attend(20)
    if recorded:
        both.all("activate_past_recording")
        both.attend(3)
    both.all(change, argument)
    both.rows = both.rows[torch.tensor(rows)]
    if recorded:
        both.all("crop", -1)
        both.all("stop_past_recording")
    for Q in (1, 5, 1):
        both.attend(Q)


def test_copies_part_and_reset_forgets():
    both = Both(SETTINGS["entry"])
    both.attend(20)
    copied = copy.deepcopy(both.layer)
    before = copied.positions.clone()
    both.attend(1)
    both.attend(9)
    assert torch.equal(copied.positions, before) and not torch.equal(both.layer.positions, before)
    places = [x.data_ptr() for x in both.layer.slots.tensors]
    both.all("reset")
    both.at = 0
    both.attend(30)
    both.attend(1)
    assert [x.data_ptr() for x in both.layer.slots.tensors] == places


@pytest.mark.parametrize("settings", ["plain", "entry", "spans of rows"])
@pytest.mark.parametrize("seen", [3, 20, 40])
def test_save_and_load(tmp_path, settings, seen):
    cache = FixedSizeDynamicCache(cache_size=[SIZES], **SETTINGS[settings])
    query, keys, values = inputs()

    def attend(cache, here):
        cache.update(keys[:, :, here], values[:, :, here], 0)
        return cache.attend(0, query[:, :, here], None, RULES["plain"])

    attend(cache, slice(seen))
    attend(cache, slice(seen, seen + 1))
    cache.save(tmp_path / "a")
    loaded = FixedSizeDynamicCache.load(tmp_path / "a")
    assert loaded.settings == cache.settings and type(loaded.layers[0]) is UnequalLayer
    for start, Q in ((seen + 1, 1), (seen + 2, 7), (seen + 9, 1)):
        here = slice(start, start + Q)
        assert torch.equal(attend(loaded, here), attend(cache, here))
    held = cache.layers[0].tokens_held
    for x, y in zip(*(each.layers[0].slots.read(held) for each in (loaded, cache)), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(loaded.get_positions(0), cache.get_positions(0))


def test_growth_and_slots_survive_inference_mode():
    layer, (query, keys, values) = unequal({}), inputs()
    with torch.inference_mode():
        layer.update(keys[:, :, :3], values[:, :, :3])
        layer.attend(query[:, :, :3], None, RULES["plain"])
    for here in (slice(3, 4), slice(4, 30), slice(30, 31)):
        layer.update(keys[:, :, here], values[:, :, here])
        layer.attend(query[:, :, here], None, RULES["plain"])
    assert not any(x.is_inference() for x in layer.slots.tensors)


# ---- what there is to look at, and what is refused -------------------------------------------------------------------


@pytest.fixture
def cache():
    cache = FixedSizeDynamicCache(cache_size=[SIZES])
    query, keys, values = inputs()
    cache.update(keys[:, :, :40], values[:, :, :40], 0)
    cache.attend(0, query[:, :, :40], None, RULES["plain"])
    return cache


def test_what_a_user_looks_at(cache):
    assert cache.get_held_tokens(0).tolist() == [SIZES] * B
    positions = cache.get_positions(0)
    assert positions.shape == (B, H, 24)
    assert [(head >= 0).sum().item() for head in positions[0]] == SIZES
    assert repr(cache) == "FixedSizeDynamicCache(12 of 40 tokens held on average, cache_size=12 on average)"
    assert cache.get_seq_length() == 40 and cache.get_mask_sizes(1, 0) == (25, 16)


def refuses(match):
    return pytest.raises(NotImplementedError, match=match)


def test_what_needs_a_rectangle_is_refused(cache):
    x = (torch.zeros(B, H, 1, size, dtype=torch.float64) for size in (D, D + 1))
    same = "all KV heads of a layer must have the same cache_size here"
    for name in ("key_cache", "value_cache"):
        with refuses(f"key_cache and value_cache: {same}, which show all heads"):
            getattr(cache, name)[0]
    with refuses(f"key_cache and value_cache: {same}"):
        cache.to_legacy_cache()
    for name in ("keys", "values"):
        with refuses(f"{name}: {same}"):
            getattr(cache.layers[0], name)
    keys, values = cache.update(*x, 0)
    for weights in (None, torch.zeros(B, H * G, 1, 25)):
        with refuses(f"cache_truncate: {same}"):
            cache.cache_truncate(0, torch.zeros(B, H * G, 1, D), keys, weights)
    with refuses(f"attention_weights: {same}"):
        cache.layers[0].attention_weights(torch.zeros(B, H * G, 1, D), None, RULES["plain"])
    for other in (lambda: torch.zeros(B, H, 1, D) @ keys.mT, lambda: values.float(), lambda: keys + 1):
        with refuses("keys of heads of different sizes can be read by our own attention only; got another one"):
            other()
    assert keys.shape == (B, H, 1, D) and values.dtype == torch.float64


@pytest.mark.parametrize("policy", ["streaming", "random"])
def test_baselines_are_refused(policy):
    with pytest.raises(ValueError, match=f"same for all KV heads of a layer with policy='{policy}'.*; got 5 to 24"):
        FixedSizeDynamicCache(cache_size=[SIZES], policy=policy)


def test_other_devices_are_refused():
    x = torch.zeros(B, H, 3, D, device="meta")
    with refuses("cache_size must be the same for all KV heads of a layer on meta.*; got 5 to 24"):
        FixedSizeDynamicCache(cache_size=[SIZES]).update(x, x, 0)


@pytest.mark.parametrize("sizes", [SIZES, [8, 8, 8, 8]], ids=str)
def test_another_number_of_heads(sizes):
    x = torch.zeros(B, 3, 3, D)
    with pytest.raises(ValueError, match="cache_size must have a size for each of the 3 KV heads; got 4"):
        FixedSizeDynamicCache(cache_size=[sizes]).update(x, x, 0)


def test_another_number_of_layers():
    x = torch.zeros(B, H, 3, D)
    cache = FixedSizeDynamicCache(cache_size=[8, SIZES])
    for i in range(2):
        step(cache, x, x, torch.zeros(B, H * G, 3, 3), i) if i == 0 else cache.update(x, x, i)
    with pytest.raises(ValueError, match=r"cache_size must have a size for each layer .*; got none for layer 2"):
        cache.update(x, x, 2)


def test_a_span_must_fit_into_the_smallest_head():
    words = r"room in the 5 tokens that are held by the smallest KV head; got 0 sink_tokens \+ 1 .* \+ 6 tokens"
    with pytest.raises(ValueError, match=words):
        FixedSizeDynamicCache(cache_size=[SIZES], protected_spans=[(2, 8)])


def test_edges_scale_with_the_size_of_a_head():
    settings = FixedSizeCacheConfig(cache_size=[[64, 448], [128, 384]], sink_tokens=4, recent_tokens=64)
    edges = [(x.cache_size, x.sink_tokens, x.recent_tokens) for i in range(2) for x in settings.of_layer(i)]
    assert edges == [(64, 1, 16), (448, 4, 112), (128, 2, 32), (384, 4, 96)]
    assert {x.score_decay for i in range(2) for x in settings.of_layer(i)} == {1 - 4 / 256}


def test_a_size_for_each_layer():
    cache = FixedSizeDynamicCache(cache_size=[8, 20])
    x = torch.randn(1, H, 30, D)
    for i, size in enumerate((8, 20)):
        cache.update(x, x, i)
        cache.attend(i, x.repeat_interleave(G, dim=1), None, RULES["plain"])
        assert held_positions(cache.layers[i])[0][-1] == 29 and cache.get_held_tokens(i).eq(size).all()
        assert type(cache.layers[i]) is FixedSizeLayer
