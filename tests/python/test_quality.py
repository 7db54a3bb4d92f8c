# SPDX-License-Identifier: Apache-2.0
"""Does the default rule keep the right tokens? Divergence from the full cache on the real stories260K."""

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from llamas import new_cache, recipe
from stories import BOS, decode, load_model, needs_stories

ROOT = Path(__file__).resolve().parents[2]
STORIES, LENGTH, FIRST = 16, 400, 128


def rules(cache_size: int) -> dict[str, dict]:
    """The default and what it is compared with, each with the protected share that serves it best."""
    half = cache_size // 2
    return {
        "default": {},
        "window": dict(policy="streaming", sink_tokens=0),
        "accumulated": dict(score_decay=1.0, score_prior=0.0, value_weight=False, redundancy=0.0, recent_tokens=half),
        "streaming": dict(policy="streaming"),
        "random": dict(policy="random", recent_tokens=half),
    }


# of the window's and of plain accumulation's divergence, at most
GOALS = {24: (0.64, 0.41), 48: (0.34, 0.27), 96: (0.20, 0.17)}


@pytest.fixture(scope="module")
def told():
    return tell()


def tell(stories: int = STORIES, seed: int = 0):
    """The model, its own stories [stories, 401], and its log probabilities with the full cache."""
    model = load_model()
    torch.manual_seed(seed)
    start = torch.full((stories, 1), BOS)
    ids = model.generate(start, max_new_tokens=LENGTH, do_sample=True, temperature=0.9, top_k=0)
    with torch.no_grad():
        return model, ids, model(ids).logits.log_softmax(-1)


def divergence(told, cache_size: int, **settings) -> float:
    """Mean KL divergence of the next token from the full cache's, one token at a time, after the 128th."""
    return divergences(told, cache_size, **settings).mean().item()


@torch.no_grad()
def divergences(told, cache_size: int, **settings) -> torch.Tensor:
    """The same of each story, ``[stories]``."""
    model, ids, full = told
    cache = new_cache(model, cache_size, **settings)
    total = torch.zeros(len(ids))
    with recipe():
        for i in range(LENGTH):
            capped = model(ids[:, i : i + 1], past_key_values=cache).logits[:, 0].log_softmax(-1)
            if i >= FIRST:
                total += (full[:, i].exp() * (full[:, i] - capped)).sum(-1)
    return total / (LENGTH - FIRST)


@needs_stories
def test_the_loader_reads_the_model(told):
    """A wrong layout of the weights would tell no stories."""
    text = decode(told[1][0].tolist())
    assert {"the", "was", "and"} <= set(text.split())


@needs_stories
@pytest.mark.parametrize("cache_size", GOALS)
def test_the_default_rule_stays_closest_to_the_full_cache(cache_size, told, record_property, capsys):
    found = {name: divergence(told, cache_size, **settings) for name, settings in rules(cache_size).items()}
    with capsys.disabled():
        print(f"\nKL to the full cache, C={cache_size}: " + ", ".join(f"{n} {x:.4f}" for n, x in found.items()))
    of_window, of_accumulated = GOALS[cache_size]
    assert found["default"] <= of_window * found["window"]
    assert found["default"] <= of_accumulated * found["accumulated"]
    assert found["default"] < min(found["streaming"], found["random"])


def test_the_default_rule_beats_random_on_a_tiny_model():
    """The same without the real model, so that something is measured everywhere: attention that has preferences."""
    from llamas import feed, tiny_llama, tokens

    model, ids = tiny_llama(), tokens(8, 160)
    with torch.no_grad():
        full = model(ids).logits.log_softmax(-1)
    found = {}
    with recipe():
        for name in ("default", "random"):
            logits = feed(model, new_cache(model, 48, **rules(48)[name]), ids).log_softmax(-1)
            found[name] = (full.exp() * (full - logits))[:, 64:].sum(-1).mean().item()
    assert 0 < found["default"] < found["random"]


@pytest.fixture
def script(monkeypatch):
    for folder in ("python", "quality"):
        monkeypatch.syspath_prepend(ROOT / "benchmarks" / folder)
    return importlib.import_module


def test_noise_is_that_of_the_differences(script):
    """Texts may be as different as they like: a difference that is the same for all has no error."""
    noise = script("noise")

    def row(right: list[int], kl: list[float]) -> dict:
        return {"answers": {"one": [[x, 10] for x in right], "two": [[x, 10] for x in right]}, "kl_of_stories": kl}

    default = [row([0, 2, 4, 6], [0.1, 0.2, 0.3, 0.4])]
    more = noise.of_recall([row([1, 3, 5, 7], [])], default)
    assert more == pytest.approx((10, 0), abs=1e-9)  # points
    twice = noise.of_divergence([row([], [0.2, 0.4, 0.6, 0.8])], default)
    assert twice == pytest.approx((100, 0), abs=1e-9)  # percent
    assert noise.of_divergence([{"kl": [2.0, 4.0]}], [{"kl": [1.0, 2.0]}], "kl") == pytest.approx((100, 0), abs=1e-9)

    mixed = noise.of_recall([row([2, 2, 6, 6], [])], default)  # 2, 0, 2 and 0 more of 10
    error = 100 * statistics.stdev([0.2, 0, 0.2, 0]) / 4**0.5 / 2**0.5  # of the mean of two tasks
    assert mixed == pytest.approx((10, error)) and mixed.is_real == (2 * error < 10)
    assert not noise.Difference(-1.9, 1).is_real and noise.Difference(-2.1, 1).is_real


def test_rank_correlation(script):
    noise = script("noise")
    assert noise.rank_correlation([3.0, 1.0, 2.0], [30.0, 5.0, 7.0]) == 1
    assert noise.rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1
    assert noise.rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(0.8)


def test_the_sweep_keeps_what_noise_is_made_of(script, monkeypatch, tmp_path):
    sweep, noise = script("sweep"), script("noise")
    monkeypatch.setattr(sweep, "rivals", lambda C: [("default", {}), ("1 sink", {"sink_tokens": 1})])
    monkeypatch.setattr(sweep, "story_divergence", lambda stories, seed: lambda C, settings: [0.1 * C] * stories)
    arguments = ["--rivals", "--length", "128", "--texts", "2", "--sizes", "24", "--json", str(tmp_path / "found")]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    sweep.main()
    found = json.loads((tmp_path / "found").read_text())
    assert found["texts"] == 2 and "commit" in found["machine"]
    default, other = found["rows"]
    for task, texts in default["answers"].items():
        assert default["recall"][task] == pytest.approx(sum(x for x, _ in texts) / sum(n for _, n in texts), abs=1e-4)
    assert other["sink_tokens"] == 1 and other["kl"] == pytest.approx(2.4)
    assert noise.of_divergence([other], [default]) == (0, 0)
