# SPDX-License-Identifier: Apache-2.0
"""What a cache is told when it is made: its size, its rule, and the three environment variables."""

import functools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .sizes import as_whole, average, check_whole, read_sizes

POLICIES = ("attention", "streaming", "random")
SKIPPED_MODES = ("mean", "sum")

CACHE_SIZE = "FSDC_KV_CACHE_SIZE"
INCLUDE_SKIPPED = "FSDC_INCLUDE_SKIPPED"
FREE_MEMORY = "FSDC_FREE_MEMORY"

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}


@dataclass(frozen=True, kw_only=True)
class FixedSizeCacheConfig:
    """Size and eviction rule of a cache, checked when it is made; what is left ``None`` is chosen then too.

    Args:
        cache_size: tokens per layer and KV head, at least 1. With ``include_skipped`` one of them is the entry of the
            skipped tokens, so at least 2. A sequence has one for each layer of the model, and a sequence of sequences
            one for each KV head of each layer; layers that keep transformers' own cache have ``None``.
        sink_tokens: the first tokens of each row, never evicted. Default ``min(4, N // 24)`` of the ``N`` token slots.
            Where sizes differ this is said of a head of the average size: smaller ones have their share, rounded up.
        recent_tokens: the last tokens of each row, never evicted. Default ``N // 4``. Where sizes differ each head has
            its share, rounded down.
        score_decay: gamma in (0, 1], what is left of a score after each query. Default ``1 - 4 / max(cache_size, 8)``;
            of sizes that differ the average.
        score_prior: attention, per query head of the group, that every token is credited with, so that a token nobody
            has asked for yet can outlive a redundant one that was attended to; at least 0.
        value_weight: weigh a score with the norm of the token's value.
        redundancy: rho in [0, 1], how much a token loses when a newer key points the same way.
        include_skipped: keep the sum of all evicted tokens as one more entry.
        skipped_mode: ``mean``: the entry counts as its n tokens, with their mean key and value and ``log n`` added to
            the logit. ``sum``: the literal sum is the key and the value, as the original had it; that hurts quality.
        free_memory: give unused memory of the CUDA allocator back after the compaction of a prompt or chunk, once per
            forward. It waits for the device, and the next allocations are slower.
        static: give the buffers their full size with the first token. Otherwise they grow with the text, at most
            doubling, until they are full, and a size that memory has no room for shows late. A CUDA graph that you
            capture yourself needs it; where generate() compiles the step it is so anyway.
        policy: ``attention``, or the baselines ``streaming`` (sinks and the last tokens) and ``random``.

    Raises:
        TypeError: for a value of another type.
        ValueError: for a value out of range, and for environment variables that cannot be read.

    Example:
        >>> FixedSizeCacheConfig(cache_size=100, sink_tokens=4).slots
        100
    """

    cache_size: int | Sequence | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    score_decay: float | None = None
    score_prior: float = 0.02
    value_weight: bool = True
    redundancy: float = 0.95
    include_skipped: bool | None = None
    skipped_mode: str = "mean"
    free_memory: bool | None = None
    static: bool = False
    policy: str = "attention"

    def __post_init__(self) -> None:
        def choose(name: str, value) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value() if callable(value) else value)

        choose("include_skipped", lambda: read_bool(INCLUDE_SKIPPED, False))
        choose("free_memory", lambda: read_bool(FREE_MEMORY, False))
        choose("cache_size", lambda: read_size(CACHE_SIZE, 1024))
        self._check_switches()
        object.__setattr__(self, "cache_size", read_sizes(self.cache_size, 2 if self.include_skipped else 1))
        for name in ("sink_tokens", "recent_tokens"):
            object.__setattr__(self, name, as_whole(getattr(self, name)))
        choose("sink_tokens", min(4, self.slots // 24))
        check_whole("sink_tokens", self.sink_tokens, 0)
        choose("recent_tokens", max(0, min(self.slots // 4, self.slots - self.sink_tokens)))
        check_whole("recent_tokens", self.recent_tokens, 0)
        choose("score_decay", 1 - 4 / max(float(average(self.cache_size)), 8))
        self._check_rest()

    @property
    def average_size(self) -> int:
        """``cache_size``; where sizes differ their average over all KV heads, rounded down."""
        return self.cache_size if isinstance(self.cache_size, int) else int(average(self.cache_size))

    @property
    def slots(self) -> int:
        """Tokens that are held, N: :attr:`average_size`, less the entry of the skipped ones."""
        return self.average_size - 1 if self.include_skipped else self.average_size

    @property
    def prefill_chunk_size(self) -> int:
        """Tokens of a long prompt that generate() of an enabled model reads at a time, unless told otherwise."""
        return max(1024, self.average_size)

    def of_layer(self, i: int) -> "tuple[FixedSizeCacheConfig, ...]":
        """The settings of one layer: one for all of its KV heads, or one for each.

        Raises:
            ValueError: where ``cache_size`` has none for this layer.
        """
        if isinstance(self.cache_size, int):
            return (self,)
        sizes = self.cache_size[i] if i < len(self.cache_size) else ()
        if sizes == ():
            raise ValueError(
                f"cache_size must have a size for each layer whose cache is capped; got none for layer {i}"
            )
        return tuple(_of_size(self, size) for size in ((sizes,) if isinstance(sizes, int) else sizes))

    def _check_switches(self) -> None:
        for name in ("value_weight", "include_skipped", "free_memory", "static"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")

    def _check_rest(self) -> None:
        if self.sink_tokens + self.recent_tokens > self.slots:
            raise ValueError(
                f"sink_tokens + recent_tokens must be at most the {self.slots} tokens that are held; "
                f"got {self.sink_tokens} + {self.recent_tokens}"
            )
        for name in ("score_decay", "score_prior", "redundancy"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name} must be a number; got {getattr(self, name)!r}")
        if not 0 < self.score_decay <= 1:
            raise ValueError(f"score_decay must be above 0 and at most 1; got {self.score_decay}")
        if not 0 <= self.score_prior < float("inf"):
            raise ValueError(f"score_prior must be at least 0 and finite; got {self.score_prior}")
        if not 0 <= self.redundancy <= 1:
            raise ValueError(f"redundancy must be from 0 to 1; got {self.redundancy}")
        if self.skipped_mode not in SKIPPED_MODES:
            raise ValueError(f"skipped_mode must be one of {', '.join(SKIPPED_MODES)}; got {self.skipped_mode!r}")
        if self.include_skipped and self.skipped_mode == "sum":
            _warn_of_sum()
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}; got {self.policy!r}")


@functools.cache
def _warn_of_sum() -> None:
    """Once per process."""
    warnings.warn(
        'skipped_mode="sum" attends to the sum of all evicted keys as if it were one token, which hurts quality; '
        '"mean" counts them as what they are',
        stacklevel=2,
    )


SETTING_NAMES = tuple(field.name for field in fields(FixedSizeCacheConfig))


def read_settings(who: str, settings: FixedSizeCacheConfig | None, fields: dict) -> FixedSizeCacheConfig:
    """Settings as a caller gives them: one object, or its fields one by one."""
    if unknown := sorted(fields.keys() - set(SETTING_NAMES)):
        raise TypeError(f"{who} takes {', '.join(SETTING_NAMES)}; got {', '.join(unknown)}")
    if settings is None:
        return FixedSizeCacheConfig(**fields)
    if not isinstance(settings, FixedSizeCacheConfig):
        raise TypeError(f"{who}: settings must be a FixedSizeCacheConfig; got {type(settings).__name__}")
    if fields:
        raise TypeError(f"{who}: settings must be one object or single fields, not both; got {', '.join(fields)} too")
    return settings


def read_size(name: str, default: int) -> int:
    """A positive whole number from the environment."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) >= 1):
        raise ValueError(f"{name} must be a whole number of at least 1; got {text!r}")
    return int(text)


def read_bool(name: str, default: bool) -> bool:
    """True or False from the environment, in any of the usual spellings."""
    text = os.environ.get(name)
    if text is None:
        return default
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"{name} must be true, false, 1, 0, yes, no, on or off; got {text!r}")
    return word in _TRUE


@functools.lru_cache(maxsize=4096)
def _of_size(settings: FixedSizeCacheConfig, size: int) -> FixedSizeCacheConfig:
    """The settings of a head, whose edges are as large as its share of what the settings say of an average one."""
    entry = 1 if settings.include_skipped else 0
    share = (size - entry) / (average(settings.cache_size) - entry)
    sinks = min(settings.sink_tokens, math.ceil(settings.sink_tokens * share))
    return replace(settings, cache_size=size, sink_tokens=sinks, recent_tokens=int(settings.recent_tokens * share))
