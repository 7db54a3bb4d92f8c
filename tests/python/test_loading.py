# SPDX-License-Identifier: Apache-2.0
"""The models that ``fsdc generate`` takes, and what it says of those that it cannot use."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
)
from typer.testing import CliRunner

from fixed_size_kv_cache.cli import load_model as loading
from fixed_size_kv_cache.layer import slots
from fixed_size_kv_cache.recall import MODEL
from fsdc_command.app import app

PROMPT = "the code of maple is 47 ."  # 7 tokens
WORDS = 212
ENDLESS = dict(vocab_size=WORDS, bos_token_id=0, eos_token_id=None)
SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def run(model: str | Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", "--model", str(model), "--prompt", PROMPT, *arguments])


def refusal(*arguments) -> str:
    """What is said, in one line, by a command that refuses."""
    done = run(*arguments)
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert isinstance(done.exception, SystemExit)
    return done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("models")
    opt = dict(ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=64)
    opt |= {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    made = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, **ENDLESS)),
        "opt": OPTForCausalLM(OPTConfig(**opt, **ENDLESS)),
        "mamba": MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **ENDLESS)),
        "encoder": BertModel(BertConfig(vocab_size=WORDS, **SMALL)),
        "bert without a head": BertModel(BertConfig(vocab_size=WORDS, is_decoder=True, **SMALL)),
        "without a head": LlamaModel(LlamaConfig(**SMALL, **ENDLESS)),
        "tied": LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SMALL, **ENDLESS)),
    }
    for name, model in made.items():
        model.save_pretrained(where / name)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(where / name)
    T5Config().save_pretrained(where / "t5")
    (where / "empty").mkdir()
    (where / "own code").mkdir()
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (where / "own code/config.json").write_text(json.dumps(code))
    (where / "own code/mine.py").write_text("raise SystemExit('it ran')")
    return where


@pytest.mark.parametrize(
    "name, text",
    [
        ("empty", "--model must be a folder with a config.json or a name on the Hub; {} has no config.json"),
        ("nowhere", "--model must be a folder with a config.json or a name on the Hub; there is no folder {}"),
        ("t5", "--model must be a decoder-only language model; {} is t5"),
        ("encoder", "--model must be a decoder-only language model; {} is bert"),
        ("mamba", "--model must have a cache of keys and values that grows; mamba has none"),
        ("own code", "--model must be of a family that transformers has; {} brings code of its own"),
        ("without a head", "all weights of LlamaForCausalLM; {} lacks 1, lm_head.weight the first"),
        ("bert without a head", "--model must be saved with all weights of BertLMHeadModel; {} lacks "),
    ],
)
def test_models_that_cannot_be(name, text, models):
    assert text.format(models / name) in refusal(models / name)


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "a/b/c", __file__])
def test_what_looks_like_a_path_is_one(name):
    assert f"there is no folder {name}\n" in refusal(name)


def test_an_empty_name():
    assert "or a name on the Hub; got ''\n" in refusal("")


def test_tied_weights_are_not_missing(models):
    assert run(models / "tied", "--max-new-tokens", "3").exit_code == 0


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_end(name, models):
    said = refusal(models / name, "--max-new-tokens", "59")
    assert f"must fit the 64 positions that {name} has learned; got 7 and 59. Try a smaller --max-new-tokens" in said
    done = run(models / name, "--max-new-tokens", "58", "--cache-size", "16")
    assert done.exit_code == 0 and "64 tokens seen, 16 held" in done.stderr


def test_a_cache_that_does_not_fit_in_memory(models, monkeypatch):
    """One of any size costs a short text nothing; the text must be what does not fit."""
    assert run(models / "tied", "--cache-size", "99999999999").exit_code == 0
    monkeypatch.setattr(slots, "_moved", lambda *arguments: torch.empty(1 << 60, dtype=torch.uint8))
    said = refusal(models / "tied", "--cache-size", "99999999999")
    assert said.startswith("fsdc generate: out of memory: ") and "try a smaller --cache-size than 99999999999" in said


def test_bugs_are_not_hidden(models, monkeypatch):
    monkeypatch.setattr(loading, "one_line", None)
    monkeypatch.setattr("fixed_size_kv_cache.cli.generate.learned_positions", lambda model: [][0])
    assert isinstance(run(models / "tied").exception, IndexError)


def test_without_network_the_hub_is_asked_once(monkeypatch):
    monkeypatch.setattr(loading.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    began = time.perf_counter()
    done = run("no/such-model")
    assert time.perf_counter() - began < 10
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()
    assert re.match(r"fsdc: http://127.0.0.1:9 does not answer \(.+\)$", first)
    assert second.startswith("fsdc generate: --model no/such-model: ") and "cached files" in second
