# SPDX-License-Identifier: Apache-2.0
"""Inputs and comparisons that several test files share."""

import torch
from torch import Tensor

FLOATING = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INF, NAN = float("inf"), float("nan")


def rows(B: int, H: int, S: int, D: int, dtype=torch.float32, device="cpu") -> Tensor:
    """Keys or values [B, H, S, D]."""
    return torch.randn(B, H, S, D, device=device).to(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal type, sizes and bits; any NaN equals any NaN, since hardware chooses their payload."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if actual.is_floating_point():
        different |= ~actual.isnan() & (actual.signbit() != expected.signbit())
    if different.any():
        first = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} elements differ, "
            f"first at {first}: got {actual[first].item()!r}, expected {expected[first].item()!r}"
        )


def assert_copied(rows: Tensor, source: Tensor, indices: Tensor) -> None:
    """That rows ``[B, H, K, D]`` are those that the indices ``[B, H, K]`` name, payloads of NaN and all."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.dtype.itemsize]  # torch's gather may change NaN
    assert_same_bits(rows.view(integer), source.view(integer).take_along_dim(indices[..., None], dim=2))


def assert_all_same_bits(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def hostile_scores(S: int) -> dict[str, Tensor]:
    """Rows of scores [S] that selections are known to get wrong."""
    generator = torch.Generator().manual_seed(S)

    def rand() -> Tensor:
        return torch.rand(S, generator=generator)

    def choice(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (S,), generator=generator)]

    lognormal = torch.exp(torch.randn(S, generator=generator) * 17).clamp(1e-37, 1e37)
    return {
        "random": rand(),
        "all equal": torch.full((S,), 0.25),
        "all zero": torch.zeros(S),
        "two values": choice(0.5, 0.25),
        "zeros of both signs": choice(0.0, -0.0),
        "all NaN": torch.full((S,), NAN),
        "all -inf": torch.full((S,), -INF),
        "all +inf": torch.full((S,), INF),
        "more +inf than kept": choice(INF, INF, 1.0),
        "every kind": choice(INF, NAN, -NAN, 1.0, 0.0, -0.0, 1e-40, -1.0, -INF),
        "largest finite and NaN": choice(3.4028235e38, NAN),
        "denormals": rand() * 1e-40,
        "lognormal over 30 decades": lognormal,
        "negative": -lognormal,
        "one exponent": 1 + rand() * 0.01,
        "neighbours in the last bits": (torch.arange(S) % 7 + 0x3F800000).to(torch.int32).view(torch.float32),
        "ascending": torch.arange(S).float(),
        "descending": -torch.arange(S).float(),
        "large where a sample does not look": torch.where(torch.arange(S) % 2 == 1, rand() + 1, rand() * 1e-3),
        "large where a sample looks": torch.where(torch.arange(S) % 16 == 0, rand() + 1, rand() * 1e-3),
    }
