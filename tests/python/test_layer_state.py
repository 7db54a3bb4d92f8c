# SPDX-License-Identifier: Apache-2.0
"""Protected spans, tokens taken back, what a user looks at, and compiled steps."""

import pytest
import torch
import transformers
from comparison import assert_same_tokens_held
from llamas import feed, held_positions, new_cache, recipe, tiny_llama, tokens
from packaging.version import Version
from steps import PLAIN, attend, step

from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.layer.attention import LogitRule
from fixed_size_kv_cache.settings import FixedSizeCacheConfig

FREE = dict(sink_tokens=0, recent_tokens=0)
RULE = LogitRule(0.5)


# ---- spans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[30], [1] * 30, [7, 1, 22]])
@pytest.mark.parametrize("policy", ["attention", "streaming", "random"])
def test_a_protected_span_stays(chunks, policy):
    cache = FixedSizeDynamicCache(cache_size=8, protected_spans=[(3, 5), (11, 13)], policy=policy, **FREE)
    for start, Q in zip(torch.tensor([0, *chunks]).cumsum(0).tolist(), chunks, strict=False):
        x = torch.full((1, 2, Q, 3), float(start + 1))
        step(cache, x, x, torch.zeros(1, 2, Q, min(start, 8) + Q))
    for head in held_positions(cache.layers[0]):
        assert {3, 4, 11, 12} <= set(head) and len(head) == 8


def test_spans_of_single_rows_follow_their_rows_and_padding_is_not_counted():
    model, ids, mask = tiny_llama(), tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    with recipe():
        cache = new_cache(model, 10, protected_spans=[[(2, 5)], [(6, 9)]], **FREE)
        with torch.no_grad():
            model(ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)  # before any of the spans
            cache.reorder_cache(torch.tensor([1, 0]))
            mask = mask.flip(0)
            model(ids[:, 3:], attention_mask=mask, past_key_values=cache)
    for layer in cache.layers:
        assert all({6, 7, 8} <= set(head) for head in held_positions(layer, 0))
        assert all({2, 3, 4} <= set(head) for head in held_positions(layer, 1))


def test_a_span_list_stands_for_its_expanded_rows():
    cache = FixedSizeDynamicCache(cache_size=6, protected_spans=[[(1, 3)], [(4, 6)]], **FREE)
    x = torch.ones(4, 2, 20, 3)
    keys, _ = cache.update(x, x, 0)
    cache.cache_truncate(0, torch.ones(4, 2, 20, 3), keys, torch.zeros(4, 2, 20, 20))
    for row, span in enumerate([{1, 2}, {1, 2}, {4, 5}, {4, 5}]):
        assert span <= set(held_positions(cache.layers[0], row)[0])
    with pytest.raises(ValueError, match="one list for all rows or one for each of the 3 rows; got 2 lists"):
        FixedSizeDynamicCache(cache_size=6, protected_spans=[[(1, 3)], [(4, 6)]], **FREE).update(x[:3], x[:3], 0)


@pytest.mark.parametrize(
    "spans, error, text",
    [
        (
            [(0, 3)],
            ValueError,
            r"room in the 4 tokens that are held; got 1 sink_tokens \+ 2 recent_tokens \+ 2 tokens of",
        ),
        ([(0, 2), (1, 3), (1, 2)], ValueError, r"recent_tokens \+ 2 tokens of"),  # each is counted once
        ([(0, 10**12)], ValueError, r"\+ 999999999999 tokens of"),
        ([(3, 3)], ValueError, r"must have 0 <= start < stop; got \(3, 3\)"),
        ([(-1, 3)], ValueError, "must have 0 <= start < stop"),
        ([(1, 2.5)], TypeError, r"must be pairs \(start, stop\) of whole numbers; got \(1, 2.5\)"),
        ([3], TypeError, "must be pairs"),
        ([[(1, 2)], [(1, 2, 3)]], TypeError, "must be pairs"),
    ],
)
def test_spans_are_checked(spans, error, text):
    with pytest.raises(error, match=text):
        FixedSizeDynamicCache(cache_size=4, sink_tokens=1, recent_tokens=2, protected_spans=spans)


def test_after_reset_a_list_for_each_row_may_meet_another_batch():
    x = torch.randn(4, 2, 5, 3)
    cache = FixedSizeDynamicCache(cache_size=6, protected_spans=[[(1, 3)], [(2, 4)]], **FREE)
    step(cache, x[:2], x[:2], torch.rand(2, 2, 5, 5))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 2]))
    cache.reset()
    step(cache, x, x, torch.rand(4, 2, 5, 5))
    assert cache.layers[0].slots.tokens.scores[:, 0, :5].isinf().tolist() == [
        [False, True, True, False, False],
        [False, True, True, False, False],
        [False, False, True, True, False],
        [False, False, True, True, False],
    ]


# ---- tokens taken back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 12])
@pytest.mark.parametrize("kept, blocks", [(0, [4]), (1, [4]), (3, [5]), (5, [5]), (6, [3, 1, 4]), (1, [1, 1, 1])])
@pytest.mark.parametrize("padded", [False, True])
def test_crop_is_a_run_that_never_saw_the_rejected_tokens(size, kept, blocks, padded):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 40, 4)
    mask = torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    mask = mask if padded else None
    cache, expected = (FixedSizeDynamicCache(cache_size=size, include_skipped=True) for _ in range(2))

    def part(start, stop):
        return x[:, :, start:stop], None if mask is None else mask[:, start:stop]

    for each in (cache, expected):
        attend(each, *part(0, 20))
        each.activate_past_recording()
    start = 20
    for Q in blocks:
        attend(cache, *part(start, start + Q))
        start += Q
    assert cache.get_seq_length() == start
    cache.crop(-(start - 20 - kept))
    if kept:
        attend(expected, *part(20, 20 + kept))
        expected.crop(0)
    assert cache.get_seq_length() == expected.get_seq_length() == 20 + kept
    mine, theirs = (c.layers[0].slots for c in (cache, expected))
    for a, b in zip(mine.tensors, theirs.tensors, strict=True):
        if a is not mine.skipped.lost:  # the attention of other steps
            assert torch.equal(a, b)
    assert torch.equal(attend(cache, *part(30, 34)), attend(expected, *part(30, 34)))


def test_recorded_attention_sees_what_was_recorded():
    """Block by block while recording is all at once, and nothing is evicted before crop()."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 30, 4, dtype=torch.float64)
    cache, whole = (FixedSizeDynamicCache(cache_size=12) for _ in range(2))
    for each in (cache, whole):
        attend(each, x[:, :, :20])
        each.activate_past_recording()
    parts = torch.cat(
        [attend(cache, x[:, :, 20:23]), attend(cache, x[:, :, 23:24]), attend(cache, x[:, :, 24:])], dim=2
    )
    torch.testing.assert_close(parts, attend(whole, x[:, :, 20:]), rtol=1e-12, atol=1e-12)
    assert cache.layers[0].tokens_folded == 20 and cache.get_seq_length() == 30
    assert cache.layers[0].get_mask_sizes(1) == (12 + 10 + 1, 8)
    cache.stop_past_recording()
    attend(cache, x[:, :, :1])  # what nobody took back is folded now
    assert cache.layers[0].tokens_folded == 31 and held_positions(cache.layers[0])[0][-1] == 30


ROWS = {
    "reorder_cache": (torch.tensor([1, 2, 1]),) * 2,
    "batch_select_indices": (torch.tensor([2, 0]),) * 2,
    "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("change, argument, rows", [(name, *rest) for name, rest in ROWS.items()])
def test_what_was_recorded_moves_with_its_row(change, argument, rows, padded):
    """Beams choose rows while tokens can still be taken back: what stays is done again with the rows' own tokens."""
    x = torch.randn(3, 8, 40, 4)
    mask = torch.ones(3, 40, dtype=torch.long)
    if padded:
        mask[0, :3], mask[1, 22:24] = 0, 0
    cache, expected = (FixedSizeDynamicCache(cache_size=12) for _ in range(2))

    def feed_rows(which, start, stop, of=slice(None)):
        return attend(which, x[of, :, start:stop], mask[of, start:stop] if padded else None)

    for each, of in ((cache, slice(None)), (expected, rows)):
        feed_rows(each, 0, 20, of)
        each.activate_past_recording()
        feed_rows(each, 20, 24, of)
    getattr(cache, change)(argument)
    for each in (cache, expected):
        each.crop(-1)
        each.stop_past_recording()
        output = feed_rows(each, 30, 33, rows)
    assert torch.equal(cache.get_positions(0), expected.get_positions(0))
    assert torch.equal(feed_rows(cache, 33, 34, rows), feed_rows(expected, 33, 34, rows))
    assert output.isfinite().all()


def test_the_end_of_recording_evicts_at_once():
    """Not only at the next step, which may never come: memory is bounded from here on, and what was recorded counts."""
    x = torch.randn(1, 8, 30, 4)
    cache, expected = (FixedSizeDynamicCache(cache_size=12) for _ in range(2))
    attend(cache, x[:, :, :20])
    cache.activate_past_recording()
    attend(cache, x[:, :, 20:])
    cache.stop_past_recording()
    for part in (x[:, :, :20], x[:, :, 20:]):
        attend(expected, part)
    assert torch.equal(cache.get_positions(0), expected.get_positions(0))
    assert cache.key_cache[0].shape[2] == 12 and cache.get_mask_sizes(1, 0) == (12 + 1, 18)


def test_more_than_was_recorded_cannot_be_taken_back():
    cache = FixedSizeDynamicCache(cache_size=12)
    x = torch.randn(1, 8, 30, 4)
    attend(cache, x[:, :, :20])
    cache.activate_past_recording()
    attend(cache, x[:, :, 20:22])
    with pytest.raises(RuntimeError, match="at most the 2 tokens since the last crop can be taken back; got 3"):
        cache.crop(-3)
    with pytest.raises(RuntimeError, match="only where this package computes the attention"):
        step(cache, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), torch.zeros(1, 4, 1, 15))


# ---- what a user looks at --------------------------------------------------------------------------------------------


def test_counts_positions_and_bytes():
    cache = FixedSizeDynamicCache(cache_size=6)
    with pytest.raises(RuntimeError, match="layer 0 must be one of ours"):
        cache.get_positions(0)
    step(cache, torch.randn(1, 2, 9, 3), torch.randn(1, 2, 9, 3), torch.rand(1, 2, 9, 9))
    layer = cache.layers[0]
    assert cache.get_held_tokens(0).tolist() == [[6, 6]]
    assert [sorted(head) for head in cache.get_positions(0)[0].tolist()] == held_positions(layer)
    slots = 2 * 7
    assert cache.nbytes == slots * (3 + 3) * 4 + slots * 5 * 4 + (4 + 8)  # slots, and seen and columns


def test_lost_attention_is_the_share_of_the_entry():
    """All equal keys: of 20 tokens 11 are held by themselves, so 9/20 of the attention goes to the entry."""
    cache = FixedSizeDynamicCache(cache_size=12, include_skipped=True)
    x = torch.ones(1, 8, 19, 4)
    attend(cache, x)
    assert cache.lost_attention(0).eq(0).all()
    attend(cache, x[:, :, :1])
    torch.testing.assert_close(cache.lost_attention(0), torch.full((1, 2), 8 / 20))
    attend(cache, x[:, :, :3])  # 9 evicted; queries that see 21, 22 and 23 tokens
    torch.testing.assert_close(cache.lost_attention(0), torch.full((1, 2), (9 / 21 + 9 / 22 + 9 / 23) / 3))
    with pytest.raises(
        RuntimeError, match=r"lost_attention.*got include_skipped=False; make it with include_skipped=True"
    ):
        FixedSizeDynamicCache(cache_size=4).lost_attention(0)


def test_a_model_loses_attention_in_every_layer():
    model, ids = tiny_llama(), tokens(1, 30)
    with recipe():
        cache = new_cache(model, 12, include_skipped=True)
        feed(model, cache, ids)
    for i in range(3):
        lost = cache.lost_attention(i)
        assert lost.shape == (1, 4) and (lost > 0).all() and (lost < 1).all()


def test_repr_is_one_line():
    cache = FixedSizeDynamicCache(config=tiny_llama().config, cache_size=12)
    assert repr(cache) == "FixedSizeDynamicCache(0 of 0 tokens held, cache_size=12)"
    with recipe():
        feed(tiny_llama(), cache, tokens(1, 20))
        assert repr(cache) == "FixedSizeDynamicCache(12 of 20 tokens held, cache_size=12)"
        cache.activate_past_recording()
        feed(tiny_llama(), cache, tokens(1, 5))
        assert repr(cache) == "FixedSizeDynamicCache(17 of 25 tokens held, cache_size=12)"  # until crop()


def test_the_config_is_frozen_and_says_what_was_chosen():
    config = FixedSizeCacheConfig(cache_size=100)
    with pytest.raises(AttributeError):
        config.cache_size = 3
    assert "cache_size=100" in repr(config) and "None" not in repr(config)
    assert FixedSizeCacheConfig(cache_size=100) == config and hash(config) == hash(FixedSizeCacheConfig(cache_size=100))
    assert FixedSizeDynamicCache(settings=config).settings is config


# ---- the two halves of attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "rule", [RULE, LogitRule(0.5, softcap=2.0), LogitRule(0.5, sinks=torch.tensor([0.3, -1, 2, 0.0]))]
)
def test_output_and_votes_in_blocks_are_those_of_one_matrix(rule, padded):
    """More queries than two blocks, against attention written out. Padding in the middle sees and does not vote."""
    torch.manual_seed(0)
    S, x = 300, torch.randn(2, 8, 300, 4, dtype=torch.float64)
    mask = torch.ones(2, S, dtype=torch.long)
    if padded:
        mask[0, :50] = mask[0, 140:160] = 0
    cache = FixedSizeDynamicCache(cache_size=S, **PLAIN)
    cache.update(x[:, :2], x[:, 2:4], 0)
    output = cache.attend(0, x[:, 4:], mask if padded else None, rule)
    keys, values = (part.repeat_interleave(2, dim=1) for part in (x[:, :2], x[:, 2:4]))
    logits = x[:, 4:] @ keys.mT * 0.5
    logits = logits if rule.softcap is None else 2.0 * (logits / 2.0).tanh()
    visible = torch.ones(S, S, dtype=torch.bool).tril() & mask[:, None, None].bool()
    e = logits.exp() * visible
    total = e.sum(-1, keepdim=True) + (0 if rule.sinks is None else rule.sinks.double().exp()[None, :, None, None])
    weights = (e / total).nan_to_num()
    torch.testing.assert_close(output, weights @ values, rtol=1e-10, atol=1e-10)
    votes = (weights * mask[:, None, :, None]).unflatten(1, (2, 2)).sum((2, 3)).float()
    scores = cache.layers[0].slots.tokens.scores[:, :, :S]
    torch.testing.assert_close(scores.masked_fill(scores == -torch.inf, 0), votes, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="upstream counts on the host before transformers 5"
)
@pytest.mark.parametrize("include_skipped", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_one_graph(backend, include_skipped):
    """From a cache that is not full to one that evicts, with a padded row: no recompilation, no new address."""
    from fixed_size_kv_cache import enable

    model, ids, mask = tiny_llama(), tokens(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)

    def addresses(cache):
        return [x.data_ptr() for layer in cache.layers for x in layer.slots.tensors]

    with enable(model, cache_size=16), torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        cache, expected = (new_cache(model, 16, include_skipped=include_skipped, static=True) for _ in range(2))
        for each in (cache, expected):
            model(ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], past_key_values=each)
        before = addresses(cache)
        for i in range(8, 120):
            step = dict(input_ids=ids[:, i : i + 1], position_ids=positions[:, i : i + 1].clone())
            logits = compiled(**step, attention_mask=mask[:, i : i + 1].contiguous(), past_key_values=cache).logits
            eager = model(**step, attention_mask=mask[:, : i + 1], past_key_values=expected).logits
            torch.testing.assert_close(logits, eager, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert addresses(cache) == before
    assert cache.get_seq_length() == 120
    for row in range(2):
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            assert held_positions(layer, row) == held_positions(other, row)
    assert_same_tokens_held(cache, expected)
