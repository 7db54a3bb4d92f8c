# SPDX-License-Identifier: Apache-2.0
"""The embedded model: its language, that it answers with the full cache, and what it remembers with ours."""

import importlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fixed_size_kv_cache.recall import MODEL, POSITIONS, contest, language


def texts_of(task: str, length: int, count: int = 20) -> list[language.Stream]:
    return [language.stream(task, length, random.Random(seed)) for seed in range(count)]


@pytest.mark.parametrize("length", [200, 333, 512])
@pytest.mark.parametrize("task", language.TASKS)
def test_every_answer_was_given_before(task, length):
    """Read as a person would, without the generator's own notes."""
    for text in texts_of(task, length, 10) if task != "zipf" or length > 200 else []:
        assert len(text.words) == length and text.words[0] == language.BEGIN
        known, last, answers = {}, {}, []
        for at in range(2, length):
            before, word = text.words[at - 1], text.words[at]
            if word not in language.CODES:
                continue
            name = text.words[at - 2]
            if before == "?":
                assert known[name] == word
                answers.append((at, at - last[name]))
            else:
                assert before == "is" and name not in known
                known[name] = word
            last[name] = at
        assert text.answers == answers and answers


def test_needles_are_asked_for_once_and_long_after():
    for text in texts_of("needle", 512):
        assert len(text.answers) == language.FACTS["needle"]
        assert min(distance for _, distance in text.answers) > 400


def test_some_facts_are_asked_for_often_and_questions_of_recency_are_about_the_last():
    asked = [text.words[at - 2] for text in texts_of("zipf", 512, 1) for at, _ in text.answers]
    counts = sorted((asked.count(name) for name in set(asked)), reverse=True)
    assert counts[0] >= 5 and counts[-1] == 1
    for text in texts_of("recency", 512):
        stated = [at for at, word in enumerate(text.words) if word == "is" and text.words[at + 1] in language.CODES]
        for at, _ in text.answers:
            late = [text.words[i - 1] for i in stated if i < at][-language.FACTS["recency"] :]
            assert text.words[at - 2] in late


@pytest.mark.parametrize("task, least", [("needle", 97), ("zipf", 122), ("recency", 17)])
def test_the_shortest_texts_ask_something_too(task, least):
    with pytest.raises(ValueError, match=f"length must be at least {least}"):
        language.stream(task, least - 1, random.Random(0))
    for length in range(least, least + 20):
        assert all(text.answers for text in texts_of(task, length))


def test_a_seed_is_a_text():
    first, again, other = (language.stream("zipf", 300, random.Random(seed)).words for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("haystack", 300), "task must be one of needle, zipf, recency; got 'haystack'"),
        (("zipf", 100), "length must be at least 122 for zipf with 16 facts; got 100"),
        (("needle", 300, 65), "facts must be from 1 to 64; got 65"),
    ],
)
def test_texts_that_cannot_be(arguments, text):
    task, length, *facts = arguments
    with pytest.raises(ValueError, match=re.escape(text)):
        language.stream(task, length, random.Random(0), *facts)


def test_the_tokenizer_knows_the_language():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    words = texts_of("recency", 300, 1)[0].words
    assert tokenizer(" ".join(words)).input_ids == language.encode(words)
    assert tokenizer("what is the code of maple?").input_ids == [
        language.IDS[word] for word in ("what", "is", "the", "code", "of", "maple", "?")
    ]
    assert tokenizer("zebra").input_ids == [language.IDS[language.UNKNOWN]]


def test_the_model_folder_is_small_and_says_what_it_is():
    config = AutoConfig.from_pretrained(MODEL)
    assert config.model_type == "llama" and config.max_position_embeddings == POSITIONS
    assert config.num_attention_heads > config.num_key_value_heads
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size < 1_500_000
    card = (MODEL / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert f"of {sum(p.numel() for p in model.parameters()):,} parameters" in card
    right, asked = map(int, re.search(r"\| all \| \| (\d+) \| (\d+)", card).groups())
    assert right >= 0.98 * asked > 3000


@pytest.mark.parametrize("task", language.TASKS)
@torch.no_grad()
def test_the_model_answers_with_the_full_cache(task):
    """On texts that neither training nor the card has seen; through stock transformers, at every length shown."""
    model = contest.load_model(capped=False)
    for length in (256, POSITIONS):
        texts, ids = contest.make_texts(task, length, 8, seed=77)
        right, asked = contest.count_right(texts, ids, model(ids).logits.argmax(-1))
        assert right >= 0.98 * asked


MARGINS = {  # cache_size: at least so much more recall than the best baseline, over 4 seeds; found: see benchmarks
    24: {"needle": 0.20, "zipf": -0.05, "recency": 0.02},  # of zipf random eviction recalls as much
    48: {"needle": 0.40, "zipf": 0.10, "recency": 0.0},
    96: {"needle": 0.40, "zipf": 0.20, "recency": -0.06},  # there is nothing to win: the last tokens are all it takes
}


def recall(name: str, cache_size: int, length: int, seeds: range, **settings) -> dict[str, float]:
    """The share of questions answered right in each task, over several seeds at once."""
    made = {task: [contest.make_texts(task, length, 4, seed) for seed in seeds] for task in language.TASKS}
    ids = torch.cat([ids for parts in made.values() for _, ids in parts])
    guesses = list(torch.stack(list(contest.Contender.make(name, cache_size, **settings).read(ids)), dim=1).split(4))
    found = {}
    for task, parts in made.items():
        counts = [contest.count_right(texts, own, guesses.pop(0)) for texts, own in parts]
        found[task] = sum(right for right, _ in counts) / sum(asked for _, asked in counts)
    return found


@pytest.mark.parametrize("cache_size", MARGINS)
def test_ours_remembers_more_than_the_baselines(cache_size, capsys):
    ours, *baselines = (recall(name, cache_size, POSITIONS, range(100, 104)) for name in contest.NAMES[1:])
    with capsys.disabled():
        print(f"\nrecall, C={cache_size}: ours {ours}, baselines {baselines}")
    for task, margin in MARGINS[cache_size].items():
        assert ours[task] >= max(baseline[task] for baseline in baselines) + margin, task


def test_this_model_likes_a_larger_prior():
    """The default is chosen on a real model, which does not (docs/eviction.md)."""
    usual, larger = (recall("fixed size", 48, POSITIONS, range(100, 102), score_prior=p) for p in (0.02, 0.05))
    assert larger["needle"] > usual["needle"] + 0.1 and larger["zipf"] > usual["zipf"] + 0.05


def test_a_contest_is_the_same_every_time():
    first, again = (list(contest.compare([24], 200, seed=5, texts=2)) for _ in range(2))
    assert first == again and len(first) == len(contest.NAMES)


@pytest.fixture
def train_recall(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks/quality")
    return importlib.import_module("train_recall")


@torch.no_grad()
def test_training_starts_from_weights_that_look_facts_up(train_recall):
    """At questions a head of the second layer attends to the right code more than to all others together."""
    torch.manual_seed(0)
    model = train_recall.untrained()
    train_recall.start_as_lookup(model)
    model.config._attn_implementation = "eager"
    right = wrong = 0.0
    for text in texts_of("recency", 96, 10):
        ids = torch.tensor([language.encode(text.words)])
        attention = model(ids, output_attentions=True).attentions[1][0, 0]  # [Q, S]
        for at, _ in text.answers:
            for code in (i for i in range(at) if text.words[i] in language.CODES):
                if text.words[code] == text.words[at]:
                    right += attention[at - 1, code].item()
                else:
                    wrong += attention[at - 1, code].item()
    assert right > 5 * wrong > 0


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="transformers 4 saves another config")
def test_the_training_script_writes_a_folder(train_recall, monkeypatch, tmp_path):
    monkeypatch.setattr(train_recall, "STAGES", ((3, 96, 2),))
    monkeypatch.setattr(train_recall, "TEXTS", 1)
    assert train_recall.main(["--output", str(tmp_path)]) == 1  # not the recall that it demands
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MODEL.iterdir()}
    written, committed = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, MODEL))
    assert {**written, "transformers_version": ""} == {**committed, "transformers_version": ""}
