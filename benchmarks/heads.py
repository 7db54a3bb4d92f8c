# SPDX-License-Identifier: Apache-2.0
"""Whole generate() per token, and bytes: KV heads of sizes of their own against equal ones of the same total.

python benchmarks/heads.py [rounds]

One head in eight errs much more than the others, as in real models, so it gets several times the average.
"""

import sys

import torch
from generate import ROOT, TOKENS, llama

import harness  # isort: skip  (generate.py has said where it is)

from fixed_size_kv_cache import FixedSizeDynamicCache, enable
from fixed_size_kv_cache.head_budgets import head_budgets
from fixed_size_kv_cache.layer.attention import LogitRule

SIZES = (256, 1024)
FLOOR = 0.25


def errors(model) -> list[list[float]]:
    """``[layers][heads]``, of which one in eight is 20 times the rest."""
    H = model.config.num_key_value_heads
    return [[20.0 if (i * H + h) % 8 == 3 else 1.0 for h in range(H)] for i in range(model.config.num_hidden_layers)]


@torch.no_grad()
def full_cache(model, sizes) -> FixedSizeDynamicCache:
    """Each layer has read more random tokens than any head holds."""
    cache, config = FixedSizeDynamicCache(config=model.config, cache_size=sizes), model.config
    S = 64 + (sizes if isinstance(sizes, int) else max(map(max, sizes)))
    for i in range(config.num_hidden_layers):
        heads = (config.num_key_value_heads, config.num_key_value_heads, config.num_attention_heads)
        keys, values, query = (torch.randn(1, n, S, config.head_dim, dtype=model.dtype) for n in heads)
        cache.update(keys, values, i)
        cache.attend(i, query, None, LogitRule(config.head_dim**-0.5))
    return cache


def measure(model, size: int, rounds: int) -> dict[str, object]:
    sizes = head_budgets(errors(model), size, FLOOR)
    contenders = {"equal heads": (size, full_cache(model, size)), "unequal heads": (sizes, full_cache(model, sizes))}

    def run(cache_size, cache) -> None:
        with enable(model, cache_size=cache_size):
            model.generate(
                torch.ones(1, 1, dtype=torch.long),
                attention_mask=torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long),
                past_key_values=cache,
                max_new_tokens=TOKENS,
                do_sample=False,
            )

    calls = {name: lambda of=of: run(*of) for name, of in contenders.items()}
    times = harness.time_in_turns(calls, rounds)
    medians = {name: taken["median_us"] / TOKENS for name, taken in times.items()}
    nbytes = {name: cache.nbytes for name, (_, cache) in contenders.items()}
    every = [size for layer in sizes for size in layer]
    return {
        "cache_size": size,
        "least_and_most": [min(every), max(every)],
        "us_per_token": medians,
        "time_of_equal": medians["unequal heads"] / medians["equal heads"],
        "bytes": nbytes,
        "bytes_of_equal": nbytes["unequal heads"] / nbytes["equal heads"],
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, name = llama(dtype), f"LLaMA, 12 layers of 512, {str(dtype).removeprefix('torch.')}"
        results[name] = [measure(model, size, rounds) for size in SIZES]
        for point in results[name]:
            print(
                f"{name}, {point['cache_size']} on average ({point['least_and_most'][0]} to "
                f"{point['least_and_most'][1]}): time {point['time_of_equal']:.3f}x, bytes "
                f"{point['bytes_of_equal']:.5f}x of equal heads"
            )
    harness.write(ROOT / "benchmarks/results/heads_cpu.json", {"tokens_per_call": TOKENS, "cases": results})


if __name__ == "__main__":
    harness.keep_freed_memory()
    main()
