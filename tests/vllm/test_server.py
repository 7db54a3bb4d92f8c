# SPDX-License-Identifier: Apache-2.0
"""What users start: engine, workers and server in processes of their own, each of which finds the plugin by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import capped, random_prompts, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/vllm_server.py"


@pytest.fixture
def with_words(stories):
    """The model with a tokenizer that vLLM can load: one word a token."""
    words = {"Once": 0, "upon": 1, "a": 2, "time": 3} | {f"w{i}": i for i in range(4, 512)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w4"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(stories)
    return stories


@pytest.mark.timeout(600)
def test_the_example(with_words):
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = ["--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"]
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), str(with_words), *options], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    answer = ran.stdout.splitlines()[-1].split()
    assert len(answer) == 32
    with capped(with_words, 256, 256, max_num_batched_tokens=512) as llm:
        (expected,) = tokens(llm, [[0, 1, 2, 3]], 32)
    names = ["Once", "upon", "a", "time"]
    assert answer == [names[i] if i < 4 else f"w{i}" for i in expected]


@pytest.mark.timeout(600)
def test_two_workers_share_the_heads(stories, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompts = random_prompts([5, 40, 100])
    with capped(stories, 32, tensor_parallel_size=2) as llm:
        shared = tokens(llm, prompts, 40)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with capped(stories, 32) as llm:
        assert shared == tokens(llm, prompts, 40)
