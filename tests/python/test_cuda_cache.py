# SPDX-License-Identifier: Apache-2.0
"""The cache on a GPU: what it generates there, and that a decode step waits for nothing. Skipped without a GPU."""

import pytest
import torch
import transformers
from comparison import assert_same_tokens_held
from llamas import GREEDY, assert_held_within, new_cache, recipe, tiny_llama, tokens

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import enable

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def run(model, ids, **kwargs):
    kwargs = {name: value.to(model.device) for name, value in kwargs.items()}
    return model.generate(
        ids.to(model.device), **GREEDY, max_new_tokens=25, pad_token_id=0, output_logits=True, **kwargs
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cache_that_is_large_enough_changes_nothing(dtype):
    model, ids = tiny_llama(dtype).to(DEVICE), tokens(2, 20)
    expected = run(model, ids).sequences
    with enable(model, cache_size=64):
        assert torch.equal(run(model, ids).sequences, expected)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_a_capped_run_is_that_of_the_cpu(include_skipped):
    """In float64, where what the two round differently is too small to change a token."""
    runs = []
    for device in ("cpu", DEVICE):
        model = tiny_llama().to(device)
        with enable(model, cache_size=12, include_skipped=include_skipped):
            runs.append(run(model, tokens(1, 20)))
    on_cpu, on_gpu = runs
    assert torch.equal(on_gpu.sequences.cpu(), on_cpu.sequences)
    assert_same_tokens_held(on_gpu.past_key_values, on_cpu.past_key_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_small_cache_stays_small(dtype):
    model = tiny_llama(dtype).to(DEVICE)
    with enable(model, cache_size=12):
        out = run(model, tokens(2, 20))
    cache = out.past_key_values
    assert_held_within(cache, 12)
    assert cache.get_held_tokens(0).eq(12).all() and cache.layers[0].keys.device.type == DEVICE
    assert all(logits.isfinite().all() for logits in out.logits)


def test_a_padded_row_is_its_solo_run():
    model, ids, mask, pads = tiny_llama().to(DEVICE), tokens(3, 20), torch.ones(3, 20, dtype=torch.long), 6
    ids[1, :pads], mask[1, :pads] = 0, 0
    with enable(model, cache_size=12):
        both = run(model, ids, attention_mask=mask)
        solo = run(model, ids[1:2, pads:])
    assert torch.equal(both.sequences[1, 20:], solo.sequences[0, 20 - pads :])


def test_the_recipe():
    sequences = []
    for device in ("cpu", DEVICE):
        model = tiny_llama().to(device)
        model.config._attn_implementation = "eager"
        with recipe():
            cache = new_cache(model, 12)
            out = model.generate(
                tokens(2, 20).to(device), past_key_values=cache, max_new_tokens=25, pad_token_id=0, **GREEDY
            )
        assert_held_within(cache, 12)
        sequences.append(out.sequences.cpu())
    assert torch.equal(*sequences)


@torch.no_grad()
def test_a_decode_step_waits_for_nothing():
    """Whoever reads a value of the GPU waits for all that was launched before."""
    model, ids = tiny_llama(torch.bfloat16).to(DEVICE), tokens(1, 40).to(DEVICE)
    with enable(model, cache_size=12):
        cache = new_cache(model, 12)
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        for at in range(20, 30):  # what happens once has happened
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for at in range(30, 40):
                model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_held_within(cache, 12)
