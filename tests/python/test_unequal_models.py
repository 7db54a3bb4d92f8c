# SPDX-License-Identifier: Apache-2.0
"""Models whose KV heads have different sizes, in every mode of generate()."""

import copy

import pytest
import torch
import transformers
from llamas import GREEDY, feed, recipe, tiny_llama, tokens
from packaging.version import Version

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from test_mixed_models import tiny_model
from test_modes import MODES, run
from transformers import CompileConfig

from fixed_size_kv_cache import FixedSizeDynamicCache, HeadProfile, enable, perplexity
from fixed_size_kv_cache.head_budgets import head_budgets
from fixed_size_kv_cache.head_profile import hash_config

SIZES = [[24, 5, 12, 7], [12, 12, 12, 12], [6, 30, 8, 4]]  # the middle one is a layer of equal heads
LARGE = [[64, 70, 90, 80], [64, 64, 64, 64], [65, 66, 67, 300]]


def assert_same_tokens_held(one, other) -> None:
    for i in range(len(one.layers)):
        assert torch.equal(one.get_positions(i).sort().values, other.get_positions(i).sort().values)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_sizes_that_are_large_enough_change_nothing(mode):
    model, ids = tiny_llama(), tokens(1, 20)
    expected = run(model, ids, **mode)
    with enable(model, cache_size=LARGE):
        out = run(model, ids, **mode)
    assert torch.equal(out.sequences, expected.sequences)
    for one, other in zip(out.logits, expected.logits, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_each_head_stays_at_its_size(mode, dtype):
    model, ids = tiny_llama(dtype), tokens(1, 20)
    with enable(model, cache_size=SIZES):
        out = run(model, ids, **mode)
    cache = out.past_key_values
    for i, sizes in enumerate(SIZES):
        B = cache.get_held_tokens(i).shape[0]
        seen = cache.get_seq_length()
        assert cache.get_held_tokens(i).tolist() == [[min(size, seen) for size in sizes]] * B
    if "num_beams" not in mode:
        assert cache.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("between", [False, True])
def test_a_padded_row_is_its_solo_run(mode, between):
    model, ids, mask, pads = tiny_llama(), tokens(3, 20), torch.ones(3, 20, dtype=torch.long), 6
    where = slice(8, 8 + pads) if between else slice(pads)
    ids[1, where], mask[1, where] = 0, 0
    with enable(model, cache_size=SIZES):
        both = run(model, ids, attention_mask=mask, **MODES[mode])
        alone = run(model, ids[1:2, mask[1].bool()], **MODES[mode])
    assert torch.equal(both.sequences[1, 20:], alone.sequences[0, 20 - pads :])


def test_an_assistant_model():
    model, ids = tiny_llama(), tokens(1, 20)
    assistant = copy.deepcopy(model)
    for each in (model, assistant):
        each.generation_config.eos_token_id = 99
    expected = run(model, ids).sequences
    with enable(model, cache_size=LARGE), enable(assistant, cache_size=SIZES):
        assert torch.equal(run(model, ids, assistant_model=assistant).sequences, expected)
    with enable(model, cache_size=SIZES), enable(assistant, cache_size=SIZES):
        cache = run(model, ids, assistant_model=assistant).past_key_values
    assert cache.get_held_tokens(2).tolist() == [[min(size, cache.get_seq_length()) for size in SIZES[2]]]


def test_several_turns_and_a_file_between_them(tmp_path):
    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, cache_size=SIZES):
        cache = FixedSizeDynamicCache(config=model.config, cache_size=SIZES)
        first = run(model, ids, past_key_values=cache).sequences
        cache.save(tmp_path / "text")
        longer = torch.cat([first, tokens(1, 6, seed=5)], dim=1)
        caches = [copy.deepcopy(cache), FixedSizeDynamicCache.load(tmp_path / "text", config=model)]
        mask = torch.ones_like(longer)  # the model may have written its padding token
        one, other = (run(model, longer, past_key_values=each, attention_mask=mask) for each in caches)
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(x, y) for x, y in zip(one.logits, other.logits, strict=True))
    assert_same_tokens_held(*caches)


def test_answers_can_be_taken_back():
    model, ids = tiny_llama(), tokens(1, 40)
    with enable(model, cache_size=SIZES):
        cache, expected = (FixedSizeDynamicCache(config=model.config, cache_size=SIZES) for _ in range(2))
        for each in (cache, expected):
            feed(model, each, ids[:, :30], [29, 1])
        cache.activate_past_recording()
        feed(model, cache, ids[:, 30:35])
        cache.crop(-5)
        cache.stop_past_recording()
        assert_same_tokens_held(cache, expected)
        assert torch.equal(feed(model, cache, ids[:, 35:]), feed(model, expected, ids[:, 35:]))


def test_the_recipe():
    model, ids = tiny_llama(), tokens(2, 40)
    outputs = []
    for attention in (recipe, lambda: enable(model, cache_size=SIZES)):
        with attention():
            cache = FixedSizeDynamicCache(config=model.config, cache_size=SIZES)
            outputs.append(feed(model, cache, ids, [30, *[1] * 10]))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    with recipe(), pytest.raises(NotImplementedError, match="attention_weights: all KV heads of a layer must have the"):
        feed(model, cache, ids[:, :1], output_attentions=True)


def test_another_attention_is_refused():
    model, ids = tiny_llama(), tokens(1, 20)
    model.set_attn_implementation("eager")
    with pytest.raises(NotImplementedError, match="read by our own attention only; got another one; call enable"):
        feed(model, FixedSizeDynamicCache(config=model.config, cache_size=SIZES), ids)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="upstream counts on the host before transformers 5"
)
def test_generates_own_compilation():
    """Prefill is eager, the decode step is one graph for all steps and for a second call."""
    model, ids = tiny_llama(), tokens(2, 20)
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    compiled = CompileConfig(fullgraph=True, backend="aot_eager")
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = dict(attention_mask=mask, max_new_tokens=25, pad_token_id=0, **GREEDY)
    with enable(model, cache_size=SIZES):
        expected = model.generate(ids, **options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outs = [model.generate(ids, compile_config=compiled, **options) for _ in range(2)]
    for out in outs:
        assert torch.equal(out.sequences, expected.sequences)
        assert_same_tokens_held(out.past_key_values, expected.past_key_values)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_layers_with_windows_have_no_size():
    model = tiny_model("gemma2")
    ids = tokens(1, 30).clamp(max=90)
    kinds = [layer for layer in FixedSizeDynamicCache(config=model.config, cache_size=8).layers]
    H = model.config.num_key_value_heads
    own = [type(kind).__name__.startswith("Fixed") for kind in kinds]
    assert any(own) and not all(own)
    sizes = [list(range(6, 6 + H)) if is_own else None for is_own in own]
    with enable(model, cache_size=sizes), torch.no_grad():
        cache = FixedSizeDynamicCache(config=model.config, cache_size=sizes)
        model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        at = own.index(True)
        assert cache.get_held_tokens(at).tolist() == [sizes[at]]


ERRORS = [[0.0, 3.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [2.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("from_file", [False, True])
def test_a_profile_shares_the_size_out(from_file, tmp_path):
    model, ids = tiny_llama(), tokens(1, 60)
    profile = HeadProfile("tiny", 1, hash_config(model.config), ERRORS)
    if from_file:
        profile.save(tmp_path / "profile.json")
        profile = tmp_path / "profile.json"
    with enable(model, cache_size=12, head_profile=profile) as handle:
        assert repr(handle) == "Enabled(LlamaForCausalLM, cache_size=12 on average)"
        cache = run(model, ids).past_key_values
    expected = head_budgets(ERRORS, 12, 0.25)
    assert [cache.get_held_tokens(i)[0].tolist() for i in range(3)] == expected
    assert sum(map(sum, expected)) == 12 * 12 and len({size for row in expected for size in row}) > 3
    with enable(model, cache_size=12, static=True):
        equal = run(model, ids).past_key_values
    with enable(model, cache_size=12, static=True, head_profile=profile):
        assert run(model, ids).past_key_values.nbytes == equal.nbytes + 2 * 4 * 4 * 4  # two layouts


def test_the_floor_and_the_limit_of_a_profile():
    model = tiny_llama()
    profile = HeadProfile("tiny", 1, hash_config(model.config), ERRORS)
    with enable(model, 12, head_profile=profile, head_floor=0.5, max_tokens=20) as handle:
        assert handle.settings.cache_size == tuple(map(tuple, head_budgets(ERRORS, 12, 0.5, 20)))
        assert handle.prefill_chunk_size == 1024
    with enable(model, 12, head_profile=profile, head_floor=1.0) as handle:
        assert all(len(handle.settings.of_layer(i)) == 4 for i in range(3))


def test_profiles_that_do_not_fit():
    model = tiny_llama()
    profile = HeadProfile("tiny", 1, hash_config(model.config), ERRORS)
    with pytest.raises(ValueError, match="head_profile must be of the same model"):
        enable(model, 12, head_profile=HeadProfile("other", 1, "0" * 16, ERRORS))
    with pytest.raises(ValueError, match="enable: cache_size must be one number, the average, where a head_profile"):
        enable(model, SIZES, head_profile=profile)
    with pytest.raises(
        TypeError, match="enable: head_profile must be a HeadProfile, the path of one, or True; got dict"
    ):
        enable(model, 12, head_profile={"output_error": ERRORS})
    with pytest.raises(ValueError, match="head_budgets: floor must be from 0 to 1; got 2"):
        enable(model, 12, head_profile=profile, head_floor=2)
    assert repr(model).startswith("LlamaForCausalLM") and model.config._attn_implementation == "sdpa"


def test_perplexity_with_a_profile():
    model, ids = tiny_llama(), tokens(1, 40)
    profile = HeadProfile("tiny", 1, hash_config(model.config), ERRORS)
    assert perplexity(model, ids, 12, head_profile=profile) != perplexity(model, ids, 12)


def test_sizes_of_another_model():
    model = tiny_llama()
    with pytest.raises(ValueError, match="cache_size must have a size for each of the 3 layers; got 2"):
        enable(model, cache_size=SIZES[:2])
    with (
        enable(model, cache_size=[[4, 8]] * 3),
        pytest.raises(ValueError, match="a size for each of the 4 KV heads; got 2"),
    ):
        run(model, tokens(1, 20))
