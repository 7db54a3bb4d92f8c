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

CACHE_SIZE, CHUNK, CONTEXTS, REQUESTS, STEPS, VOCABULARY = 256, 512, (512, 4096), 4, 65, 4096
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


def seconds(llm: LLM, context: int, round_: int) -> tuple[float, float]:
    """Until each of REQUESTS fresh prompts, which come at once, has its first token; and of a later step. Of the
    processor: on one thread that is the time on a machine that does nothing else."""
    engine, begun = llm.llm_engine, time.process_time()
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(torch.randint(3, VOCABULARY, (REQUESTS, context)).tolist()):
        engine.add_request(f"{context} {round_} {i}", {"prompt_token_ids": prompt}, sampling)
    started = set()
    while len(started) < REQUESTS:
        started |= {answer.request_id for answer in engine.step()}
    read, steps = time.process_time(), 0
    while len(engine.step()) == REQUESTS:  # until the first of them has all of its tokens
        steps += 1
    decoded = time.process_time()
    while engine.has_unfinished_requests():
        engine.step()
    return read - begun, (decoded - read) / (steps + 1)


def measure(engines: dict[str, LLM], context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of rounds in which the engines take turns, after one that is not counted."""
    taken = {name: [] for name in engines}
    for round_ in range(rounds + 1):
        for name, llm in engines.items():
            taken[name].append(seconds(llm, context, round_))
    prefills = {name: statistics.median(prefill for prefill, _ in found[1:]) for name, found in taken.items()}
    steps = {name: statistics.median(step for _, step in found[1:]) for name, found in taken.items()}
    return {
        name: {
            "prefill_tokens_per_second": REQUESTS * context / prefills[name],
            "decode_ms_per_step": 1e3 * steps[name],
        }
        for name in engines
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
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
        "rounds": rounds,
        "memory_bytes": MEMORY,
        "longest_context": CONTEXTS[-1] + STEPS,
        "requests_that_fit": {name: requests_that_fit(llm) for name, llm in engines.items()},
        "cases": cases,
    }
    harness.write(ROOT / "benchmarks/results/vllm_cpu.json", result)


if __name__ == "__main__":
    main()
