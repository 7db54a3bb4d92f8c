# SPDX-License-Identifier: Apache-2.0
"""vLLM with a cache of fixed size beside the stock engine: prefill and decode apart, and how many requests fit.

    tests/vllm/run -k nothing                # the environment
    build/vllm/bin/python benchmarks/serving.py [rounds]

Both engines live in one process and take turns. Weights are random, so every prompt is fresh and nothing is cached.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks/python"))

import harness  # noqa: E402

CACHE_SIZE, CHUNK, CONTEXTS, REQUESTS, STEPS, VOCABULARY = 256, 512, (512, 4096), 4, 33, 4096
MEMORY = 1 << 30


def save_model(folder: str) -> None:
    """12 layers of width 512, 8 query heads of 64 on 2 KV heads."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=12, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=1 << 14)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def start(folder: str, **options) -> LLM:
    sizes = dict(max_model_len=CONTEXTS[-1] + STEPS, max_num_seqs=REQUESTS, max_num_batched_tokens=2048)
    options |= dict(kv_cache_memory_bytes=MEMORY, enforce_eager=True, skip_tokenizer_init=True)
    return LLM(folder, dtype="float32", **sizes, **options)


def requests_that_fit(llm: LLM) -> float:
    """Of the longest context, as vLLM's log has it."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency


def seconds(llm: LLM, context: int, steps: int) -> float:
    """Of REQUESTS fresh prompts that come at once, and ``steps`` tokens after each."""
    prompts = torch.randint(3, VOCABULARY, (REQUESTS, context)).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - begun


def measure(engines: dict[str, LLM], context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of rounds in which the engines take turns."""
    taken = {name: ([], []) for name in engines}
    for llm in engines.values():
        seconds(llm, context, 2)
    for _ in range(rounds):
        for name, llm in engines.items():
            prefill, whole = seconds(llm, context, 1), seconds(llm, context, STEPS)
            taken[name][0].append(prefill)
            taken[name][1].append((whole - prefill) / (STEPS - 1))
    return {
        name: {
            "prefill_tokens_per_second": REQUESTS * context / statistics.median(prefills),
            "decode_ms_per_step": 1e3 * statistics.median(steps),
        }
        for name, (prefills, steps) in taken.items()
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        capped = dict(
            hf_overrides={"architectures": ["FixedSizeLlamaForCausalLM"]},
            additional_config={"fsdc": {"cache_size": CACHE_SIZE, "prefill_chunk_size": CHUNK}},
        )
        engines = {"stock": start(folder), "fixed size": start(folder, **capped)}
        cases = {str(context): measure(engines, context, rounds) for context in CONTEXTS}
    result = {
        "cache_size": CACHE_SIZE,
        "prefill_chunk_size": CHUNK,
        "requests": REQUESTS,
        "memory_bytes": MEMORY,
        "longest_context": CONTEXTS[-1] + STEPS,
        "requests_that_fit": {name: requests_that_fit(llm) for name, llm in engines.items()},
        "cases": cases,
    }
    harness.write(ROOT / "benchmarks/results/vllm_cpu.json", result)


if __name__ == "__main__":
    main()
