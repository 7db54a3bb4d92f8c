# SPDX-License-Identifier: Apache-2.0
"""Reading a prompt: generate() of one token, an enabled model against the stock cache with sdpa, side by side.

python benchmarks/prompt.py [rounds]
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks/python")]

import harness  # noqa: E402

from fixed_size_kv_cache import disable, enable  # noqa: E402

CACHE_SIZES = (256, 1024)
LENGTHS = (512, 1024, 2048, 4096, 8192)


def llama(kv_heads: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """6 layers of width 512, 8 query heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 17,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def measure(model, S: int, rounds: int) -> dict[str, object]:
    """Microseconds to read S tokens, with the stock cache and with ours of each size."""
    ids = torch.randint(0, 4096, (1, S))

    def read(cache_size: int | None) -> None:
        if cache_size is None:
            disable(model)
        else:
            enable(model, cache_size=cache_size)
        model.generate(ids, max_new_tokens=1, do_sample=False)

    contenders = {"stock, sdpa": lambda: read(None)}
    contenders |= {f"C={size}": (lambda size=size: read(size)) for size in CACHE_SIZES}
    times = harness.time_in_turns(contenders, rounds)
    stock = times["stock, sdpa"]["median_us"]
    return {
        "tokens": S,
        "times": times,
        "of_stock": {name: taken["median_us"] / stock for name, taken in times.items() if name != "stock, sdpa"},
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    results = {}
    for name, kv_heads in (("MHA 8/8", 8), ("GQA 8/2", 2)):
        for dtype in (torch.float32, torch.bfloat16):
            model, case = llama(kv_heads, dtype), f"{name}, {str(dtype).removeprefix('torch.')}"
            results[case] = []
            for S in LENGTHS:
                point = measure(model, S, rounds if S < 4096 else 2)
                results[case].append(point)
                shares = ", ".join(f"{size} {share:.2f}x" for size, share in point["of_stock"].items())
                stock = point["times"]["stock, sdpa"]["median_us"] / 1e3
                print(f"{case}: S={S:5} stock {stock:.0f} ms; {shares}", flush=True)
    harness.write(ROOT / "benchmarks/results/prompt_cpu.json", {"cases": results})


if __name__ == "__main__":
    harness.keep_freed_memory()
    main()
