# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of every architecture, over its whole vocabulary: those of transformers with the same cache, and
those of the stock engine where nothing is evicted."""

import pytest
import torch
from engines import capped, expected_logits, random_prompts, run, stock
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

VOCABULARY, COUNT = 256, 20
SIZES = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=2, head_dim=32)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0)
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
PROMPTS = random_prompts([5, 64, 100], VOCABULARY)


@pytest.fixture(params=CONFIGS, scope="module")
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    config = CONFIGS[request.param](**SIZES, **HEADS, initializer_range=0.2, max_position_embeddings=512)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def logprobs(llm) -> list[torch.Tensor]:
    """For each prompt ``[COUNT, VOCABULARY]``."""
    answers = run(llm, PROMPTS, COUNT, logprobs=VOCABULARY)
    return [
        torch.tensor([[step[i].logprob for i in range(VOCABULARY)] for step in answer.outputs[0].logprobs])
        for answer in answers
    ]


def test_logits_are_those_of_transformers(folder):
    with capped(folder, 32, max_logprobs=VOCABULARY) as llm:
        found = logprobs(llm)
    expected = [logits.log_softmax(-1) for logits in expected_logits(folder, PROMPTS, COUNT, 32)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_cache_larger_than_the_text_is_the_stock_cache(folder):
    with capped(folder, 512, max_logprobs=VOCABULARY) as llm:
        found = logprobs(llm)
    with stock(folder, max_logprobs=VOCABULARY) as llm:
        torch.testing.assert_close(found, logprobs(llm), rtol=0, atol=1e-3)
