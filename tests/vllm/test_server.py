# SPDX-License-Identifier: Apache-2.0
"""What users start: engine, workers and server in processes of their own, each of which finds the plugin by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import capped, random_prompts, tokens
from transformers import AutoTokenizer

from fixed_size_kv_cache.recall import MODEL

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/vllm_server.py"


@pytest.mark.timeout(600)
def test_the_example():
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = ["--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"]
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), str(MODEL), *options], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with capped(MODEL, 256, 256, max_num_batched_tokens=512) as llm:
        (expected,) = tokens(llm, [tokenizer("Once upon a time").input_ids], 32)
    answer = tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert ran.stdout.strip().endswith(answer)
    assert answer


@pytest.mark.timeout(600)
def test_two_workers_share_the_heads(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompts = random_prompts([5, 40, 100])
    with capped(MODEL, 32, tensor_parallel_size=2) as llm:
        shared = tokens(llm, prompts, 40)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with capped(MODEL, 32) as llm:
        assert shared == tokens(llm, prompts, 40)
