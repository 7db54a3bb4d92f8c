# SPDX-License-Identifier: Apache-2.0
"""``fsdc generate``: text, figures, comparison, and what it refuses."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fixed_size_kv_cache.cli import generate
from fixed_size_kv_cache.recall import MODEL
from fsdc_command.app import app

QUESTION = "the code of maple is 47 . the old fox walks to the river . what is the code of maple ?"


COMMAND = [sys.executable, "-m", "fixed_size_kv_cache", "generate"]


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["generate", *arguments], input=stdin, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA folder that somebody has trained elsewhere: three layers, random weights, a chat template."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}what is {{ m.content }} ?{% endfor %}"
    tokenizer.save_pretrained(where)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(where)
    return str(where)


@pytest.mark.parametrize("how", ["--prompt", "--prompt-file", "-"])
def test_the_embedded_model_answers(how, tmp_path):
    (tmp_path / "prompt").write_text(QUESTION)
    given = {"--prompt": [how, QUESTION], "--prompt-file": [how, str(tmp_path / "prompt")], "-": ["-"]}[how]
    done = run(*given, "--max-new-tokens", "2", stdin=QUESTION if how == "-" else "")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "47 .\n"
    assert (
        "24 tokens seen, 24 held by each layer and KV head; cache 49.7 kB allocated, in full 24.6 kB; " in done.stderr
    )


def test_the_embedded_model_takes_one_thread(monkeypatch):
    before, found, write = torch.get_num_threads(), [], generate.write
    monkeypatch.setattr(
        generate, "write", lambda *rest, **more: found.append(torch.get_num_threads()) or write(*rest, **more)
    )
    torch.set_num_threads(2)
    try:
        assert run("--prompt", QUESTION, "--max-new-tokens", "1").exit_code == 0
        assert found == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_any_llama_folder_and_json(folder):
    prompt = " ".join(["the old fox walks to the river ."] * 20)
    done = run(
        "--model", folder, "--cache-size", "16", "--prompt", prompt, "--max-new-tokens", "30", "--json", "--compare"
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompt_tokens"] == 160 and len(found["tokens"]) == 30
    assert found["tokens_seen"] == 189 and found["tokens_held"] == 16
    per_token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, dimension, bytes
    facts = 3 * (17 * 2 * (4 + 1) * 4 + 4 + 8)  # layers: of each slot and head facts and position, and what was seen
    assert found["cache_bytes"] == 17 * per_token + facts  # all that is allocated: a slot for the new token too
    assert found["full_cache_bytes"] == found["full_cache"]["cache_bytes"] == 189 * per_token
    assert "the full cache is writing, to compare\n" in done.stderr
    assert found["same_tokens"] < 30
    at = found["same_tokens"]
    assert found["tokens"][:at] == found["full_cache"]["tokens"][:at]
    assert found["tokens"][at] != found["full_cache"]["tokens"][at]


def test_a_cache_that_holds_all_writes_what_the_stock_cache_writes(folder):
    done = run("--model", folder, "--prompt", QUESTION, "--max-new-tokens", "40", "--compare")
    assert "both caches wrote the same 40 tokens" in done.stderr
    assert len(done.stdout.split()) == 40


def test_heads_of_sizes_of_their_own(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDC_PROFILES", str(tmp_path / "kept"))
    prompt = ["--prompt", " ".join(["the old fox walks to the river ."] * 20)]
    rest = ["--model", folder, "--cache-size", "24", *prompt, "--max-new-tokens", "30"]
    equal, unequal = (run(*rest, *more, "--json") for more in ([], ["--head-profile", "auto"]))
    assert unequal.exit_code == 0, unequal.stderr
    before, found = json.loads(equal.stdout), json.loads(unequal.stdout)
    assert found["tokens_held"] == before["tokens_held"] == 24 and found["heads_differ"] and not before["heads_differ"]
    assert found["full_cache_bytes"] == before["full_cache_bytes"]
    assert found["tokens"] != before["tokens"]
    (kept,) = (tmp_path / "kept").iterdir()
    by_file = run(*rest, "--head-profile", str(kept))
    assert by_file.stdout.rstrip("\n") == found["text"]
    assert "189 tokens seen, 24 held by each layer and KV head on average; cache " in by_file.stderr
    enough = [*rest[:2], "--cache-size", "170", *rest[4:], "--json"]  # for all but 19 tokens, so for some heads only
    held = json.loads(run(*enough, "--head-profile", "auto").stdout)["tokens_held"]
    assert held == json.loads(run(*enough).stdout)["tokens_held"] == 170
    other = run(*prompt, "--head-profile", str(kept))
    assert other.exit_code == 1 and "head_profile must be of the same model" in other.stderr
    none = run(*prompt, "--head-profile", str(tmp_path / "none.json"))
    assert none.exit_code == 1 and f"fsdc generate: --head-profile {tmp_path}/none.json: " in none.stderr


def test_chat(folder):
    done = run("--model", folder, "--chat", "--prompt", "the code of maple", "--max-new-tokens", "3", "--json")
    assert json.loads(done.stdout)["prompt_tokens"] == 7


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        ([], 2, "give one prompt: --prompt TEXT, --prompt-file FILE, or - for standard input"),
        (["--prompt", "a", "-"], 2, "give one prompt"),
        (["the fox"], 2, "the only argument is -, for standard input; got 'the fox'. Use --prompt TEXT"),
        (["--prompt-file", "/nowhere"], 2, "the prompt cannot be read from /nowhere: "),
        (["--prompt", "the", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["--prompt", "the", "--cache-size", "0"], 2, "Invalid value for '--cache-size'"),
        (["--prompt", "the zebra ."], 1, f"knows the 212 words in {MODEL / 'tokenizer.json'}; not zebra. Try "),
        (["--prompt", ""], 1, "the prompt must have at least one token; got none"),
        (["--prompt", " "], 1, "the prompt must have at least one token; got none"),
        (["--prompt", "the", "--chat"], 1, "--chat needs a model with a chat template"),
        (["--prompt", "the", "--device", "moon"], 1, "--device moon: "),
        (["--prompt", "the", "--device", "meta"], 1, "--device meta: "),
    ],
)
def test_what_cannot_be_is_said_in_words(arguments, code, text):
    done = run(*arguments)
    assert done.exit_code == code and text in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_no_network():
    done = subprocess.run(
        [*COMMAND, "--prompt", "the", "--model", "no/such-model"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("fsdc generate: --model no/such-model: ") and "cached files" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_folder_whose_weights_are_missing(folder, tmp_path):
    shutil.copy(f"{folder}/config.json", tmp_path)
    done = run("--prompt", "the", "--model", str(tmp_path))
    assert done.exit_code == 1 and f"fsdc generate: --model {tmp_path}: " in done.stderr


def test_damaged_weights_and_templates(folder, tmp_path):
    for path in Path(folder).iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    done = run("--prompt", "the", "--model", str(tmp_path))
    assert done.exit_code == 1 and f"fsdc generate: --model {tmp_path}: " in done.stderr
    shutil.copy(f"{folder}/model.safetensors", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no users, please') }}")
    config["chat_template"] = "{{ raise_exception('no users, please') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    done = run("--prompt", "the", "--model", str(tmp_path), "--chat")
    assert done.exit_code == 1 and "the chat template refuses this turn: no users, please" in done.stderr


def test_standard_input_that_is_no_text():
    done = CliRunner().invoke(app, ["generate", "-"], input=b"\xff\xfe")
    assert done.exit_code == 2 and "the prompt cannot be read from" in done.stderr


def test_layers_with_windows_and_without_keys(tmp_path):
    """Only layers that could grow count as capped; the stock cache is that of the model's config."""
    config = Lfm2Config(
        vocab_size=212, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"], bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--cache-size", "16", "--prompt", QUESTION, "--max-new-tokens", "20"]
    found = json.loads(run(*arguments, "--json", "--compare").stdout)
    assert found["tokens_held"] == 16 and found["tokens_seen"] == 41
    assert found["full_cache_bytes"] == 41 * 2 * 16 * 4 == found["full_cache"]["cache_bytes"]


def test_interrupt(folder):
    command = [*COMMAND, "--model", folder, "--prompt", "the fox", "--max-new-tokens", "100000"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background are born deaf to it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as running:
        running.stdout.read(20)  # it writes
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
