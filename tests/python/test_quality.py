# SPDX-License-Identifier: Apache-2.0
"""Does the default rule keep the right tokens? Divergence from the full cache on the real stories260K."""

import pytest
import torch
from llamas import new_cache, recipe
from stories import BOS, decode, load_model, needs_stories

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


def tell():
    """The model, its own stories [16, 401], and its log probabilities with the full cache."""
    model = load_model()
    torch.manual_seed(0)
    start = torch.full((STORIES, 1), BOS)
    ids = model.generate(start, max_new_tokens=LENGTH, do_sample=True, temperature=0.9, top_k=0)
    with torch.no_grad():
        return model, ids, model(ids).logits.log_softmax(-1)


@torch.no_grad()
def divergence(told, cache_size: int, **settings) -> float:
    """Mean KL divergence of the next token from the full cache's, one token at a time, after the 128th."""
    model, ids, full = told
    cache = new_cache(model, cache_size, **settings)
    total = 0.0
    with recipe():
        for i in range(LENGTH):
            capped = model(ids[:, i : i + 1], past_key_values=cache).logits[:, 0].log_softmax(-1)
            if i >= FIRST:
                total += (full[:, i].exp() * (full[:, i] - capped)).sum(-1).mean().item()
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
