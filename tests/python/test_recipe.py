# SPDX-License-Identifier: Apache-2.0
"""The original recipe: the snippet as typed, and that a capped LLaMA is the stock one until something is evicted."""

import json
import os
import textwrap

import pytest
import torch
import transformers
from llamas import GREEDY, assert_held_within, feed, held_positions, new_cache, recipe, tiny_llama, tokens
from processes import run_program
from stories import load_model, needs_stories
from transformers import DynamicCache

from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache

# The text that users were given, character for character, but for the line that it lacks.
SNIPPET = """\
import os
from transformers import LlamaForCausalLM
from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention
from fixed_size_kv_cache.llama_attention import forward

# Set environment variables
os.environ['FSDC_KV_CACHE_SIZE'] = '2048'
os.environ['FSDC_INCLUDE_SKIPPED'] = 'True'
os.environ['FSDC_FREE_MEMORY'] = 'True'

# Replace forward function
LlamaAttention.forward = forward

# Set up FixedSizeDynamicCache
transformers.models.llama.modeling_llama.DynamicCache = FixedSizeDynamicCache
LlamaForCausalLM.__init__.__globals__['DynamicCache'] = FixedSizeDynamicCache

# Load model
# ...existing code...

# Change attention to eager (this is a workaround as flash/sdpa attention does not return attention weights)
model.config._attn_implementation = "eager"
"""
MISSING = "import transformers\n"

PROGRAM = """
import json, sys
assert not any(name.startswith("fixed_size_kv_cache") for name in sys.modules)
sys.path.insert(0, {tests!r})
import torch
{snippet}
from transformers import LlamaForCausalLM
ids = torch.randint(2, 100, (1, 12), generator=torch.Generator().manual_seed(0))
out = model.generate(ids, max_new_tokens=60, do_sample=False, return_dict_in_generate=True)
cache = out.past_key_values
direct = model(ids, use_cache=True) if torch.is_grad_enabled() else None
print(json.dumps({{
    "class": type(cache).__name__,
    "held": [keys.shape[2] for keys in cache.key_cache],
    "seen": cache.get_seq_length(),
    "size": cache.settings.cache_size,
    "skipped": cache.settings.include_skipped,
    "free": cache.settings.free_memory,
    "tokens": out.sequences[0].tolist(),
}}))
"""


def run_snippet(make_model: str, snippet: str, **environment: str) -> dict:
    before, after = snippet.split("# ...existing code...")
    text = MISSING + before + make_model + "\ntorch.set_grad_enabled(False)\n" + after
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FSDC_")}
    program = PROGRAM.format(tests=os.path.dirname(__file__), snippet=text)
    return json.loads(run_program(program, {**clean, **environment}).splitlines()[-1])


TINY = "from llamas import tiny_llama; model = tiny_llama()"
STORIES = "from stories import load_model; model = load_model()"
WITHOUT_VARIABLES = "".join(line for line in SNIPPET.splitlines(True) if not line.startswith("os.environ"))
WITHOUT_EAGER = SNIPPET.replace('model.config._attn_implementation = "eager"\n', "")


@pytest.mark.parametrize("make_model", [TINY, pytest.param(STORIES, marks=needs_stories)], ids=["tiny", "stories"])
def test_snippet_as_typed(make_model):
    said = run_snippet(make_model, SNIPPET)
    assert (said["size"], said["skipped"], said["free"]) == (2048, True, True)
    assert said["class"] == "FixedSizeDynamicCache"
    assert said["seen"] == 71 and set(said["held"]) == {71}


@pytest.mark.parametrize("make_model", [TINY, pytest.param(STORIES, marks=needs_stories)], ids=["tiny", "stories"])
@pytest.mark.parametrize(
    "snippet", [WITHOUT_VARIABLES, WITHOUT_EAGER.replace("2048", "32")], ids=["eager", "not eager"]
)
def test_snippet_caps_every_layer(make_model, snippet):
    said = run_snippet(make_model, snippet, FSDC_KV_CACHE_SIZE="32")
    assert said["size"] == 32
    assert said["seen"] == 71 and set(said["held"]) == {32}


def test_snippet_with_the_defaults():
    said = run_snippet(TINY, WITHOUT_VARIABLES)
    assert (said["size"], said["skipped"], said["free"]) == (1024, False, False)


@pytest.mark.parametrize("mode", [dict(), dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)])
def test_a_cache_that_is_large_enough_changes_no_token(mode):
    model, ids = tiny_llama(), tokens(1, 20)
    torch.manual_seed(3)
    expected = model.generate(ids, max_new_tokens=30, **{**GREEDY, **mode}).sequences
    with recipe():
        torch.manual_seed(3)
        out = model.generate(ids, max_new_tokens=30, past_key_values=new_cache(model, 50), **{**GREEDY, **mode})
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("include_skipped", [False, True])
@pytest.mark.parametrize("chunks", [[50], [1] * 50, [20, 1, 1, 8, 20]])
def test_a_cache_that_is_large_enough_changes_no_logit(chunks, include_skipped):
    model, ids = tiny_llama(), tokens(2, 50)
    with torch.no_grad():
        expected = model(ids).logits
    with recipe():
        logits = feed(model, new_cache(model, 51, include_skipped=include_skipped), ids, chunks)
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_left_padding_is_exact_when_nothing_is_evicted():
    model = tiny_llama()
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    ids[0, :9], mask[0, :9] = 0, 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY).sequences
    with recipe():
        cache = new_cache(model, 60)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=20, past_key_values=cache, **GREEDY)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("cache_size", [8, 16, 23])
@pytest.mark.parametrize("include_skipped", [False, True])
def test_a_padded_row_is_its_solo_run(cache_size, include_skipped):
    model, pad = tiny_llama(), 7
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    ids[0, :pad], mask[0, :pad] = 0, 0
    with recipe():
        caches = [new_cache(model, cache_size, include_skipped=include_skipped) for _ in range(2)]
        both = model.generate(ids, attention_mask=mask, max_new_tokens=30, past_key_values=caches[0], **GREEDY)
        solo = model.generate(ids[:1, pad:], max_new_tokens=30, past_key_values=caches[1], **GREEDY)
    assert torch.equal(both.sequences[:1, pad:], solo.sequences)
    for layer, alone in zip(caches[0].layers, caches[1].layers, strict=True):
        assert held_positions(layer) == held_positions(alone)
    assert_held_within(caches[0], cache_size)


@pytest.mark.parametrize("cache_size", [16, 100])
def test_pads_in_the_middle_are_the_solo_run(cache_size):
    """A second turn of a batch: row 0 ends early, and pads follow before its next tokens."""
    model = tiny_llama()
    first, second, pads = tokens(2, 20), tokens(2, 15, seed=1), 6
    mask = torch.ones(2, 35, dtype=torch.long)
    mask[0, 14:20] = 0
    ids = torch.cat([first, second], dim=1)
    ids[0, 14:20] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    solo_ids = torch.cat([ids[:1, :14], ids[:1, 20:]], dim=1)
    with recipe(), torch.no_grad():
        cache, alone = new_cache(model, cache_size), new_cache(model, cache_size)
        for start, end in ((0, 20), (20, 28), *((i, i + 1) for i in range(28, 35))):
            part = slice(start, end)
            logits = model(
                ids[:, part], attention_mask=mask[:, :end], position_ids=positions[:, part], past_key_values=cache
            ).logits
        chunks = [14, 8, *([1] * 7)]
        expected = feed(model, alone, solo_ids, chunks)
    assert pads == 6
    torch.testing.assert_close(logits[0, -1], expected[0, -1], rtol=1e-9, atol=1e-9)
    for layer, other in zip(cache.layers, alone.layers, strict=True):
        assert held_positions(layer) == held_positions(other)


@pytest.mark.skipif(not hasattr(transformers, "AttentionInterface"), reason="its masks show all columns, and raise")
@pytest.mark.parametrize("include_skipped", [False, True])
def test_what_a_mask_says_of_older_tokens_is_not_read(include_skipped):
    """Once something is evicted its columns belong to nobody: only those of the new tokens count."""
    model, ids = tiny_llama(), tokens(2, 40)
    logits = []
    with recipe(), torch.no_grad():
        for older in (1, 0):
            cache = new_cache(model, 12, include_skipped=include_skipped)
            for start, end in ((0, 20), (20, 30), *((i, i + 1) for i in range(30, 40))):
                part, mask = slice(start, end), torch.ones(2, end, dtype=torch.long)
                mask[:, :start] = older
                positions = torch.arange(start, end).expand(2, -1)
                logits.append(
                    model(ids[:, part], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
                )
    for one, other in zip(logits[:12], logits[12:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(hasattr(transformers, "AttentionInterface"), reason="its masks show the columns of what is held")
def test_a_mask_of_all_columns_that_hides_what_was_read_raises():
    model, ids = tiny_llama(), tokens(2, 21)
    with recipe(), torch.no_grad():
        cache = new_cache(model, 12)
        model(ids[:, :20], past_key_values=cache)
        mask = torch.ones(2, 21, dtype=torch.long)
        mask[:, :20] = 0
        with pytest.raises(ValueError, match="attention_mask must show new tokens all 20 tokens"):
            model(ids[:, 20:], attention_mask=mask, position_ids=torch.tensor([[20], [20]]), past_key_values=cache)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_beams_are_independent_runs(include_skipped):
    """Reordering the rows of a cache moves all of their state."""
    model, ids = tiny_llama(), tokens(3, 40)
    order = torch.tensor([2, 0, 2])
    with recipe():
        cache = new_cache(model, 16, include_skipped=include_skipped)
        feed(model, cache, ids, [25, *([1] * 15)])
        cache.reorder_cache(order)
        more = tokens(3, 10, seed=5)
        logits = feed(model, cache, more)
        for row in range(3):
            alone = new_cache(model, 16, include_skipped=include_skipped)
            feed(model, alone, ids[order[row]][None], [25, *([1] * 15)])
            expected = feed(model, alone, more[row][None])
            torch.testing.assert_close(logits[row], expected[0], rtol=1e-9, atol=1e-9)


def test_beam_search_stays_within_the_size():
    model = tiny_llama()
    with recipe():
        out = model.generate(
            tokens(1, 30), num_beams=3, max_new_tokens=30, past_key_values=new_cache(model, 16), **GREEDY
        )
    assert_held_within(out.past_key_values, 16)


def test_generate_without_a_cache_is_stock():
    model, ids = tiny_llama(), tokens(1, 20)
    expected = model.generate(ids, use_cache=False, max_new_tokens=10, **GREEDY).sequences
    with recipe():
        assert torch.equal(model.generate(ids, use_cache=False, max_new_tokens=10, **GREEDY).sequences, expected)


def test_attention_weights_are_returned_when_asked_for():
    model = tiny_llama()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        expected = model(tokens(1, 12), output_attentions=True).attentions
        with recipe():
            got = model(tokens(1, 12), output_attentions=True, past_key_values=new_cache(model, 32)).attentions
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_packed_mask_is_obeyed():
    """Two texts in one row that must not see each other."""
    model, ids = tiny_llama(), tokens(1, 12)
    block = torch.ones(12, 12, dtype=torch.bool).tril()
    block[7:, :7] = False
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.float64).masked_fill(~block, torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with recipe():
            logits = model(ids, attention_mask=mask, past_key_values=new_cache(model, 16)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_forward_attends_to_the_entry_of_the_evicted_tokens():
    model, ids = tiny_llama(), tokens(1, 30)
    with recipe():
        with_entry = feed(model, new_cache(model, 12, include_skipped=True, score_decay=0.9), ids)
        without = feed(model, new_cache(model, 11, score_decay=0.9), ids)
    assert torch.equal(with_entry[:, :11], without[:, :11])
    assert (with_entry[:, -1] - without[:, -1]).abs().max() > 1e-3


def test_a_forward_that_broke_off_between_layers_is_noticed():
    model, cache = tiny_llama(), None
    with recipe(), torch.no_grad():
        cache = new_cache(model, 16)
        model(tokens(1, 8), past_key_values=cache)
        broken = model.model.layers[1].mlp
        model.model.layers[1].mlp = None
        with pytest.raises(TypeError):
            model(tokens(1, 1), past_key_values=cache)
        model.model.layers[1].mlp = broken
        with pytest.raises(RuntimeError, match=r"broke off between layers: call reset\(\)"):
            model(tokens(1, 1), past_key_values=cache)
        cache.reset()
        model(tokens(1, 1), past_key_values=cache)


def test_two_turns_on_one_cache():
    model, ids = tiny_llama(), tokens(1, 20)
    with recipe():
        cache = new_cache(model, 24)
        first = model.generate(ids, max_new_tokens=20, past_key_values=cache, **GREEDY).sequences
        longer = torch.cat([first, tokens(1, 10, seed=2)], dim=1)
        model.generate(longer, max_new_tokens=10, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 20 + 20 + 10 + 10 - 1
    assert_held_within(cache, 24)


@pytest.mark.parametrize("make", [tiny_llama, pytest.param(load_model, marks=needs_stories)])
def test_memory_stays_flat(make):
    import resource

    model = make(torch.float32) if make is tiny_llama else make()
    model.config.max_position_embeddings = 4096

    def tensors(cache):
        return {
            (name, x.data_ptr(), x.numel())
            for layer in cache.layers
            for name, x in vars(layer).items()
            if isinstance(x, torch.Tensor)
        }

    with recipe(), torch.inference_mode():
        cache = new_cache(model, 64)
        feed(model, cache, tokens(1, 500), [100, *([1] * 400)])
        before, peak = tensors(cache), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        feed(model, cache, tokens(1, 2500))
        assert tensors(cache) == before
        assert cache.get_seq_length() == 3000
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # KiB


def test_a_user_forward_as_the_readme_shows():
    """update(), eager attention, and the assignment of what cache_truncate returns."""
    model, ids = tiny_llama(), tokens(1, 40)
    with recipe():
        expected_cache = new_cache(model, 16)
        expected = feed(model, expected_cache, ids, [30, *([1] * 10)])

    from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        given = (kwargs.get(name) for name in ("cache", "past_key_values", "past_key_value"))
        cache = next(x for x in given if x is not None)
        B, Q, _ = hidden_states.shape
        query, key, value = (
            p(hidden_states).view(B, Q, -1, self.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = cache.update(key, value, self.layer_idx)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        logits = query @ key.mT * self.scaling
        hidden = torch.ones(Q, key.shape[2], dtype=torch.bool).triu(key.shape[2] - Q + 1)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        output = self.o_proj((weights @ value).transpose(1, 2).reshape(B, Q, -1))
        cache.key_cache[self.layer_idx], cache.value_cache[self.layer_idx] = FixedSizeDynamicCache.from_legacy_cache(
            cache, self.layer_idx
        ).cache_truncate(self.layer_idx, query, key, weights, attention_mask)
        return output, weights

    stock = LlamaAttention.forward
    LlamaAttention.forward = forward
    try:
        cache = new_cache(model, 16)
        logits = feed(model, cache, ids, [30, *([1] * 10)])
    finally:
        LlamaAttention.forward = stock
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert held_positions(layer) == held_positions(other)


@pytest.mark.parametrize("Q", [1, 20])
def test_stock_cache_is_adopted_in_place_after_its_own_update(Q):
    """As in the original: the stock update has run when cache_truncate is called for the first time."""
    stock = DynamicCache()
    keys, values = torch.randn(1, 2, Q, 4), torch.randn(1, 2, Q, 4)
    stock.update(keys, values, 0)
    cache = FixedSizeDynamicCache.from_legacy_cache(stock, 0)
    assert cache is stock and isinstance(stock, FixedSizeDynamicCache)
    held = cache.cache_truncate(0, torch.randn(1, 4, Q, 4), keys)
    assert torch.equal(held[0], keys) and torch.equal(held[1], values)


def test_the_snippet_in_this_test_is_the_one_that_users_were_given():
    given = textwrap.dedent(SNIPPET)
    original = os.path.join(os.path.dirname(__file__), "../../../shared/original_readme.md")
    if not os.path.exists(original):
        pytest.skip("the original README is not beside this repository")
    with open(original) as file:
        assert given in file.read()
