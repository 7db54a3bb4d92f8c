# SPDX-License-Identifier: Apache-2.0
"""chunk_attention_ on the CPU, one chunk of a prompt, beside PyTorch's attention, which gives no scores.

python benchmarks/python/bench_chunk.py [--json FILE] [--rounds N] [--threads N]

A chunk of Q tokens sees T tokens held and itself. Contenders take turns. Exits with 1 where a goal is missed: at most
1.1x the time of scaled_dot_product_attention, with votes; what the redundancy of the chunk adds stands beside it.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from harness import keep_freed_memory, time_in_turns, write
from torch.nn.functional import scaled_dot_product_attention

OURS, WITH_REDUNDANCY, SDPA = "chunk_attention_", "chunk_attention_ with redundancy", "sdpa, no votes"
SHAPES = {"H=2 G=4 D=64": (2, 4, 64), "H=8 G=4 D=128": (8, 4, 128), "H=8 G=1 D=64": (8, 1, 64)}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HELD, NEW = (0, 256, 1024), (128, 512, 1024)
GOAL = 1.1


def contenders(H: int, G: int, D: int, T: int, Q: int, dtype: torch.dtype) -> dict:
    query, keys, values = (torch.randn(1, heads, n, D).to(dtype) for heads, n in ((H * G, Q), (H, T + Q), (H, T + Q)))
    facts = torch.zeros(4, 1, H, T + Q)
    facts[3] = 1 / keys.float().norm(dim=-1)
    query_weights, carry = 0.99 ** torch.arange(Q - 1, -1, -1).float()[None], torch.full((1,), 0.99**Q)
    mask = torch.zeros(Q, T + Q, dtype=dtype).masked_fill(
        torch.ones(Q, T + Q, dtype=torch.bool).triu(T + 1), -torch.inf
    )

    def ours(redundancy: bool):
        return torch.ops.fsdc.chunk_attention_(
            query,
            keys,
            values,
            scaling=D**-0.5,
            facts=facts,
            query_weights=query_weights,
            carry=carry,
            redundancy=redundancy,
        )

    def sdpa():  # the triangle alone where it knows that it is one
        how = {"is_causal": True} if T == 0 else {"attn_mask": mask}
        return scaled_dot_product_attention(query, keys, values, enable_gqa=G > 1, **how)

    torch.testing.assert_close(ours(False), sdpa(), rtol=2e-2, atol=2e-2)
    return {SDPA: sdpa, OURS: lambda: ours(False), WITH_REDUNDANCY: lambda: ours(True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    cases, missed = {}, 0
    with torch.inference_mode():
        for (shape, sizes), (type_name, dtype), T, Q in itertools.product(SHAPES.items(), TYPES.items(), HELD, NEW):
            times = time_in_turns(contenders(*sizes, T, Q, dtype), arguments.rounds, warm_up=1)
            sdpa = times[SDPA]["median_us"]
            of_sdpa = {name: times[name]["median_us"] / sdpa for name in (OURS, WITH_REDUNDANCY)}
            name = f"{shape}, T={T} Q={Q}, {type_name}"
            cases[name] = {"times": times, "times_of_sdpa": of_sdpa}
            is_missed = of_sdpa[OURS] > GOAL
            missed += is_missed
            print(
                f"{name:34} sdpa {sdpa / 1e3:8.2f} ms, ours {of_sdpa[OURS]:.2f}x, with redundancy "
                f"{of_sdpa[WITH_REDUNDANCY]:.2f}x" + ("  missed" if is_missed else ""),
                flush=True,
            )
    if arguments.json:
        write(arguments.json, {"goal": GOAL, "cases": cases})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
