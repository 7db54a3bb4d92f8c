# SPDX-License-Identifier: Apache-2.0
"""One launch of each operator in the shape that counts, for a profiler: python tests/gpu/launches.py

The shapes are those of an 8B LLaMA in bf16 with a cache of 1024 tokens, one row and eight.
"""

import math

import torch

import fixed_size_kv_cache  # noqa: F401  (loads the operators)

H, G, D, C, CHUNK = 8, 4, 128, 1024, 1024
RULE = dict(
    decay=0.99, prior=0.02, redundancy=0.95, value_weight=True, sink_tokens=4, recent_tokens=C // 4, scaling=D**-0.5
)


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def main() -> None:
    with torch.inference_mode(), torch.device("cuda"):
        for B in (1, 8):
            scores = torch.rand(B, H, C + CHUNK)
            torch.ops.fsdc.truncate(bf16(B, H, C + CHUNK, D), bf16(B, H, C + CHUNK, D), scores, C)
            torch.ops.fsdc.accumulate_scores_(scores, torch.rand(B, H * G, 8, C + CHUNK))
            facts, positions = torch.rand(4, B, H, C + 1), torch.arange(C + 1, dtype=torch.int32).repeat(B, H, 1)
            facts[0, :, :, C], positions[:, :, C] = -math.inf, -1
            seen = torch.full((B,), C, dtype=torch.int32)
            state = bf16(B, H, C + 1, D), bf16(B, H, C + 1, D), facts, positions, seen
            torch.ops.fsdc.decode_attention_(
                bf16(B, H * G, 1, D), bf16(B, H, 1, D), bf16(B, H, 1, D), *state, C, **RULE
            )
            torch.ops.fsdc.chunk_attention_(
                bf16(B, H * G, CHUNK, D), bf16(B, H, C + CHUNK, D), bf16(B, H, C + CHUNK, D), scaling=D**-0.5,
                facts=torch.rand(4, B, H, C + CHUNK), redundancy=True,
            )  # fmt: skip
        torch.cuda.synchronize()
    print("all launched")


if __name__ == "__main__":
    main()
