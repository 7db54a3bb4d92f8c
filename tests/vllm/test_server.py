# SPDX-License-Identifier: Apache-2.0
"""What users start: engine, workers and server in processes of their own, each of which finds the plugin by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import capped, expected_tokens, random_prompts, tokens
from transformers import AutoTokenizer

from fixed_size_kv_cache.recall import MODEL

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/vllm_server.py"
PROMPT = "the small fox"


@pytest.mark.timeout(1200)
def test_the_example():
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    options = ["--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"]
    command = [sys.executable, str(EXAMPLE), str(MODEL), PROMPT, *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    (expected,) = expected_tokens(MODEL, [tokenizer(PROMPT).input_ids], 32, 256)
    answer = tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.startswith("walks to the garden")
    assert ran.stdout.strip().endswith(answer)


@pytest.mark.timeout(1200)
def test_two_workers_share_the_heads(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompts = random_prompts([5, 40, 100])
    with capped(MODEL, 32, tensor_parallel_size=2) as llm:
        shared = tokens(llm, prompts, 40)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with capped(MODEL, 32) as llm:
        assert shared == tokens(llm, prompts, 40)
