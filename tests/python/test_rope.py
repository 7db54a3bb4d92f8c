# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings that depend on the length of the text: a prompt is rotated as a whole, as in stock transformers."""

import contextlib
import types

import pytest
import torch
import transformers
from llamas import GREEDY, new_cache, tokens
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import enable
from fixed_size_kv_cache.cli.generate import write
from fixed_size_kv_cache.compat.capability import rotates_by_length

ROPE = "rope_parameters" if transformers.__version__ >= "5" else "rope_scaling"
FACTORS = dict(short_factor=[1.0] * 4, long_factor=[3.0, 2.0, 4.0, 8.0])
LENGTHS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        **FACTORS,
    },
}


def tiny(rope: dict, positions: int = 32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.3, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, **{ROPE: rope},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().double()


@pytest.mark.parametrize("rope", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("length", [20, 90])
@pytest.mark.parametrize("chosen", [{}, {"prefill_chunk_size": 16}], ids=["by us", "by the caller"])
def test_the_text_is_stocks_while_nothing_is_evicted(rope, length, chosen):
    """Below and beyond the length at which the rotation changes; chunks that the caller asks for are stock's own."""
    ids, options = tokens(1, length), dict(max_new_tokens=30, output_logits=True, **GREEDY)
    expected = tiny(rope).generate(ids, **options, **chosen)
    model = tiny(rope)
    with enable(model, cache_size=200, prefill_chunk_size=16):
        out = model.generate(ids, **options, **chosen)
    assert torch.equal(out.sequences, expected.sequences)
    for one, other in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_size", [200, None])
def test_the_command_reads_a_prompt_in_one_piece_too(cache_size):
    """``fsdc generate`` reads others itself, for its progress; with the stock cache as well."""
    model, ids = tiny(LENGTHS["dynamic"]), tokens(1, 700)
    expected = tiny(LENGTHS["dynamic"]).generate(ids, max_new_tokens=20, do_sample=False)[0, 700:].tolist()
    cache = DynamicCache(config=model.config)
    with contextlib.nullcontext() if cache_size is None else enable(model, cache_size=800):
        if cache_size is not None:
            cache = new_cache(model, 800)
        words = types.SimpleNamespace(pad_token_id=0, eos_token_id=None, decode=lambda ids, **options: "")
        assert write(model, words, ids, cache, 20, show=False).tokens == expected


def test_which_configs_rotate_by_length():
    per_layer = {"full_attention": LENGTHS["dynamic"], "sliding_attention": {"rope_type": "default"}}
    plain = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for rope, expected in (*((x, True) for x in LENGTHS.values()), (per_layer, True), (plain, False), (None, False)):
        config = LlamaConfig()
        setattr(config, ROPE, rope)
        assert rotates_by_length(config) is expected
    old = LlamaConfig()
    setattr(old, ROPE, {"type": "dynamic", "factor": 2.0})  # as remote configs of long ago spell it
    assert rotates_by_length(old)
