# SPDX-License-Identifier: Apache-2.0
"""Ways to use an enabled model that its modes do not show: arguments of generate(), pipelines, adapters, training."""

import copy
import threading

import pytest
import torch
import transformers
from llamas import GREEDY, assert_held_within, new_cache, tiny_llama, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer, pipeline

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import FixedSizeDynamicCache, enable
from fixed_size_kv_cache.compat.transformers import CACHE_NAME
from fixed_size_kv_cache.recall import MODEL

LARGE, SMALL = 64, 12


def run(model, ids, **arguments):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": 20, "pad_token_id": 0, **GREEDY, **arguments})


def stop_at_30(input_ids, scores, **kwargs):
    return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 30)


def in_own_words(model, input_ids, generation_config=None, **kwargs):
    """A ``custom_generate`` on the cache that generate() has made: greedy, five tokens."""
    new = input_ids
    for _ in range(5):
        new = model(new, **{CACHE_NAME: kwargs[CACHE_NAME]}).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, new], dim=1)
    return input_ids


USES = {
    "beams, several of them": dict(num_beams=3, num_return_sequences=3),
    "an own stopping criterion": dict(stopping_criteria=[stop_at_30]),
    "a watermark": dict(watermarking_config=transformers.WatermarkingConfig()),
    "a generation config": dict(generation_config=GenerationConfig(max_new_tokens=20, pad_token_id=0)),
    "scores and hidden states": dict(output_scores=True, output_hidden_states=True),
    "allowed tokens": dict(prefix_allowed_tokens_fn=lambda row, ids: list(range(3, 50))),
    "a dynamic cache by name": dict(cache_implementation="dynamic"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_arguments_of_generate(use):
    model, ids = tiny_llama(), tokens(1, 20)
    expected = run(model, ids, **copy.copy(use))
    with enable(model, cache_size=LARGE):
        assert torch.equal(run(model, ids, **use).sequences, expected.sequences)
    with enable(model, cache_size=SMALL):
        cache = run(model, ids, **use)[CACHE_NAME]
    assert_held_within(cache, SMALL)
    assert cache.get_held_tokens().eq(SMALL).all()


def test_padded_beams():
    model, ids, mask = tiny_llama(), tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    ids[1, :6], mask[1, :6] = 0, 0
    expected = run(model, ids, attention_mask=mask, num_beams=3).sequences
    with enable(model, cache_size=LARGE):
        assert torch.equal(run(model, ids, attention_mask=mask, num_beams=3).sequences, expected)
    with enable(model, cache_size=SMALL):
        both = run(model, ids, attention_mask=mask, num_beams=3).sequences[1, 20:]
        assert torch.equal(both, run(model, ids[1:, 6:], num_beams=3).sequences[0, 14:])


def test_a_sampling_assistant():
    model, ids = tiny_llama(), tokens(1, 20)
    assistant = copy.deepcopy(model)
    for each in (model, assistant):
        each.generation_config.eos_token_id = 99
    mode = dict(assistant_model=assistant, do_sample=True)
    expected = run(model, ids, **mode).sequences
    with enable(model, cache_size=LARGE):
        assert torch.equal(run(model, ids, **mode).sequences, expected)


def test_embeddings_instead_of_ids():
    model = tiny_llama()
    embeds = model.get_input_embeddings()(tokens(1, 20)).detach()
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = model.generate(inputs_embeds=embeds, **options)
    with enable(model, cache_size=LARGE):
        assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected)


def test_without_a_cache_generate_is_stocks():
    model, ids = tiny_llama(), tokens(1, 20)
    expected = run(model, ids, use_cache=False).sequences
    with enable(model, cache_size=SMALL):
        assert torch.equal(run(model, ids, use_cache=False).sequences, expected)


def test_a_loop_of_the_users_own():
    model, ids = tiny_llama(), tokens(1, 20)
    options = dict(custom_generate=in_own_words, max_new_tokens=20, pad_token_id=0)
    expected = model.generate(ids, **options)
    with enable(model, cache_size=LARGE):
        assert torch.equal(model.generate(ids, **options), expected)


def test_a_compiled_forward():
    model, ids = tiny_llama(), tokens(1, 20)
    expected = run(model, ids).sequences
    with enable(model, cache_size=LARGE):
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(run(model, ids).sequences, expected)


def test_a_chat_in_a_pipeline():
    """Messages in, messages out, and the next turn; a cache may come as an argument."""
    words = ["the code of maple is 47 .", "what is the code of maple ?"]
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer.chat_template = "<s> {% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache, turns = new_cache(model, 24), []
    with enable(chat, cache_size=24):
        for text in words:
            turns.append({"role": "user", "content": text})
            turns = chat(turns, max_new_tokens=1, do_sample=False)[0]["generated_text"]
        assert turns[-1]["role"] == "assistant" and turns[-1]["content"].strip() == "47"
        chat(" ".join(words), max_new_tokens=1, do_sample=False, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 14


def test_a_stream_to_another_thread():
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = tokens(1, 40)
    with enable(model, cache_size=SMALL):
        options = dict(streamer=streamer, max_new_tokens=20, do_sample=False)
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
        thread.start()
        heard = "".join(streamer)
        thread.join()
        assert heard == tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0, 40:])


def test_quantized_weights():
    linear = {torch.nn.Linear}
    model = torch.ao.quantization.quantize_dynamic(tiny_llama(torch.float32), linear, dtype=torch.qint8)
    expected = run(model, tokens(1, 20)).sequences
    with enable(model, cache_size=LARGE):
        assert torch.equal(run(model, tokens(1, 20)).sequences, expected)


def test_training_with_gradient_checkpoints_is_stocks():
    model, ids = tiny_llama().train(), tokens(2, 20)
    model.gradient_checkpointing_enable()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    expected = gradient()
    with enable(model, cache_size=SMALL):
        torch.testing.assert_close(gradient(), expected, rtol=1e-9, atol=1e-12)


def test_a_low_rank_adapter():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model, ids = peft.get_peft_model(tiny_llama(), config).eval(), tokens(1, 20)
    plain, expected = tiny_llama().generate(ids, max_new_tokens=20, pad_token_id=0), run(model, ids).sequences
    assert not torch.equal(plain, expected)  # the adapter does something
    with enable(model, cache_size=LARGE):
        assert torch.equal(run(model, ids).sequences, expected)
    with enable(model, cache_size=SMALL):
        assert_held_within(run(model, ids)[CACHE_NAME], SMALL)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_of_peft(kind):
    """Those of a prompt are embeddings, which are read as tokens; those of a prefix have never been read."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    tuned = peft.get_peft_model(
        tiny_llama(torch.float32), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=6)
    )
    ids = tokens(1, 20)
    expected = tuned.eval().generate(input_ids=ids, max_new_tokens=5)
    with enable(tuned, cache_size=LARGE):
        if kind == "PromptTuningConfig":
            assert torch.equal(tuned.generate(input_ids=ids, max_new_tokens=5), expected)
            return
        with pytest.raises(NotImplementedError, match="got prefix tuning of PEFT, which brings virtual"):
            tuned.generate(input_ids=ids, max_new_tokens=5)
        assert tuned.get_base_model().generate(ids, max_new_tokens=5).shape == (1, 25)  # without the prefix it may


@pytest.mark.parametrize("name", ["offloaded", "quantized", "offloaded_static"])
def test_caches_of_other_kinds_are_refused_before_they_are_made(name):
    """To make one takes a GPU, or another package."""
    model, said = tiny_llama(), f"got cache_implementation='{name}'; leave it away"
    with enable(model, cache_size=SMALL), pytest.raises(TypeError, match=said):
        run(model, tokens(1, 20), cache_implementation=name)


def test_continuous_batching_is_refused():
    """Where there is flash attention it would switch to that, and cap nothing."""
    model = tiny_llama()
    with enable(model, cache_size=SMALL):
        with pytest.raises(NotImplementedError, match="continuous batching has a paged cache of its own"):
            model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=5))
        assert model.config._attn_implementation == "fsdc"


def test_the_rows_that_beams_left():
    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, cache_size=SMALL):
        cache = FixedSizeDynamicCache(config=model.config, cache_size=SMALL)
        longer = run(model, ids, num_beams=3, **{CACHE_NAME: cache}).sequences
        with pytest.raises(ValueError, match=r"must have the 3 rows of the cache; got 1 .*batch_select_indices"):
            run(model, longer, **{CACHE_NAME: cache})
