# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/quality/real_model.py measures is what the product does, on a tiny model that reads letters."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from llamas import feed, new_cache, tiny_llama

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("the simulator needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import enable

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks/quality"))
import real_model
import real_results
import real_rules
import real_texts
from simulator import simulated

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
C, ERRORS = 48, [[1.0] * 4] * 3
EQUAL = [(real_rules.DEFAULT, C), (real_rules.PLAIN, C), (real_rules.BASELINES[1], C)]


class Letters:
    """A tokenizer: a token for each letter."""

    chat_template = None

    def __call__(self, text: str, **options) -> transformers.BatchEncoding:
        return transformers.BatchEncoding({"input_ids": [95 if c == "\n" else ord(c) - 32 for c in text]})

    def decode(self, ids) -> str:
        return "".join("\n" if i == 95 else chr(int(i) + 32) for i in ids)


@pytest.fixture
def texts(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name.upper()} dog saw a {name}. It ran home. " * 60)
    return real_texts.Texts(tmp_path, Letters(), 0)


@pytest.fixture
def reader():
    with torch.no_grad():
        yield real_model.Reader(tiny_llama(), {"usual": ERRORS})


def capped(model, cell, parts) -> torch.Tensor:
    """Log probabilities of the last part ``[Q, vocabulary]``, read part by part on the product's cache."""
    rule, size = cell
    cache = new_cache(model, **vars(rule.settings(size, size)))
    with enable(model, size):
        for ids in parts:
            logits = feed(model, cache, ids[None], [len(ids)])
    return logits[0].float().log_softmax(-1)


def test_texts_with_facts(texts):
    passage = texts.passage(300, 3, 20, seed=1)
    decode = Letters().decode
    read = decode(passage.turns[0])
    told = [text.split(".")[0].split(" is ") for text in read.split("The secret code of ")[1:]]
    assert len(told) == len(passage.questions) == 3
    for (name, code), question in zip(told, passage.questions, strict=True):
        asked = decode(question.ids)
        assert asked.endswith(f"The secret code of {name} is {code}") and f"What is the secret code of {name}?" in asked
        assert decode(question.ids[-question.digits :]) == code and len(code) == 5
    assert "\nQuestion: Read this text.\n\nA dog" in "\n" + read and len(passage.continuation) == 20
    assert read[-10:] + decode(passage.continuation) in decode(texts.files[0])  # the text goes on
    again = texts.passage(300, 3, 20, seed=1)
    assert "B dog" in decode(again.turns[0])  # the files in turn

    talk = texts.dialogue(300, 2, seed=1)
    assert len(talk.turns) == 4 and decode(talk.turns[0]).count("The secret code") == 2
    assert "secret" not in "".join(map(decode, talk.turns[1:]))
    with pytest.raises(SystemExit, match="must have 100000 more tokens in one of the files"):
        texts.slice(100_000)


def test_what_follows_a_prompt(reader, texts):
    """Continuation and questions, all at once on the simulator, one by one on the product."""
    passage, found, model = texts.passage(300, 2, 20, seed=3), [], reader.model

    def note(cell, slots, **figures):
        found.append((cell, figures))

    with simulated(model):
        real_model.after_a_prompt(
            reader, passage, [None, *EQUAL], lambda cell, slots, **figures: found.append((cell, figures))
        )
    assert [cell for cell, _ in found] == [None, *EQUAL]
    full = capped(model, (real_rules.PLAIN, 900), [passage.turns[0], passage.continuation])
    for cell, figures in found:
        cell = cell or (real_rules.PLAIN, 900)
        after = capped(model, cell, [passage.turns[0], passage.continuation])
        assert figures["kl"] == pytest.approx(real_model.divergence(full, after), rel=1e-3, abs=2e-6)
        said = []
        for question in passage.questions:
            answer = question.ids[-question.digits :]
            logs = capped(model, cell, [passage.turns[0], question.ids])[-question.digits - 1 : -1]
            said.append(logs.gather(1, answer[:, None]).mean().item())
        assert figures["digits"] == pytest.approx(sum(said) / len(said), rel=1e-3)
        assert figures["asked"] == 2 and figures["right"] == 0  # this model knows nothing
    kls = [figures["kl"] for _, figures in found]
    assert len(set(kls)) == len(kls) and kls[0] == 0


def test_an_answer_is_right_where_every_digit_is_the_likeliest(reader, texts, monkeypatch):
    """A model that says the digits of the first question's answer and no others."""
    passage = texts.passage(300, 2, 20, seed=3)
    digits = passage.questions[0].ids[-5:]

    def say(model, ids, layers, logits, **options):
        said = torch.zeros(1, len(logits), 96)
        said[0, torch.arange(20, 25), digits] = said[0, torch.arange(25, 30), digits] = 9.0
        return said, []

    monkeypatch.setattr(real_model, "read", say)
    layers = [type("Layer", (), {"seen": 300})]
    assert reader.ask(layers, passage)[1] == 1


def test_a_dialogue(reader, texts):
    """Cut after every turn."""
    passage, found = texts.dialogue(300, 2, seed=2), []

    def note(cell, slots, **figures):
        found.append((cell, figures))

    with simulated(reader.model):
        real_model.in_a_dialogue(
            reader, passage, [None, *EQUAL], lambda cell, slots, **figures: found.append((cell, figures))
        )
    for cell, figures in found[1:]:
        said = []
        for question in passage.questions:
            logs = capped(reader.model, cell, [*passage.turns, question.ids])[-question.digits - 1 : -1]
            said.append(logs.gather(1, question.ids[-question.digits :, None]).mean().item())
        assert figures["digits"] == pytest.approx(sum(said) / len(said), rel=1e-3)
    assert len({figures["digits"] for _, figures in found}) == len(found)


def test_a_stream(reader, texts, monkeypatch):
    monkeypatch.setattr(real_model, "FIRST", 64)
    rows = torch.stack([texts.slice(160) for _ in range(2)])
    with simulated(reader.model):
        full = real_model.full_stream(reader.model, rows)
        for rule, _ in EQUAL:
            found = real_model.in_a_stream(reader, rows, (rule, C), full)
            cache = new_cache(reader.model, **vars(rule.settings(C, C)))
            with enable(reader.model, C):
                logits = feed(reader.model, cache, rows, [16] * 10)[:, 64:].float().log_softmax(-1)
            expected = (full.exp() * (full - logits)).sum(-1).mean(-1)
            assert found == pytest.approx(expected.tolist(), rel=1e-3) and min(found) > 0


def test_results_are_written_as_they_come(tmp_path):
    path, cell = tmp_path / "found.json", real_model.said_of(EQUAL[0])
    first = real_results.Results(path, {"model": "x", "profiles": {"usual": [[1]]}})
    for kl in (0.1, 0.2):
        first.add("prompt", *cell, 48.0, kl=kl)
        first.write()
    other = real_results.Results(path, {"model": "x", "profiles": {"other": [[2]]}})
    other.add("stream", *real_model.said_of(None), 100.0, kl=0.0)
    other.write()
    found = json.loads(path.read_text())
    assert found["profiles"] == {"usual": [[1]], "other": [[2]]}
    assert [(row["measure"], row["cache_size"], row["kl"]) for row in found["rows"]] == [
        ("prompt", 48, [0.1, 0.2]),
        ("stream", None, [0.0]),
    ]
    assert found["rows"][0]["rule"]["score_prior"] == 0.02 and found["rows"][1]["rule"] == {"name": "full cache"}

    more = real_results.Results(path, {"model": "x"})  # goes on, and loses nothing
    assert [more.count(measure, *cell) for measure in ("prompt", "stream")] == [2, 0]
    more.add("prompt", *cell, 48.0, kl=0.3)
    first.add("prompt", {"name": "other"}, 48, 48.0, kl=0.4)
    for each in (first, more):
        each.write()
    found = json.loads(path.read_text())
    assert [row["kl"] for row in found["rows"]] == [[0.1, 0.2, 0.3], [0.0], [0.4]] and len(found["profiles"]) == 2


def test_results_of_something_else_are_refused(tmp_path):
    path, (rule, C) = tmp_path / "found.json", real_model.said_of(EQUAL[0])
    first = real_results.Results(path, {"model": "x"})
    first.add("prompt", rule, C, 48.0, kl=0.1)
    first.write()
    with pytest.raises(SystemExit, match="must be of y; got figures of x"):
        real_results.Results(path, {"model": "y"})
    with pytest.raises(SystemExit, match="measured before it was changed"):
        real_results.Results(path, {"model": "x"}).count("prompt", rule | {"floor": 0.5}, C)


def test_kvpress_was_asked_the_same():
    """The full cache says the same in both scripts, which read with different versions of transformers."""
    rows = []
    for name in ("real_model", "presses"):
        found = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        rows.append(next(row for row in found if (row["measure"], row["rule"]["name"]) == ("prompt", "full cache")))
    ours, theirs = rows
    texts = len(theirs["right"])
    assert texts >= 10
    for name in ("tokens", "right", "asked"):
        assert ours[name][:texts] == theirs[name]
    assert ours["digits"][:texts] == pytest.approx(theirs["digits"], abs=0.001)
