# SPDX-License-Identifier: Apache-2.0
"""An enabled model that is called without a cache, and ``perplexity`` of a text read through a capped one."""

import json
import math

import pytest
import torch
import transformers
from llamas import assert_held_within, feed, new_cache, tiny_llama, tokens
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

import families

from fixed_size_kv_cache import FixedSizeDynamicCache, disable, enable, perplexity
from fsdc_command.app import app


def loss_of(model, ids, **kwargs):
    return model(ids, labels=ids, **kwargs).loss


@pytest.mark.parametrize("use_cache", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_one_forward_without_a_cache_never_caps(use_cache):
    model, ids = tiny_llama(), tokens(2, 60)
    with torch.no_grad():
        expected = loss_of(model, ids)
        with enable(model, cache_size=12):
            assert torch.equal(loss_of(model, ids, **use_cache), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_forward_returns_our_cache_to_go_on_with(kind):
    if kind == "llama":
        model = tiny_llama()
    else:
        torch.manual_seed(0)
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=128)
        model = GPT2LMHeadModel(config).eval().double()
    ids = tokens(1, 60)
    with enable(model, cache_size=12), torch.no_grad():
        cache = model(ids[:, :40]).past_key_values
        assert type(cache) is FixedSizeDynamicCache and cache.settings.cache_size == 12
        expected = new_cache(model, 12)
        one = feed(model, cache, ids[:, 40:])
        other = feed(model, expected, ids, [40, *([1] * 20)])[:, 40:]
        assert torch.equal(one, other)
        assert_held_within(cache, 12)
        given = DynamicCache(config=model.config)  # one that was passed stays what it is
        assert model(ids, past_key_values=given).past_key_values is given and type(given) is DynamicCache
    with torch.no_grad():
        assert type(model(ids).past_key_values) is DynamicCache
    disable(model)


def test_with_gradients_and_while_training_the_model_is_stock():
    model, ids = tiny_llama(), tokens(1, 20)
    expected = torch.autograd.grad(loss_of(model, ids), model.lm_head.weight)[0]
    with enable(model, cache_size=12):
        out = model(ids, labels=ids)
        assert type(out.past_key_values) is DynamicCache
        assert torch.equal(torch.autograd.grad(out.loss, model.lm_head.weight)[0], expected)


def test_perplexity_of_a_cache_that_holds_all_is_stocks():
    model, ids = tiny_llama(), tokens(2, 60)
    with torch.no_grad():
        stock = math.exp(loss_of(model, ids))
    for chunk in (None, 1, 7, 100):
        assert perplexity(model, ids, 64, chunk_size=chunk) == pytest.approx(stock, rel=1e-5)
    assert model.config._attn_implementation == "sdpa"
    parts = []
    perplexity(model, ids, 64, chunk_size=20, progress=lambda starts: parts.extend(starts) or starts)
    assert parts == [0, 20, 40]


def test_perplexity_of_a_small_cache_is_what_the_steps_give():
    model, ids = tiny_llama(), tokens(1, 60)
    with enable(model, cache_size=12):
        logits = feed(model, new_cache(model, 12), ids[:, :-1])
        stepwise = torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:]).exp().item()
        assert perplexity(model, ids[0], chunk_size=1) == pytest.approx(stepwise, rel=1e-5)  # of the enabled size
        assert perplexity(model, ids[0], cache_size=64) != pytest.approx(stepwise, rel=1e-3)
        assert (
            model.generate(ids, max_new_tokens=1, return_dict_in_generate=True).past_key_values.settings.cache_size
            == 12
        )


@pytest.mark.skipif(transformers.__version__ < "5", reason="recurrent layers had a cache of another kind")
def test_perplexity_of_a_model_that_reads_chunks_wrongly():
    model, ids = families.tiny_model("jamba"), tokens(1, 40).clamp(max=90)
    with torch.no_grad():
        stock = math.exp(loss_of(model, ids))
    assert perplexity(model, ids, 64) == pytest.approx(stock, rel=1e-5)
    with pytest.raises(ValueError, match=r"chunk_size must be 1 for JambaForCausalLM, whose recurrent .*; got 4"):
        perplexity(model, ids, 64, chunk_size=4)


def test_perplexity_checks_its_arguments():
    model = tiny_llama()
    for wrong in (torch.ones(1, 1, dtype=torch.long), torch.rand(1, 5), torch.ones(1, 1, 5, dtype=torch.long)):
        with pytest.raises(
            ValueError, match=r"perplexity: ids must be whole numbers \[L\] or \[B, L\] with at least 2"
        ):
            perplexity(model, wrong, 12)
    with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
        perplexity(model, tokens(1, 9), 12, chunk_size=0)
    with pytest.raises(TypeError, match="got budget"):
        perplexity(model, tokens(1, 9), budget=12)


def test_the_command(tmp_path, monkeypatch):
    text = "the code of maple is 47 . the old fox walks to the river . what is the code of maple ? 47"
    run = CliRunner().invoke(app, ["perplexity", "--prompt", text, "--cache-size", "8", "--compare", "--json"])
    assert run.exit_code == 0, run.output
    facts = json.loads(run.stdout)
    assert facts["perplexity"] > 1 and facts["perplexity_of_all"] > 1 and facts["chunk_size"] == 1
    assert facts["perplexity"] != facts["perplexity_of_all"] and facts["tokens"] > 20
    plain = CliRunner().invoke(app, ["perplexity", "--prompt", text, "--cache-size", "8"])
    assert f"perplexity {facts['perplexity']:.3f}" in plain.stdout
    monkeypatch.setenv("FSDC_PROFILES", str(tmp_path))
    unequal = CliRunner().invoke(
        app, ["perplexity", "--prompt", text, "--cache-size", "8", "--head-profile", "auto", "--json"]
    )
    assert unequal.exit_code == 0 and len(list(tmp_path.iterdir())) == 1
    found = json.loads(unequal.stdout)
    assert found["perplexity"] not in (facts["perplexity"], facts["perplexity_of_all"])
    size = str(facts["tokens"] - 1)  # the last token is not read
    enough = ["perplexity", "--prompt", text, "--cache-size", size, "--compare", "--head-profile", "auto", "--json"]
    exact = json.loads(CliRunner().invoke(app, enough).stdout)
    assert exact["perplexity"] == pytest.approx(exact["perplexity_of_all"], rel=1e-6)
    refused = CliRunner().invoke(app, ["perplexity", "--prompt", "zebra"])
    assert refused.exit_code == 1 and "fsdc perplexity: the embedded model knows" in refused.stderr
