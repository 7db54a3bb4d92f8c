# SPDX-License-Identifier: Apache-2.0
"""How many tokens each KV head may hold, by how much it errs with few of them.

A handful of heads look facts up and need nearly all tokens, most need next to none. So at the same bytes each gets a
floor, and the rest in proportion to its output error. Which heads these are is a property of the model, not of the
text.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

Errors = Sequence[Sequence[float]]  # [layers][heads]; a layer that keeps transformers' own cache has none


def head_budgets(
    errors: Errors, cache_size: int, floor: float = 0.25, max_tokens: int | None = None
) -> list[list[int]]:
    """Sizes of all KV heads, ``[layers][heads]``, whose average is ``cache_size`` exactly.

    Args:
        errors: the output error of each KV head, at least 0.
        cache_size: the average over all heads, at least 1.
        floor: the share of it that every head has, from 0 to 1; one token at least.
        max_tokens: no head gets more; what that leaves goes to the others. Default: no limit.

    Returns:
        Whole numbers, the same ones for the same arguments. What rounding down leaves goes to the heads that lost most
        by it, of equal ones to the first. Without any error all heads are equal.

    Raises:
        ValueError: for arguments out of range, for no heads at all, and where ``max_tokens`` is below ``cache_size``:
            then the average cannot be reached.

    Example:
        >>> head_budgets([[0.0, 3.0], [1.0, 0.0]], cache_size=100)
        [[25, 250], [100, 25]]
        >>> head_budgets([[0.0, 3.0], [1.0, 0.0]], cache_size=100, max_tokens=200)
        [[25, 200], [150, 25]]
    """
    values = [float(error) for layer in errors for error in layer]
    _check(values, cache_size, floor, max_tokens)
    least = max(1, math.floor(Fraction(floor) * cache_size))
    most = max_tokens if max_tokens is not None else cache_size * len(values)
    sizes = iter(_share_out(values, cache_size * len(values), least, most))
    return [[next(sizes) for _ in layer] for layer in errors]


def _check(errors: list[float], cache_size: int, floor: float, max_tokens: int | None) -> None:
    if not errors:
        raise ValueError("head_budgets: errors must have at least one KV head; got none")
    if wrong := [error for error in errors if not 0 <= error < math.inf]:
        raise ValueError(f"head_budgets: errors must be finite and at least 0; got {wrong[0]}")
    if isinstance(cache_size, bool) or not isinstance(cache_size, int) or cache_size < 1:
        raise ValueError(f"head_budgets: cache_size must be a whole number of at least 1; got {cache_size!r}")
    if not 0 <= floor <= 1:
        raise ValueError(f"head_budgets: floor must be from 0 to 1; got {floor}")
    if max_tokens is not None and max_tokens < cache_size:
        raise ValueError(
            f"head_budgets: max_tokens must be at least cache_size, {cache_size}, the average; got {max_tokens}"
        )


def _share_out(errors: list[float], total: int, least: int, most: int) -> list[int]:
    """``total`` in parts from ``least`` to ``most``, what is above ``least`` in proportion to the errors."""
    exact = [Fraction(error) for error in errors]
    parts: list[Fraction] = [Fraction(least)] * len(errors)
    open_, left = list(range(len(errors))), Fraction(total - least * len(errors))
    while left > 0 and open_:
        weights = [exact[i] for i in open_]
        if sum(weights) == 0:  # the others are full: all alike
            weights = [Fraction(1)] * len(open_)
        each = left / sum(weights)
        full = [i for i, weight in zip(open_, weights, strict=True) if parts[i] + weight * each >= most]
        if not full:
            for i, weight in zip(open_, weights, strict=True):
                parts[i] += weight * each
            break
        for i in full:
            left -= most - parts[i]
            parts[i] = Fraction(most)
        open_ = [i for i in open_ if i not in full]
    sizes = [math.floor(part) for part in parts]
    lost = sorted(range(len(parts)), key=lambda i: (sizes[i] - parts[i], i))  # most first
    for i in lost[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes
