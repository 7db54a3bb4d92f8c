# SPDX-License-Identifier: Apache-2.0
"""Every kernel once or twice, on small inputs, for compute-sanitizer: it makes a kernel hundreds of times slower.

Run by tests/gpu/run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own and the
first byte beyond is nobody's. Compares with the specification: what copies and sums scores bit for bit.
"""

import sys
from itertools import product
from pathlib import Path

import torch

from fixed_size_kv_cache import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from decode_case import check, random_case
from inputs import FLOATING, assert_all_same_bits, rows


def main() -> None:
    torch.manual_seed(0)
    cases = 0  # wide rows of 3000 tokens are shared by a cluster, the others are not
    for (B, H, S), D, dtype, skipped in product([(1, 2, 3000), (2, 70, 70)], [3, 64], FLOATING, [False, True]):
        keys, values = rows(B, H, S, D, dtype, "cuda"), rows(B, H, S, 8, dtype, "cuda")
        scores = torch.rand(B, H, S, device="cuda")
        actual = torch.ops.fsdc.truncate(keys, values, scores, S // 3, include_skipped=skipped)
        wanted = reference.truncate(keys.cpu(), values.cpu(), scores.cpu(), S // 3, include_skipped=skipped)
        assert_all_same_bits([x.cpu() for x in actual], wanted)
        weights = torch.rand(B, 2 * H, 3, S, device="cuda").to(dtype)
        sums = scores.cpu()
        reference.accumulate_scores_(sums, weights.cpu())
        torch.ops.fsdc.accumulate_scores_(scores, weights)
        assert_all_same_bits([scores.cpu()], [sums])
        actual = torch.ops.fsdc.truncate(keys, values, weights, S // 3, include_skipped=skipped)
        wanted = reference.truncate(keys.cpu(), values.cpu(), weights.cpu(), S // 3, include_skipped=skipped)
        assert_all_same_bits([x.cpu() for x in actual], wanted)
        cases += 1
    # Two rows too long for the memory of a cluster: their scores are read again in each pass.
    keys, scores = rows(1, 2, 500_000, 1, torch.bfloat16, "cuda"), torch.rand(1, 2, 500_000, device="cuda")
    actual = torch.ops.fsdc.truncate(keys, keys, scores, 100)
    assert_all_same_bits([x.cpu() for x in actual], reference.truncate(keys.cpu(), keys.cpu(), scores.cpu(), 100))
    cases += 1
    for dtype, entry, slots, N in product(FLOATING, [None, "mean"], [None, [300, 7]], [12, 700]):
        for length in (5, N + 3):
            check(random_case(H=2, G=3, N=N, D=16, slots=slots, length=length, dtype=dtype, entry=entry, device="cuda"))
            cases += 1
    for dtype, T, Q in product(FLOATING, [0, 37], [5, 130]):
        check_chunk(dtype, T, Q)
        cases += 1
    print(f"{cases} cases agree")


def check_chunk(dtype: torch.dtype, T: int, Q: int, H: int = 2, G: int = 3, D: int = 16) -> None:
    query, keys, values = (torch.randn(2, heads, n, D).to(dtype) for heads, n in ((H * G, Q), (H, T + Q), (H, T + Q)))
    facts = torch.rand(4, 2, H, T + Q)
    facts[3] = 1 / keys.float().norm(dim=-1)
    facts_there = facts.cuda()
    rule = dict(scaling=D**-0.5, redundancy=True)
    actual = torch.ops.fsdc.chunk_attention_(query.cuda(), keys.cuda(), values.cuda(), facts=facts_there, **rule)
    wanted = reference.chunk_attention_(query.double(), keys.double(), values.double(), facts=facts, **rule)
    loose = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.cpu().double(), wanted, rtol=loose, atol=4 * loose)
    torch.testing.assert_close(facts_there.cpu(), facts, rtol=max(1e-5, loose), atol=max(1e-5, loose))


if __name__ == "__main__":
    main()
