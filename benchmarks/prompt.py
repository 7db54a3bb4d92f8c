# SPDX-License-Identifier: Apache-2.0
"""Reading a prompt: generate() of one token, an enabled model against the stock cache with sdpa, side by side.

python benchmarks/prompt.py [rounds]

Time, of contenders taking turns; and the most memory while it is read, each in a process of its own. What the model
takes without any attention, in the same chunks as ours, is the floor of them all.
"""

import ctypes
import multiprocessing
import re
import sys
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks/python"), str(ROOT / "tests/python")]

import harness  # noqa: E402
import stories  # noqa: E402

from fixed_size_kv_cache import disable, enable  # noqa: E402

CACHE_SIZES = (256, 1024)
LENGTHS = (512, 1024, 2048, 4096, 8192)
LONG = 4096  # from here on two rounds do, and memory is measured
STOCK, FLOOR = "stock, sdpa", "no attention"
CHUNK = 1024  # of ours, at these sizes of the cache
LLAMAS = {  # 6 layers of 512: KV heads and type
    "MHA 8/8, float32": (8, torch.float32),
    "MHA 8/8, bfloat16": (8, torch.bfloat16),
    "GQA 8/2, float32": (2, torch.float32),
    "GQA 8/2, bfloat16": (2, torch.bfloat16),
}
STORIES = "stories260K, float32"


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


def make(name: str):
    if name in LLAMAS:
        return llama(*LLAMAS[name])
    model = stories.load_model()
    model.config.max_position_embeddings = 1 << 17
    return model


def measure(model, S: int, rounds: int) -> dict[str, object]:
    """Microseconds to read S tokens, with the stock cache and with ours of each size."""
    ids = random_ids(model, S)
    contenders = {STOCK: lambda: read(model, ids, None)}
    contenders |= {f"C={size}": (lambda size=size: read(model, ids, size)) for size in CACHE_SIZES}
    contenders[FLOOR] = lambda: read_without_attention(model, ids)
    times = harness.time_in_turns(contenders, rounds)
    stock = times[STOCK]["median_us"]
    return {
        "tokens": S,
        "times": times,
        "of_stock": {name: taken["median_us"] / stock for name, taken in times.items() if name != STOCK},
    }


def random_ids(model, S: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (1, S))


def read(model, ids: torch.Tensor, cache_size: int | None) -> None:
    if cache_size is None:
        disable(model)
    else:
        enable(model, cache_size=cache_size)
    model.generate(ids, max_new_tokens=1, do_sample=False)


def no_attention(module, query, key, value, attention_mask, **kwargs):
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register("none", no_attention)
AttentionMaskInterface.register("none", lambda *args, **kwargs: None)


def read_without_attention(model, ids: torch.Tensor) -> None:
    disable(model)
    usual = model.config._attn_implementation
    model.set_attn_implementation("none")
    try:
        model.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=CHUNK)
    finally:
        model.set_attn_implementation(usual)


def peak_bytes(name: str, S: int, cache_size: int | None) -> int:
    """The most memory that reading S tokens takes, beyond the model's and what 16 tokens take. For a fresh process."""
    model = make(name)
    read(model, torch.zeros(1, 16, dtype=torch.long), cache_size)
    ctypes.CDLL(None).malloc_trim(0)  # what making the model took
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest is that of now
    read(model, random_ids(model, S), cache_size)
    return _memory("VmHWM") - before


def peaks(name: str, S: int) -> dict[str, int]:
    """:func:`peak_bytes` of all contenders."""
    sizes = {STOCK: None} | {f"C={size}": size for size in CACHE_SIZES}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        return {who: processes.apply(peak_bytes, (name, S, size)) for who, size in sizes.items()}


def _memory(which: str) -> int:
    return 1024 * int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    results = {}
    for name in (*LLAMAS, STORIES):
        if name == STORIES and not stories.FOLDER.exists():
            continue
        model, results[name] = make(name), []
        for S in LENGTHS:
            point = measure(model, S, rounds if S < LONG else 2)
            results[name].append(point)
            shares = ", ".join(f"{size} {share:.2f}x" for size, share in point["of_stock"].items())
            print(f"{name}: S={S:5} stock {point['times'][STOCK]['median_us'] / 1e3:.0f} ms; {shares}", flush=True)
            if S >= LONG:
                point["peak_bytes"] = peaks(name, S)
                print("  " + ", ".join(f"{who} {x / 2**20:.0f} MiB" for who, x in point["peak_bytes"].items()))
        harness.write(ROOT / "benchmarks/results/prompt_cpu.json", {"cases": results})


if __name__ == "__main__":
    harness.keep_freed_memory()
    main()
