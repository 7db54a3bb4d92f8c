# SPDX-License-Identifier: Apache-2.0
"""A real pretrained model, sharper than the others, with most of each text evicted: SmolLM2-135M-Instruct, which is
downloaded where it is not there."""

import sys
from pathlib import Path

import pytest
import torch
from engines import capped, expected_logits, run
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks/quality"))

import small_llama  # noqa: E402

from fixed_size_kv_cache.huggingface.profile_texts import TEXTS  # noqa: E402

LENGTHS, COUNT, SIZES = (40, 128, 200, 300), 40, (64, 64)


@pytest.mark.timeout(1200)
def test_a_pretrained_model(tmp_path):
    model, tokenizer = small_llama.load(None)
    config = model.config.to_dict()
    del config["quantization_config"]  # of the file that it came from: the weights are float32 now
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path)
    ids = tokenizer(" ".join(TEXTS)).input_ids
    prompts = [ids[200 * i : 200 * i + length] for i, length in enumerate(LENGTHS)]

    with capped(tmp_path, *SIZES, max_num_batched_tokens=256, kv_cache_memory_bytes=512 << 20) as llm:
        answers = [answer.outputs[0] for answer in run(llm, prompts, COUNT, logprobs=5)]
    expected = expected_logits(tmp_path, prompts, COUNT, *SIZES)
    assert [list(answer.token_ids) for answer in answers] == [logits.argmax(-1).tolist() for logits in expected]
    for answer, logits in zip(answers, expected, strict=True):
        for step, row in zip(answer.logprobs, logits.log_softmax(-1), strict=True):
            found = torch.tensor([x.logprob for x in step.values()])
            torch.testing.assert_close(found, row[list(step)], rtol=0, atol=1e-2)
