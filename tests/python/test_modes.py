# SPDX-License-Identifier: Apache-2.0
"""Every mode of generate() on an enabled model: exact until something is evicted, and itself after that."""

import copy

import pytest
import torch
import transformers
from comparison import assert_same_run, assert_same_tokens_held
from llamas import GREEDY, assert_held_within, feed, new_cache, tiny_llama, tokens
from packaging.version import Version

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from transformers import CompileConfig, TextStreamer, pipeline

from fixed_size_kv_cache import FixedSizeDynamicCache, as_default, enable
from fixed_size_kv_cache.compat.transformers import CHUNKS_FORGET_EARLIER_TURNS

MODES = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "several sequences": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(num_beams=3),
    "beam sampling": dict(num_beams=3, do_sample=True),
    "chunks": dict(prefill_chunk_size=5),
    "beams in chunks": dict(num_beams=2, prefill_chunk_size=7),
    "prompt lookup": dict(prompt_lookup_num_tokens=3, eos_token_id=99),
    "logits processors": dict(repetition_penalty=1.3, no_repeat_ngram_size=3),
}


def run(model, ids, **mode):
    """generate() with a fixed seed; its ``logits`` are what the model computed, which generate() rounds to float32."""
    torch.manual_seed(3)
    logits = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    with hook:
        out = model.generate(ids, **{"max_new_tokens": 25, "pad_token_id": 0, **GREEDY, **mode})
    out.logits = logits
    return out


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_cache_that_is_large_enough_changes_nothing(mode):
    model, ids = tiny_llama(), tokens(1, 20)
    expected = run(model, ids, **mode)
    with enable(model, cache_size=64):
        out = run(model, ids, **mode)
    assert torch.equal(out.sequences, expected.sequences)
    for one, other in zip(out.logits, expected.logits, strict=True):
        assert one.dtype == torch.float64
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    assert isinstance(out.past_key_values, FixedSizeDynamicCache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_small_cache_stays_small(mode, dtype):
    model, ids = tiny_llama(dtype), tokens(1, 20)
    with enable(model, cache_size=12):
        out = run(model, ids, **mode)
    cache = out.past_key_values
    assert_held_within(cache, 12)
    assert cache.get_held_tokens(0).eq(12).all()
    if "num_beams" not in mode:
        assert cache.get_seq_length() == out.sequences.shape[1] - 1  # the last one has not been read


class Follow:
    """A logits processor that puts the logits of another model in place of those of the running one."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, input_ids, scores):
        return self.model(input_ids).logits[:, -1].to(scores.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_in_narrower_types_it_errs_no_more_than_stock_attention(mode, dtype, path):
    """Against the same weights in float64, over all steps; all runs choose the tokens that float64 would."""
    model, ids = tiny_llama(dtype), tokens(1, 20)
    exact = copy.deepcopy(model).double()
    mode = dict(max_new_tokens=12, logits_processor=[Follow(copy.deepcopy(exact))], **mode)
    expected = run(exact, ids, **mode)

    def error() -> float:
        out = run(model, ids, **mode)
        assert torch.equal(out.sequences, expected.sequences)
        steps = zip(out.logits, expected.logits, strict=True)
        return torch.cat([(mine - right).flatten() for mine, right in steps]).pow(2).mean().sqrt().item()

    stock = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        stock.append(error())
    with enable(model, cache_size=64):
        assert error() <= 1.25 * max(stock)


def test_an_assistant_model_changes_nothing_and_is_capped_itself():
    """Its proposals may be bad, since it forgets; what is accepted is the large model's own."""
    model, ids = tiny_llama(), tokens(1, 20)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.3 * torch.randn_like(assistant.lm_head.weight))
    for each in (model, assistant):
        each.generation_config.eos_token_id = 99
    expected = run(model, ids).sequences
    with enable(model, cache_size=64), enable(assistant, cache_size=10):
        out = run(model, ids, assistant_model=assistant)
    assert torch.equal(out.sequences, expected)
    with enable(model, cache_size=12), enable(assistant, cache_size=10):
        assert_held_within(run(model, ids, assistant_model=assistant).past_key_values, 12)


def widths_of(model) -> list[int]:
    """The number of tokens that each forward of the model reads, as they come."""
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return widths


def test_while_an_assistant_is_active_prompts_are_read_in_one_piece():
    """Nothing is evicted while tokens may be taken back, so chunks would save nothing; and generate() hands those of
    the large model down to the assistant, whatever its own are."""
    model, assistant, ids = tiny_llama(), tiny_llama(), tokens(1, 20)
    for each in (model, assistant):
        each.generation_config.eos_token_id = 99
    read, read_by_assistant = widths_of(model), widths_of(assistant)
    with enable(model, cache_size=12, prefill_chunk_size=5), enable(assistant, cache_size=12, prefill_chunk_size=64):
        run(model, ids, assistant_model=assistant)
        assert read[0] >= 20 and read_by_assistant[0] == 20
        read.clear()
        run(model, ids)
    assert read[:3] == [5] * 3 and max(read) == 5  # before transformers 5 the last token comes alone


@pytest.mark.parametrize("full_ids", [True, False])
@pytest.mark.parametrize("cache_size", [100, 12])
def test_a_second_turn_is_one_run_with_the_same_chunks(full_ids, cache_size):
    if not full_ids and Version(transformers.__version__) < Version("5"):
        pytest.skip("upstream takes the full text only, until transformers 5")
    model, ids, more = tiny_llama(), tokens(1, 20), tokens(1, 9, seed=5)
    with enable(model, cache_size=cache_size):
        cache = new_cache(model, cache_size)
        first = run(model, ids, past_key_values=cache, max_new_tokens=10).sequences
        longer = torch.cat([first, more], dim=1)
        # The last token of the first turn was never fed. What is new comes with a mask of the whole text.
        given = longer if full_ids else longer[:, 29:]
        second = run(
            model, given, past_key_values=cache, max_new_tokens=5, attention_mask=torch.ones(1, 39, dtype=torch.long)
        )
        alone = new_cache(model, cache_size)
        expected = feed(model, alone, longer, [20, *([1] * 9), 10])
    torch.testing.assert_close(second.logits[0][:, -1], expected[:, -1], rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 39 + 4
    if cache_size == 100:
        stock = run(model, longer, max_new_tokens=5).sequences
        assert torch.equal(second.sequences[:, -5:], stock[:, -5:])


@pytest.mark.skipif(CHUNKS_FORGET_EARLIER_TURNS, reason="upstream, until transformers 5.23")
def test_a_second_turn_in_chunks():
    model, ids, more = tiny_llama(), tokens(1, 20), tokens(1, 14, seed=5)
    with enable(model, cache_size=100):
        cache = new_cache(model, 100)
        first = run(model, ids, past_key_values=cache, max_new_tokens=10).sequences
        longer = torch.cat([first, more], dim=1)
        second = run(model, longer, past_key_values=cache, max_new_tokens=5, prefill_chunk_size=4)
    assert torch.equal(second.sequences, run(model, longer, max_new_tokens=5).sequences)


@pytest.mark.skipif(not CHUNKS_FORGET_EARLIER_TURNS, reason="right from transformers 5.23 on")
def test_a_second_turn_in_chunks_is_refused():
    model = tiny_llama()
    with enable(model, cache_size=100):
        cache = new_cache(model, 100)
        first = run(model, tokens(1, 20), past_key_values=cache, max_new_tokens=10).sequences
        with pytest.raises(ValueError, match=r"prefill_chunk_size must be None on this version.*update transformers"):
            run(model, first, past_key_values=cache, prefill_chunk_size=4)


@pytest.mark.parametrize("cache_size", [64, 12, 18])  # 18: fewer than the columns, more than the tokens of row 1
@pytest.mark.parametrize("include_skipped", [False, True])
def test_a_padded_row_is_its_solo_run(cache_size, include_skipped, path):
    """An empty slot that a token takes, or that a chunk drops, is no evicted token: none enters the skipped entry."""
    model, ids, mask, pads = tiny_llama(), tokens(3, 20), torch.ones(3, 20, dtype=torch.long), 6
    ids[1, :pads], mask[1, :pads] = 0, 0
    with enable(model, cache_size=cache_size, include_skipped=include_skipped):
        both = run(model, ids, attention_mask=mask)
        solo = run(model, ids[1:2, pads:])
    assert_same_run(both, solo, row=1, pads=pads)
    if include_skipped:
        lost, expected = (out.past_key_values.lost_attention(2) for out in (both, solo))
        torch.testing.assert_close(lost[1], expected[0], rtol=1e-5, atol=1e-6)
        assert (lost > 0).all() == (cache_size < 64)


def test_left_pads_in_chunks_are_exact():
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("upstream counts the padding")
    model, ids, mask = tiny_llama(), tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    ids[1, :6], mask[1, :6] = 0, 0
    expected = run(model, ids, attention_mask=mask).sequences
    with enable(model, cache_size=64, prefill_chunk_size=7):
        assert torch.equal(run(model, ids, attention_mask=mask).sequences, expected)


def test_capped_beams_are_independent_runs():
    """What beam search has chosen is what the chosen row would have computed alone, from the same chunks."""
    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, cache_size=12):
        out = run(model, ids, num_beams=3, max_new_tokens=12, output_scores=True)
        best = out.sequences
        alone = new_cache(model, 12)
        logits = feed(model, alone, best, [20, *([1] * 12)])[:, 19:-1].log_softmax(-1)
        score = logits.gather(-1, best[:, 20:, None]).sum() / 12
    torch.testing.assert_close(out.sequences_scores.double(), score[None], rtol=1e-5, atol=1e-5)


class Words:
    """The least of a tokenizer that a streamer and a pipeline need."""

    def decode(self, ids, **kwargs):
        return " ".join(str(int(i)) for i in ids)


def test_a_streamer_hears_the_tokens(capsys):
    model, ids = tiny_llama(), tokens(1, 8)
    with enable(model, cache_size=6):
        out = run(model, ids, streamer=TextStreamer(Words(), skip_prompt=True), max_new_tokens=10)
    assert capsys.readouterr().out.split() == [str(int(i)) for i in out.sequences[0, 8:]]


def test_a_pipeline_is_capped(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    texts = ["w5 w9 w14 w33 w21 w8 w17 w60", "w44 w2 w77"]
    model = tiny_llama()
    held = []
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = dict(max_new_tokens=20, do_sample=False, return_full_text=False)
    with enable(pipe, cache_size=12):
        model.model.register_forward_hook(lambda module, args, out: held.append(out.past_key_values))
        batched = pipe(texts, batch_size=2, **options)
        solo = [pipe(text, **options) for text in texts]
    assert [row[0]["generated_text"] for row in batched] == [row[0]["generated_text"] for row in solo]
    for cache in held:
        assert cache.get_held_tokens(0).max() <= 12
    with as_default(cache_size=12):
        assert pipe(texts[0], **options) == solo[0]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_mode_and_deepcopy(mode):
    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, cache_size=12):
        cache = new_cache(model, 12)
        with mode():
            run(model, ids, past_key_values=cache, max_new_tokens=10)
        twin = copy.deepcopy(cache)
        with torch.no_grad():
            one, other = (model(tokens(1, 6, seed=9), past_key_values=c).logits for c in (cache, twin))
    assert torch.equal(one, other)
    assert cache.get_seq_length() == twin.get_seq_length() == 35


def test_another_batch_size_after_reset():
    model = tiny_llama()
    with enable(model, cache_size=12):
        cache = new_cache(model, 12)
        run(model, tokens(1, 20), past_key_values=cache)
        cache.reset()
        again = run(model, tokens(3, 20), past_key_values=cache)
        fresh = run(model, tokens(3, 20))
    assert torch.equal(again.sequences, fresh.sequences)
    assert cache.layers[0].keys.shape[0] == 3


def test_generates_own_compilation():
    """Prefill is eager, the decode step is one graph for all steps and for a second call."""
    model, ids = tiny_llama(), tokens(1, 20)
    compiled = CompileConfig(fullgraph=True, backend="eager")
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = dict(max_new_tokens=25, pad_token_id=0, **GREEDY)
    with enable(model, cache_size=12):
        expected = model.generate(ids, **options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outs = [model.generate(ids, compile_config=compiled, **options) for _ in range(2)]
    for out in outs:
        assert torch.equal(out.sequences, expected.sequences)
        assert_same_tokens_held(out.past_key_values, expected.past_key_values)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
