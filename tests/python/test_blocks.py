# SPDX-License-Identifier: Apache-2.0
"""enable() and as_default() that overlap: each handle ends itself, in any order, from any thread, and holds nothing."""

import copy
import gc
import itertools
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import transformers
from llamas import GREEDY, tiny_llama, tokens
from transformers import DynamicCache

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import FixedSizeDynamicCache, as_default, disable, enable

SIZES = (10, 12, 14)


def size_of(model):
    """Of the cache that its generate() makes, None for a stock one."""
    cache = model.generate(tokens(1, 6), max_new_tokens=2, pad_token_id=0, **GREEDY).past_key_values
    assert (model.config._attn_implementation == "fsdc") == isinstance(cache, FixedSizeDynamicCache)
    return cache.settings.cache_size if isinstance(cache, FixedSizeDynamicCache) else None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_enables_end_in_any_order(order):
    model = tiny_llama(torch.float32)
    handles = [enable(model, size) for size in SIZES]
    left = list(SIZES)
    for i in order:
        assert size_of(model) == left[-1]
        end = handles[i].disable if i else lambda: handles[0].__exit__(None, None, None)
        thread = threading.Thread(target=end)
        thread.start()
        thread.join()
        left.remove(SIZES[i])
        handles[i].disable()  # a second time does nothing
    assert size_of(model) is None and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_defaults_end_in_any_order(order):
    handles, left = [as_default(size) for size in SIZES], list(SIZES)
    old = tiny_llama(torch.float32)
    size_of(old)
    for i in order:
        assert size_of(tiny_llama(torch.float32)) == left[-1]
        handles[i].__exit__(None, None, None)
        left.remove(SIZES[i])
    assert size_of(old) is None and size_of(tiny_llama(torch.float32)) is None


def test_a_block_of_each_kind():
    """A model's own enable goes before a default; what ends does not take the other along."""
    model = tiny_llama(torch.float32)
    default = as_default(10)
    assert size_of(model) == 10
    block = enable(model, 12)
    assert size_of(model) == 12
    default.disable()
    assert size_of(model) == 12
    block.disable()
    assert size_of(model) is None


def test_a_handle_that_has_ended_begins_no_block():
    """It would cap nothing, and say nothing."""
    model = tiny_llama()
    for begin, name in ((lambda: enable(model, 12), "enable"), (lambda: as_default(12), "as_default")):
        with begin() as handle:
            pass
        with pytest.raises(RuntimeError, match=rf"got one that has; call {name}\(.*\) again"), handle:
            pass
    handle = enable(model, 12)
    disable(model)
    with pytest.raises(RuntimeError, match="must not have ended"), handle:
        pass


def test_disable_ends_all_of_a_model():
    model = tiny_llama(torch.float32)
    handles = [enable(model, size) for size in SIZES]
    disable(model)
    assert size_of(model) is None
    for handle in handles:
        handle.disable()
    assert size_of(model) is None


def test_threads_that_begin_and_end_blocks_of_one_model():
    model, errors, barrier = tiny_llama(torch.float32), [], threading.Barrier(4)

    def work(size):
        try:
            barrier.wait()
            for _ in range(200):
                with enable(model, size):
                    pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(10 + i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors and size_of(model) is None


def test_one_enabled_model_and_many_threads_with_caches_of_their_own():
    model = tiny_llama(torch.float32)
    options = dict(max_new_tokens=20, pad_token_id=0, **GREEDY)
    with enable(model, 12):
        expected = [model.generate(tokens(1, 20, seed=i), **options).sequences for i in range(4)]
        got = [None] * 4

        def work(i):
            got[i] = model.generate(tokens(1, 20, seed=i), **options).sequences

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("how", ["enable", "as_default", "with"])
def test_del_model_frees_it_at_once(how):
    gc.collect()
    gc.disable()
    try:
        model = tiny_llama(torch.float32)
        handle = as_default(12) if how == "as_default" else enable(model, 12)
        assert size_of(model) == 12
        if how == "with":
            handle.disable()
        alive = weakref.ref(model)
        del model
        assert alive() is None
        handle.disable()
    finally:
        gc.enable()


def test_models_that_share_a_config():
    one = tiny_llama(torch.float32)
    other = type(one)(one.config).eval()
    first = enable(one, 12)
    with pytest.raises(
        RuntimeError, match=r"is not enabled, but it shares its config object with another model.*deepcopy"
    ):
        size_of(other)
    second = enable(other, 10)
    assert (size_of(one), size_of(other)) == (12, 10)
    first.disable()  # the attention belongs to both
    assert size_of(other) == 10
    second.disable()
    assert size_of(one) is None and size_of(other) is None and one.config._attn_implementation == "sdpa"


def test_copies_and_pickles_are_enabled_by_themselves():
    model = tiny_llama(torch.float32)
    with enable(model, 10), enable(model, 12):
        twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert size_of(model) is None
    for each in (twin, loaded):
        assert size_of(each) == 12
        disable(each)
        assert size_of(each) is None


def test_as_default_breaks_no_model_of_the_process():
    """Neither a family that is refused nor one without anything to cap; a warning says so, once."""
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=100))
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=100, decoder_start_token_id=0
        )
    )
    options = dict(max_new_tokens=3, do_sample=False)
    for model in (bloom, mamba, t5):
        expected = model.eval().generate(tokens(1, 6), **options)
        with as_default(12), pytest.warns(UserWarning, match="keeps transformers' own cache|nothing to cap"):
            assert torch.equal(model.generate(tokens(1, 6), **options), expected)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*(own cache|nothing to cap).*")
                model.generate(tokens(1, 6), **options)
        assert torch.equal(model.generate(tokens(1, 6), **options), expected)


def test_a_stock_cache_is_stock_again():
    model = tiny_llama(torch.float32)
    with enable(model, 12):
        pass
    cache = model.generate(tokens(1, 6), max_new_tokens=2, pad_token_id=0, **GREEDY).past_key_values
    assert type(cache) is DynamicCache
