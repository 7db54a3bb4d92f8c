# SPDX-License-Identifier: Apache-2.0
"""``cache_size``: one number, one for each layer, or one for each KV head of each layer."""

import operator
from collections.abc import Sequence
from fractions import Fraction

Sizes = int | tuple  # of a cache: a number, or for each layer a number, numbers of its KV heads, or () for no size


def read_sizes(value: object, least: int) -> Sizes:
    """Whole numbers of any library, and sequences of them, checked.

    Args:
        value: what a user gives. A layer that keeps transformers' own cache has ``None``, or no numbers.
        least: the smallest size there may be.

    Raises:
        TypeError: for anything but whole numbers.
        ValueError: for a number that is too small, and for no numbers at all.
    """
    value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy and torch
    if isinstance(value, str) or not isinstance(value, Sequence):
        return check_whole("cache_size", value, least)
    sizes = tuple(_read_layer(f"cache_size[{i}]", layer, least) for i, layer in enumerate(value))
    if not all_sizes(sizes):
        raise ValueError(f"cache_size must have a size for at least one layer; got {value!r}")
    return sizes


def all_sizes(sizes: Sizes) -> list[int]:
    """One for each KV head; those of layers with one number as often as other layers have heads."""
    if isinstance(sizes, int):
        return [sizes]
    H = max((len(layer) for layer in sizes if isinstance(layer, tuple)), default=1)
    return [size for layer in sizes for size in (layer if isinstance(layer, tuple) else [layer] * H)]


def average(sizes: Sizes) -> Fraction:
    """Over all KV heads."""
    every = all_sizes(sizes)
    return Fraction(sum(every), len(every))


def as_whole(value: object) -> object:
    """Whole numbers of NumPy and torch as Python's; others are left for the checks."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def check_whole(name: str, value: object, least: int) -> int:
    value = as_whole(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def _read_layer(name: str, layer: object, least: int) -> int | tuple[int, ...]:
    layer = layer.tolist() if hasattr(layer, "tolist") else layer
    if layer is None:
        return ()
    if isinstance(layer, str) or not isinstance(layer, Sequence):
        return check_whole(name, layer, least)
    return tuple(check_whole(f"{name}[{h}]", size, least) for h, size in enumerate(layer))
