# SPDX-License-Identifier: Apache-2.0
"""Whole generate() per token: an enabled model against the stock cache with sdpa, side by side, as the text grows.

python benchmarks/generate.py [rounds]

Caches are filled with random keys and values, so that a long text costs nothing to make. The stock cache forgets the
tokens of a round before the next, ours goes on.
"""

import sys
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks/python"), str(ROOT / "tests/python")]

import harness  # noqa: E402
import stories  # noqa: E402

from fixed_size_kv_cache import FixedSizeDynamicCache, disable, enable  # noqa: E402

TOKENS = 16  # of a call
CHUNK = 4096  # tokens that a cache is filled with at a time
LENGTHS = (1, 2, 4, 8, 16, 32)  # of the cache's size


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    """12 layers of width 512, 8 query and 4 KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1 << 17,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def fill(model, cache, S: int) -> None:
    """S random tokens in every layer."""
    config = model.config
    for i in range(config.num_hidden_layers):
        for start in range(0, S, CHUNK):
            sizes = (1, config.num_key_value_heads, min(CHUNK, S - start), config.head_dim)
            keys, values = (torch.randn(sizes).to(model.dtype) for _ in range(2))
            if isinstance(cache, FixedSizeDynamicCache):
                cache.layers[i].load(keys, values)
            else:
                cache.update(keys, values, i)


@torch.no_grad()
def measure(model, cache_size: int, S: int, rounds: int) -> dict[str, object]:
    """Microseconds per token at S tokens seen."""
    stock = DynamicCache(config=model.config)
    ours = FixedSizeDynamicCache(config=model.config, cache_size=cache_size)
    fill(model, stock, S)
    fill(model, ours, S)

    def generate(cache) -> None:
        seen = cache.get_seq_length()
        model.generate(
            torch.ones(1, 1, dtype=torch.long),
            attention_mask=torch.ones(1, seen + 1, dtype=torch.long),
            past_key_values=cache,
            max_new_tokens=TOKENS,
            do_sample=False,
        )

    def run_stock() -> None:
        disable(model)
        generate(stock)
        stock.crop(S - stock.get_seq_length())

    def run_ours() -> None:
        enable(model, cache_size=cache_size)
        generate(ours)

    times = harness.time_in_turns({"stock, sdpa": run_stock, "fixed_size_kv_cache": run_ours}, rounds)
    times = {name: {what: us / TOKENS for what, us in taken.items()} for name, taken in times.items()}
    medians = {name: taken["median_us"] for name, taken in times.items()}
    return {
        "tokens_seen": S,
        "times_per_token": times,
        "of_stock": medians["fixed_size_kv_cache"] / medians["stock, sdpa"],
        "bytes": {"stock, sdpa": _bytes(stock), "fixed_size_kv_cache": ours.nbytes},
    }


def _bytes(cache) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    cases = {
        "LLaMA, 12 layers of 512, float32": (llama(torch.float32), 1024),
        "LLaMA, 12 layers of 512, bfloat16": (llama(torch.bfloat16), 1024),
    }
    if stories.FOLDER.exists():
        cases["stories260K, float32"] = (stories.load_model(), 256)
        cases["stories260K, float32"][0].config.max_position_embeddings = 1 << 17
    results = {}
    for name, (model, cache_size) in cases.items():
        measured = [measure(model, cache_size, cache_size * length, rounds) for length in LENGTHS]
        ours = [point["times_per_token"]["fixed_size_kv_cache"]["median_us"] for point in measured]
        results[name] = {"cache_size": cache_size, "lengths": measured, "longest_of_shortest": ours[-1] / ours[0]}
        for point in measured:
            stock, own = (taken["median_us"] / 1e3 for taken in point["times_per_token"].values())
            print(
                f"{name}: S={point['tokens_seen']:6} stock {stock:.2f} ms, ours {own:.2f} ms: {point['of_stock']:.2f}x"
            )
        print(f"{name}: ours at S={measured[-1]['tokens_seen']} is {ours[-1] / ours[0]:.3f}x of S={cache_size}")
    harness.write(ROOT / "benchmarks/results/generate_cpu.json", {"tokens_per_call": TOKENS, "cases": results})


if __name__ == "__main__":
    harness.keep_freed_memory()
    main()
