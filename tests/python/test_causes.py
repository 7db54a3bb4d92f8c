# SPDX-License-Identifier: Apache-2.0
"""What goes wrong outside of the cache: each true cause has its own sentence, or works."""

import copy
import threading

import pytest
import torch
import transformers
from llamas import GREEDY, assert_held_within, feed, new_cache, tiny_llama, tokens
from transformers import DynamicCache

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import FixedSizeDynamicCache, disable, enable

FEW = dict(max_new_tokens=6, pad_token_id=0, **GREEDY)


# ---- "call enable(model)" is not told to those who did ---------------------------------------------------------------


def test_attention_that_was_changed_after_enable():
    model, cause = (
        tiny_llama(),
        r'attention of LlamaForCausalLM was set to "eager" after enable\(\).*call enable\(model, ...\) again',
    )
    enable(model, 12)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=cause):
        model.generate(tokens(1, 20), **FEW)
    cache = new_cache(model, 12)
    with torch.no_grad(), pytest.raises(RuntimeError, match="reported no scores to this cache.*" + cause):
        feed(model, cache, tokens(1, 3))
    enable(model, 12)
    assert type(model.generate(tokens(1, 20), **FEW).past_key_values) is FixedSizeDynamicCache
    model.set_attn_implementation("eager")
    disable(model)
    assert model.config._attn_implementation == "eager"  # the user's choice stays


def in_the_midst_of(model, act):
    """generate() whose third forward another thread precedes."""
    forwards = []

    def before(*_):
        forwards.append(1)
        if len(forwards) == 3:
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()

    hook = model.register_forward_pre_hook(before)
    try:
        model.generate(tokens(1, 20), **FEW)
    finally:
        hook.remove()


def test_a_block_of_another_thread_that_ends_or_begins():
    model = tiny_llama()
    handle = enable(model, 12)
    with pytest.raises(
        RuntimeError, match=r"ended in the midst of this generate\(\).*another thread; enable the model once"
    ):
        in_the_midst_of(model, handle.disable)
    handles = []
    with pytest.raises(RuntimeError, match=r"was enabled in the midst of this generate\(\), by another thread.*once"):
        in_the_midst_of(model, lambda: handles.append(enable(model, 12)))
    handles[0].disable()
    assert type(model.generate(tokens(1, 20), **FEW).past_key_values) is DynamicCache


def test_a_loop_without_no_grad():
    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, 12):
        cache = model(ids).past_key_values
        with pytest.raises(RuntimeError, match=r"with gradients model\(ids\) returns transformers' own cache.*no_grad"):
            model(ids[:, :1], past_key_values=cache)


# ---- models with ways of their own -----------------------------------------------------------------------------------


def tiny_phi3():
    torch.manual_seed(0)
    config = transformers.Phi3Config(  # its last token is none of the vocabulary: prompt lookup wants one before 5
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=100, pad_token_id=0, sliding_window=None,
        original_max_position_embeddings=32, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval().double()


@pytest.mark.parametrize("own_cache", [False, True])
@pytest.mark.parametrize("start", [28, 50])
def test_phi3_drops_its_cache_in_the_middle_of_a_text(own_cache, start):
    """Past ``original_max_position_embeddings`` all is read anew; ours goes on as stock does, and capped."""
    model = tiny_phi3()
    ids, options = tokens(1, start), dict(FEW, max_new_tokens=20)
    expected = model.generate(ids, **options)
    for size in (200, 12):
        with enable(model, 200 if own_cache else size):
            given = dict(past_key_values=new_cache(model, size)) if own_cache else {}
            out = model.generate(ids, **options, **given)
        cache = out.past_key_values
        assert type(cache) is FixedSizeDynamicCache and cache.settings.cache_size == size
        assert_held_within(cache, size)
        # transformers 5.17 reads one token of the text anew, and goes on from there
        assert cache.get_seq_length() == expected.past_key_values.get_seq_length()
        assert out.sequences.shape == (1, start + 20)
        if size == 200:
            assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("size", [200, 12])
def test_phi3_drops_its_cache_while_tokens_may_be_taken_back(size):
    model, ids = tiny_phi3(), tokens(1, 20)
    options = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    expected = model.generate(ids, prompt_lookup_num_tokens=3, **options).sequences
    assert expected.shape[1] == 60
    with enable(model, size), torch.no_grad():
        out = model.generate(ids, prompt_lookup_num_tokens=3, **options)
        cache = out.past_key_values
        assert size == 12 or torch.equal(out.sequences, expected)
        assert out.sequences.shape[1] in (60, 61)  # before transformers 5 a last candidate too many may be accepted
        assert_held_within(cache, size)
        assert all(layer.recorded is None for layer in cache.layers) and not cache.is_past_checked
        model(ids[:, :5], past_key_values=cache)  # and evicts from here on
        assert_held_within(cache, size)
        assert all(layer.recorded is None for layer in cache.layers)


@pytest.mark.parametrize("kind", ["mamba", "windows"])
def test_models_with_nothing_to_cap_generate_as_before(kind):
    small = dict(vocab_size=100, hidden_size=16, num_hidden_layers=2)
    if kind == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=8)).eval()
    else:
        config = transformers.MistralConfig(**small, sliding_window=8, num_attention_heads=2, num_key_value_heads=2)
        model = transformers.MistralForCausalLM(config).eval()
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = model.generate(tokens(1, 20), **options)
    if kind == "mamba" and not model._supports_default_dynamic_cache():  # before transformers 5
        with pytest.raises(NotImplementedError, match="transformers must make the cache; it makes none for Mamba"):
            enable(model, 12)
    else:
        with pytest.warns(UserWarning, match="nothing to cap"):
            enable(model, 12)
    assert torch.equal(model.generate(tokens(1, 20), **options), expected)
    disable(model)


def test_virtual_tokens_in_a_stock_cache_train_as_before():
    """As PEFT's prefix tuning has them: gradients flow into keys and values that no token made."""
    model, ids = tiny_llama(), tokens(2, 12)
    prefix = torch.randn(3, 2, 2, 4, 6, 8, dtype=torch.float64)
    mask = torch.ones(2, 18, dtype=torch.long)

    def gradient(padded):
        virtual, cache = prefix.clone().requires_grad_(), DynamicCache()
        for i, (keys, values) in enumerate(virtual):
            cache.update(keys, values, i)
        mask[1, 6:9] = 1 - padded
        loss = model(ids, labels=ids, past_key_values=cache, attention_mask=mask).loss
        return torch.autograd.grad(loss, virtual)[0]

    for padded in (0, 1):
        expected = gradient(padded)
        with enable(model, 12):
            got = gradient(padded)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_prefix_tuning_of_peft_trains_and_is_evaluated():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model, ids = tiny_llama(torch.float32), tokens(2, 12)
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    expected = tuned(input_ids=ids, labels=ids).loss
    with enable(tuned, 12):
        torch.testing.assert_close(tuned(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for use_cache in (None, False):
                loss = tuned(input_ids=ids, labels=ids, use_cache=use_cache).loss
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            virtual = tuned.get_prompt(batch_size=2)
            with pytest.raises(RuntimeError, match=r"must be a FixedSizeDynamicCache.*got 7 keys for 1 queries"):
                model(ids[:, :1], past_key_values=virtual)  # a step, whose cache would go on to grow


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel and DeepSpeed's engine hold a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_parallel_wrappers_are_unwrapped():
    model = tiny_llama(torch.float32)
    for wrapped in (torch.nn.DataParallel(model), Wrapper(model), Wrapper(torch.compile(model))):
        with enable(wrapped, 12):
            assert model.config._attn_implementation == "fsdc"
        assert model.config._attn_implementation == "sdpa"


def test_caches_of_replicas_are_not_gathered():
    caches = [new_cache(tiny_llama(), 12) for _ in "ab"]
    for gathered in (map(list, zip(*caches, strict=True)), zip(*caches, strict=True), iter([])):
        with pytest.raises(TypeError, match=r"nn.DataParallel does with its outputs; call it with use_cache=False"):
            type(caches[0])(gathered)


# ---- taking answers back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["recording", "copy"])
def test_the_advice_of_crop_works(way):
    """Answers after eviction are taken back as if they had never come, question by question."""
    model, context = tiny_llama(), tokens(1, 60)
    with enable(model, 20):
        cache, fresh = new_cache(model, 20), new_cache(model, 20)
        with torch.no_grad():
            model(context, past_key_values=cache)
            model(context, past_key_values=fresh)
        with pytest.raises(
            RuntimeError, match=r"call cache.activate_past_recording\(\) before.*copy.deepcopy\(cache\)"
        ):
            cache.crop(-1)
        if way == "recording":
            cache.activate_past_recording()
        for seed in (5, 6):
            question = torch.cat([context, tokens(1, 4, seed=seed)], dim=1)
            asked = cache if way == "recording" else copy.deepcopy(cache)
            got = model.generate(question, past_key_values=asked, **FEW).sequences
            if way == "recording":
                cache.crop(60 - cache.get_seq_length())
            assert got.shape == (1, 70) and cache.get_seq_length() == 60
            for layer, expected in zip(cache.layers, fresh.layers, strict=True):
                assert torch.equal(layer.slots.order(20).positions, expected.slots.order(20).positions)
                assert torch.equal(layer.slots.tokens.scores, expected.slots.tokens.scores)
        cache.stop_past_recording()
        model.generate(question, past_key_values=cache, **FEW)
        assert_held_within(cache, 20)


def test_recording_by_hand_and_assisted_decoding_exclude_each_other():
    model = tiny_llama()
    with enable(model, 20):
        cache = new_cache(model, 20)
        cache.activate_past_recording()
        with pytest.raises(ValueError, match=r"assisted decoding takes tokens back itself.*copy of the cache"):
            model.generate(tokens(1, 30), past_key_values=cache, prompt_lookup_num_tokens=3, **FEW)
