# SPDX-License-Identifier: Apache-2.0
"""``profile_heads``, :class:`HeadProfile` and ``fsdc profile``."""

import json

import pytest
import torch
import transformers
from llamas import tiny_llama, tokens
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("profile_heads needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import HeadProfile, disable, enable, profile_heads
from fixed_size_kv_cache.head_profile import hash_config
from fixed_size_kv_cache.recall import MODEL
from fsdc_command.app import app

KEPT = 16


@torch.no_grad()
def expected_errors(model, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """``[layers, H]`` by the definition, from what eager attention says: a head at a time, every matrix in full."""
    inputs = {}
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda part, given, out, i=i: inputs.update({i: out}))
        for i, layer in enumerate(model.model.layers)
    ]
    read = torch.cat([ids, ids])[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(read, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    found = []
    L = len(ids)
    for i, weights in enumerate(attentions):
        values = inputs[i].view(1, 2 * L, 4, 8)[0]
        columns = model.model.layers[i].self_attn.o_proj.weight.view(-1, 8, 8)  # [hidden, Hq, Dv]
        whole, lost = 0.0, [0.0] * 4
        for query in range(L, 2 * L):
            outputs = []
            for head in range(8):
                group = weights[0, head // 2 * 2 : head // 2 * 2 + 2]
                best = group[:, L:, :L].sum((0, 1)).sort(descending=True).indices[:kept]
                few = torch.zeros(2 * L, dtype=torch.float64)
                p = weights[0, head, query]
                few[best], few[L:] = p[best], p[L:]
                outputs.append(columns[:, head] @ (p @ values[:, head // 2]))
                lost[head // 2] += (columns[:, head] @ ((p - few / few.sum()) @ values[:, head // 2])).square().sum()
            whole += torch.stack(outputs).sum(0).square().sum()
        found.append(torch.tensor(lost, dtype=torch.float64) / whole)
    return torch.stack(found)


def test_it_measures_what_is_written():
    model, ids = tiny_llama(), tokens(2, 40)
    profile = profile_heads(model, list(ids), kept=KEPT)
    expected = (expected_errors(model, ids[0], KEPT) + expected_errors(model, ids[1], KEPT)) / 2
    torch.testing.assert_close(torch.tensor(profile.output_error, dtype=torch.float64), expected, rtol=1e-5, atol=1e-9)
    assert expected.min() > 0 and expected.max() > 1.5 * expected.min()
    again = profile_heads(model, list(ids), kept=KEPT)
    assert again == profile and hash(again) == hash(profile)
    assert profile.size == sum(weight.numel() for weight in model.parameters())


def test_the_model_is_as_before():
    model, ids = tiny_llama(), tokens(1, 40)
    with torch.no_grad():
        logits = model(ids).logits
    profile = profile_heads(model, ids[0], kept=KEPT)
    with enable(model, cache_size=8):
        assert profile_heads(model, ids[0], kept=KEPT) == profile
        assert model.config._attn_implementation == "fsdc"
    assert not any(part._forward_hooks for part in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    with pytest.raises(TypeError, match="enable: model_or_pipeline must be"):
        disable(3)


def test_what_is_read():
    model = tiny_llama()
    read = []
    model.model.embed_tokens.register_forward_pre_hook(lambda part, given: read.append(given[0][0]))

    def tokenizer(text: str, add_special_tokens: bool) -> dict:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 100 for letter in text]}

    profile_heads(model, tokenizer, texts=["abc" * 30, "xyz" * 40], length=50, kept=KEPT)
    assert [len(ids) - 2 * 50 for ids in read] == [len("\n\nRepeat the previous text:\n\n")] * 2
    assert torch.equal(read[0][:50], read[0][-50:]) and not torch.equal(read[0], read[1])
    read.clear()
    profile_heads(model, tokenizer, length=2000, kept=KEPT)
    assert all(900 < len(ids) <= 1024 for ids in read)  # of our own texts, what the model was trained to read
    read.clear()
    assert profile_heads(model, length=60, kept=KEPT) == profile_heads(model, length=60, kept=KEPT)
    assert [len(ids) for ids in read] == [120] * 4 and torch.equal(read[0], read[2])


def test_a_bar_ends():
    steps = []
    profile_heads(
        tiny_llama(), list(tokens(2, 30)), kept=KEPT, progress=lambda all: (steps.append(i) or i for i in all)
    )
    assert steps == list(range(6))


def test_other_projections():
    """GPT-2 has its matrix the other way round, a bias, and learned positions."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=128)
    profile = profile_heads(GPT2LMHeadModel(config).eval(), kept=KEPT)  # 64 of 600 ids
    assert [len(layer) for layer in profile.output_error] == [4, 4]
    assert all(error > 0 for layer in profile.output_error for error in layer)


@pytest.mark.skipif(transformers.__version__ < "5", reason="these have an attention of their own before transformers 5")
def test_a_projection_beside_the_attention():
    """BERT's is in the module next to it; what has none that can be found is refused."""
    from families import tiny_model

    profile = profile_heads(tiny_model("bert"), tokens(1, 40)[0] % 96, kept=KEPT)
    assert [len(layer) for layer in profile.output_error] == [4] * 4
    assert all(error > 0 for layer in profile.output_error for error in layer)
    with pytest.raises(
        NotImplementedError, match="profile_heads: attention must be followed by a projection; got Mllama"
    ):
        profile_heads(tiny_model("mllama"), tokens(1, 40)[0] % 96, kept=KEPT)


def test_layers_with_a_window_and_attention_sinks():
    """GPT-OSS: every other layer sees a window and keeps its own cache; sinks take part in every softmax."""
    from families import tiny_model

    model = tiny_model("gpt_oss")
    profile = profile_heads(model, tokens(1, 40)[0] % 96, kept=KEPT)
    assert [len(layer) for layer in profile.output_error] == [0, 2, 0, 2]
    assert all(error > 0 for layer in profile.output_error for error in layer)


def test_a_profile_as_a_file(tmp_path):
    model = tiny_llama()
    profile = HeadProfile("tiny", 7, hash_config(model.config), ((0.1 + 0.2, 1e-30), (), (3, 0)))
    profile.save(tmp_path / "p.json")
    assert HeadProfile.load(tmp_path / "p.json") == profile
    said = json.loads((tmp_path / "p.json").read_text())
    assert said["format"] == 1 and said["output_error"][2] == [3.0, 0.0] and len(said) == 5
    profile.check_model(model.config)
    other = transformers.LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": 2})
    with pytest.raises(
        ValueError, match=r"head_profile must be of the same model, here llama .* got that of tiny with"
    ):
        profile.check_model(other)


def test_errors_of_a_file(tmp_path):
    path = tmp_path / "p.json"
    for text, says in [
        ("{", "must be a JSON file; got"),
        ("[]", "must be a profile of format 1; got format None; make it anew"),
        ('{"format": 2}', "must be a profile of format 1; got format 2"),
        ('{"format": 1, "model": "x", "size": 3}', "must have model, size, config_hash and output_error"),
        ('{"format": 1, "model": "x", "size": "q"}', "must have model, size, config_hash and output_error"),
        ('{"format": 1, "model": "x", "size": 3, "config_hash": "0", "output_error": [1]}', "must have model"),
        ('{"format": 1, "model": "x", "size": 3, "config_hash": "0", "output_error": [[-1]]}', "at least 0; got -1.0"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^HeadProfile: ") as error:
            HeadProfile.load(path)
        assert says in str(error.value)
    with pytest.raises(FileNotFoundError):
        HeadProfile.load(tmp_path / "none.json")


def test_errors():
    model = tiny_llama()
    with pytest.raises(TypeError, match="profile_heads: model_or_pipeline must be a model of transformers"):
        profile_heads(3)
    with pytest.raises(TypeError, match="profile_heads: texts need the model's tokenizer; got none"):
        profile_heads(model, texts=["x"])
    with pytest.raises(
        ValueError, match="profile_heads: what is read must have more than the 64 tokens of kept; got 40"
    ):
        profile_heads(model, tokens(1, 40)[0])
    with pytest.raises(ValueError, match="profile_heads: kept must be a whole number of at least 1; got 0"):
        profile_heads(model, kept=0)
    for wrong in (torch.rand(90), tokens(2, 90)):
        with pytest.raises(TypeError, match="profile_heads: tokenizer_or_ids must be a tokenizer, ids"):
            profile_heads(model, wrong)


def test_the_command(tmp_path):
    path = tmp_path / "profile.json"
    run = CliRunner().invoke(app, ["profile", "-o", str(path), "--length", "80", "--json"])
    assert run.exit_code == 0, run.output
    profile = HeadProfile.load(path)
    profile.check_model(transformers.AutoConfig.from_pretrained(MODEL))
    said = json.loads(run.stdout)
    assert said["heads"] == sum(map(len, profile.output_error)) > 0 and 0 < said["share_of_the_first_tenth"] <= 1
    refused = CliRunner().invoke(app, ["profile", "-o", str(path), "--model", str(tmp_path)])
    assert refused.exit_code == 1 and "fsdc profile: --model must be" in refused.stderr
    refused = CliRunner().invoke(app, ["profile", "-o", str(path), "--text", str(tmp_path / "none.txt")])
    assert refused.exit_code == 1 and "fsdc profile: --text:" in refused.stderr
