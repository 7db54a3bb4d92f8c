# SPDX-License-Identifier: Apache-2.0
"""Whole models on a GPU: time per token, time to read a prompt and peak memory, beside the stock caches.

python benchmarks/generate_cuda.py [1B | 8B ...] [--compile] [--json FILE] [--seconds S]

LLaMA shapes with random weights in bf16, a cache of 1024 tokens, prompts of 4096 tokens; 1, 8 and 64 rows. Ours stands
beside the growing cache with sdpa, and beside a static cache of the same 1024 slots, which knows no more than what fits
and so has the least to do. A step is timed eagerly and, where the cache does not grow, captured by a CUDA graph; with
--compile the static cache through torch.compile too. Without a GPU it exits with 3.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks/python"))

from cuda_timing import NO_GPU, microseconds  # noqa: E402
from harness import write  # noqa: E402

from fixed_size_kv_cache import FixedSizeDynamicCache, enable  # noqa: E402

C, PROMPT, STEPS = 1024, 4096, 32
ROWS = (1, 8, 64)
SHAPES = {  # hidden, intermediate, layers, query heads, KV heads
    "1B": (2048, 8192, 16, 32, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
STOCK, STATIC, OURS = "DynamicCache + sdpa", "StaticCache of 1024 + sdpa", "fixed_size_kv_cache"


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 17,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def new_cache(name: str, model):
    if name == OURS:
        return FixedSizeDynamicCache(config=model.config, cache_size=C, static=True)
    if name == STATIC:
        return StaticCache(config=model.config, max_cache_len=C)
    return DynamicCache(config=model.config)


class Decoding:
    """A model with a cache that has read a prompt: steps of one token."""

    def __init__(self, name: str, model, rows: int) -> None:
        self.model, self.cache = model, new_cache(name, model)
        self.read = min(PROMPT, C - STEPS * 4) if name == STATIC else PROMPT  # it holds no more
        self.ids = torch.randint(1, model.config.vocab_size, (rows, self.read), device=model.device)
        self.token = torch.ones(rows, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((rows, 1), self.read, dtype=torch.long, device=model.device)

    def prompt(self) -> None:
        for start in range(0, self.read, C):
            self.forward(self.ids[:, start : start + C])

    def step(self) -> torch.Tensor:
        return self.forward(self.token, position_ids=self.position)

    def forward(self, ids, **kwargs) -> torch.Tensor:
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **kwargs).logits


def graph_of(step: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def median_of(work: Callable[[], object], times: int) -> float:
    return statistics.median(microseconds(work) for _ in range(times))


def measure(name: str, model, rows: int, compiled: bool) -> dict[str, object]:
    """What fails, as for want of memory, costs only its own figure."""
    found: dict[str, object] = {"failed": {}}

    def attempt(figure: str, work: Callable[[], object]) -> None:
        try:
            found[figure] = work()
        except Exception as error:
            found["failed"][figure] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            torch.cuda.synchronize()

    def through_compiler() -> float:
        step = torch.compile(decoding.step, mode="reduce-overhead")
        for _ in range(3):
            step()
        return median_of(step, STEPS)

    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    attempt("first_prompt_us", lambda: microseconds(Decoding(name, model, rows).prompt))  # what happens once happens
    torch.cuda.reset_peak_memory_stats()
    decoding = Decoding(name, model, rows)
    found["prompt_tokens"] = decoding.read
    attempt("prompt_us", lambda: microseconds(decoding.prompt))
    found["peak_bytes_beyond_weights"] = torch.cuda.max_memory_allocated() - weights
    attempt("eager_us", lambda: median_of(decoding.step, STEPS))
    if name != STOCK:  # it grows: its graph would be of another length at each step
        attempt("graph_us", lambda: median_of(graph_of(decoding.step).replay, STEPS))
    if compiled and name == STATIC:
        attempt("compiled_us", through_compiler)
    return found


def contenders(model, rows: int, compiled: bool) -> dict[str, dict[str, object]]:
    found = {name: measure(name, model, rows, compiled) for name in (STOCK, STATIC)}
    with enable(model, cache_size=C):
        found[OURS] = measure(OURS, model, rows, compiled)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--compile", action="store_true", help="the static cache through torch.compile, too")
    parser.add_argument("--json", type=Path, help="write the result there, after each case")
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after so long")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.models if name not in SHAPES]:
        parser.error(f"MODEL must be one of {', '.join(SHAPES)}; got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("generate_cuda: there is no GPU", file=sys.stderr)
        return NO_GPU
    torch.manual_seed(0)
    end, cases = time.monotonic() + arguments.seconds, {}
    with torch.no_grad():
        for shape in arguments.models or SHAPES:
            model = llama(*SHAPES[shape])
            for rows in ROWS:
                if time.monotonic() > end:
                    break
                name = f"{shape}, {rows} rows, cache of {C}"
                cases[name] = contenders(model, rows, arguments.compile)
                for contender, entry in cases[name].items():
                    print(f"{name}: {contender}: {entry}", flush=True)
                if arguments.json:
                    write(arguments.json, {"gpu": torch.cuda.get_device_name(), "cases": cases})
            del model
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
