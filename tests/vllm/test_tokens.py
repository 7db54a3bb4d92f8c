# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of an engine with a cache of fixed size: those of transformers with the same cache, under any load."""

import pytest
from engines import capped, expected_tokens, random_prompts, run, tokens

from fixed_size_kv_cache.recall import MODEL

LENGTHS = [1, 5, 40, 64, 65, 100, 150, 200]


@pytest.mark.parametrize("cache_size", [32, 512])
def test_tokens_are_those_of_transformers(cache_size):
    prompts = random_prompts(LENGTHS)
    with capped(MODEL, cache_size) as llm:
        found = tokens(llm, prompts, 60)
    assert found == expected_tokens(MODEL, prompts, 60, cache_size)


def test_tokens_of_a_model_of_stories(stories):
    prompts = random_prompts(LENGTHS, vocabulary=512)
    with capped(stories, 32) as llm:
        found = tokens(llm, prompts, 60)
    assert found == expected_tokens(stories, prompts, 60, 32)


def test_load_does_not_change_what_is_evicted():
    """One request at a time, four, and all at once; steps of 64 tokens, which cut every prompt, and of 1024."""
    prompts = random_prompts([*range(30, 350, 20)], seed=1)
    answers = {}
    for most, budget in [(1, 1024), (4, 64), (16, 64), (16, 1024)]:
        with capped(MODEL, 32, max_num_seqs=most, max_num_batched_tokens=budget) as llm:
            answers[most, budget] = tokens(llm, prompts, 30)
    alone = answers.pop((1, 1024))
    assert len(prompts) == 16
    assert all(found == alone for found in answers.values())


@pytest.mark.timeout(1200)
def test_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # nothing compiled is there
    prompts = random_prompts(LENGTHS)
    with capped(MODEL, 32, enforce_eager=False) as llm:
        found = tokens(llm, prompts, 60)
    assert any(tmp_path.rglob("torch_compile_cache"))
    assert found == expected_tokens(MODEL, prompts, 60, 32)


def test_a_prompt_that_begins_like_another_goes_on_from_its_state():
    (long,) = random_prompts([150])
    prompts = [long, long, long[:140] + long[:30]]
    with capped(MODEL, 32) as llm:
        answers = [run(llm, [prompt], 40)[0] for prompt in prompts]
    assert [answer.num_cached_tokens for answer in answers] == [0, 128, 128]
    found = [list(answer.outputs[0].token_ids) for answer in answers]
    assert found == expected_tokens(MODEL, prompts, 40, 32)


def test_states_of_generated_tokens_are_not_gone_on_from():
    """They were evicted one by one there, and in chunks where the same tokens are a prompt."""
    (prompt,) = random_prompts([40])
    with capped(MODEL, 32) as llm:
        (answer,) = tokens(llm, [prompt], 150)
        (again,) = run(llm, [prompt + answer], 60)
    assert again.num_cached_tokens == 32
    assert [list(again.outputs[0].token_ids)] == expected_tokens(MODEL, [prompt + answer], 60, 32)
