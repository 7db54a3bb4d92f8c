# SPDX-License-Identifier: Apache-2.0
"""Assisted decoding on one of our caches: tokens of earlier turns are not read again, and recording ends with it.

From transformers 5 on its first forward reads the whole text, whatever the cache holds. What that forward reads is
decided by ``prepare_inputs_for_generation`` of the model, which is replaced meanwhile, for this cache only.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from ..compat.transformers import CACHE_NAME, TAKES_NEW_TOKENS_ONLY
from .marks import RUNNING

METHOD = "prepare_inputs_for_generation"
LOCK = threading.Lock()


@contextlib.contextmanager
def skip_what_was_read(model: Any, given: Any) -> Iterator[None]:
    """While assisted decoding of a model runs; ``given`` is what it was handed, see ``handed_over.Given``."""
    if given.start and given.mask is not None:
        raise ValueError(
            "generate: input_ids must be the full text for assisted decoding of a padded one; got new tokens only"
        )
    is_needed = given.seen > 0 and given.start == 0 and given.is_judged and TAKES_NEW_TOKENS_ONLY
    try:
        if is_needed:
            _add(model, given.cache)
        yield
    finally:
        if is_needed:
            _remove(model, given.cache)
        for cache in (given.cache, RUNNING.cache):  # Phi-3 may have dropped the first
            cache.stop_past_recording()  # from here on tokens stay, and are evicted


def _add(model: Any, cache: Any) -> None:
    with LOCK:
        if METHOD not in vars(model):
            setattr(model, METHOD, _Reader(getattr(model, METHOD)))
        vars(model)[METHOD].caches.append(cache)


def _remove(model: Any, cache: Any) -> None:
    with LOCK:
        caches = vars(model)[METHOD].caches
        caches[:] = [other for other in caches if other is not cache]
        if not caches:
            delattr(model, METHOD)


class _Reader:
    """``prepare_inputs_for_generation`` that skips what some caches have read, in their first forward."""

    def __init__(self, original: Any) -> None:
        self.original, self.caches = original, []

    def __call__(self, input_ids: Any, next_sequence_length: int | None = None, **kwargs: Any) -> dict:
        cache = kwargs.get(CACHE_NAME)
        is_first = next_sequence_length is None and kwargs.get("is_first_iteration")
        if is_first and any(cache is mine for mine in self.caches):
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        return self.original(input_ids, next_sequence_length=next_sequence_length, **kwargs)
