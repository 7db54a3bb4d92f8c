# SPDX-License-Identifier: Apache-2.0
"""A cache with a history: what generate() is handed must go on from there.

transformers takes the first ``S`` tokens for those that the cache has read, whatever they are, unless the mask is
longer than the text; then all of them are new. Where that is wrong tokens would be dropped or read twice, silently.
"""

from typing import Any

import torch
from torch import Tensor

from ..compat.transformers import CACHE_NAME, TAKES_NEW_TOKENS_ONLY
from ..dynamic_cache import FixedSizeDynamicCache
from ..layer.history import History, hash_ids
from ..layer.layer import FixedSizeLayer

REMEDY = (
    "pass the full text, or the new tokens only with an attention_mask as long as the full text; to change what was "
    "read call cache.crop(...) or cache.reset(), or go on from a copy of the cache that was made before it"
)


class Given:
    """The input of one generate() of a cache, before the first token; raises where it does not fit the cache."""

    def __init__(self, cache: FixedSizeDynamicCache, ids: Tensor, generation_config: Any, model_kwargs: dict) -> None:
        self.cache, self.ids = cache, ids
        self.mask = model_kwargs.get("attention_mask")  # [B, M], None where it is all ones
        self.embeds = model_kwargs.get("inputs_embeds")
        length = ids.shape[1] if self.embeds is None else self.embeds.shape[1]
        shown = getattr(generation_config, "_mask_length", length) if self.mask is None else self.mask.shape[1]
        self.seen = cache.get_seq_length()
        # where the text begins that was handed over
        self.start = self.seen if self.embeds is None and shown > length else 0
        self.is_judged = not getattr(generation_config, "is_assistant", False)  # its tokens come and go
        self.may_be_remembered = self.is_judged and self.embeds is None and (generation_config.num_beams or 1) == 1
        self.before = None
        layer = first_layer(cache)
        if layer is None:
            return
        if self.is_judged and self.seen:
            self._check_lengths(length, shown)
            self._check_padding(layer)
            self._check_ids(layer)
        self.before, layer.history = layer.history, None  # what comes in between has none

    def remember(self, sequences: Tensor) -> None:
        """After generate(), what the cache has read of these ids ``[B, length]``."""
        layer, count = first_layer(self.cache), self.cache.get_seq_length() - self.start
        if layer is None or not self.may_be_remembered or not 0 < count <= sequences.shape[1]:
            return
        if not layer.is_initialized or sequences.shape[0] != layer.slots.seen.shape[0]:
            return
        earlier = 0
        if self.start:
            if self.before is None or self.before.tokens != self.start:
                return
            earlier = self.before.hashes
        real = self._real(self.start, count)
        hashes = earlier + hash_ids(
            sequences[:, :count], None if real is None else real.to(sequences.device), self.start
        )
        layer.history = History(self.start + count, hashes)

    def _real(self, start: int, count: int) -> Tensor | None:
        """Which of the columns are not padding ``[B, count]``; what the mask does not reach was generated."""
        if self.mask is None:
            return None
        given = self.mask[:, start : start + count].bool()
        more = count - given.shape[1]
        return given if more == 0 else torch.cat([given, given.new_ones(given.shape[0], more)], dim=1)

    def _check_lengths(self, length: int, shown: int) -> None:
        seen = self.seen
        if self.start == 0 and length <= seen:
            raise ValueError(
                f"generate: input_ids must go on from the {seen} tokens that the cache has read; got {length} tokens in"
                f" all; {REMEDY}"
            )
        if self.start and not TAKES_NEW_TOKENS_ONLY:
            raise ValueError(
                f"generate: input_ids must be the full text on this version of transformers; got {length} tokens and "
                f"an attention_mask of {shown}; pass the {seen} tokens that the cache has read too"
            )
        if self.start and shown != seen + length:
            raise ValueError(
                f"generate: attention_mask must be as long as the {seen} tokens that the cache has read and the "
                f"{length} new ones, {seen + length}; got {shown}"
            )

    def _check_padding(self, layer: FixedSizeLayer) -> None:
        rows, B = (self.ids if self.embeds is None else self.embeds).shape[0], layer.slots.seen.shape[0]
        if rows != B:
            remedy = "cache.batch_repeat_interleave(n) makes n rows of each"
            if rows < B:
                remedy = "cache.batch_select_indices(rows) keeps some; those of a beam search are beams: begin anew"
            raise ValueError(
                f"generate: input_ids must have the {B} rows of the cache; got {rows} (with beams and "
                f"num_return_sequences); {remedy}"
            )
        if self.mask is None and not layer.slots.may_have_holes:
            return
        real = self._real(0, self.seen)
        shown = [self.seen] * rows if real is None else real.sum(-1).tolist()
        for row, (now, then) in enumerate(zip(shown, layer.tokens_of_rows(), strict=True)):
            if now != then:
                raise ValueError(
                    f"generate: attention_mask must show the tokens that the cache has read, and no others; got {now} "
                    f"of {self.seen} columns shown in row {row}, of which {then} were read as tokens; what was read "
                    "cannot be hidden: pass the mask of that time and ones for what was generated, or an empty cache"
                )

    def _check_ids(self, layer: FixedSizeLayer) -> None:
        history = layer.history
        if history is None or history.tokens != self.seen or self.start or self.embeds is not None:
            return
        real = self._real(0, self.seen)
        hashes = hash_ids(self.ids[:, : self.seen], None if real is None else real.to(self.ids.device), 0)
        if differ := (hashes != history.hashes).nonzero().flatten().tolist():
            raise ValueError(
                f"generate: input_ids must begin with the {self.seen} tokens that the cache has read, padding "
                f"included; got {self.ids.shape[1]} tokens whose first {self.seen} are others in row {differ[0]}; "
                f"{REMEDY}"
            )


def first_layer(cache: FixedSizeDynamicCache) -> FixedSizeLayer | None:
    """The first layer of ours, which keeps the history; None in a model of windows."""
    return next((layer for layer in cache.layers if isinstance(layer, FixedSizeLayer)), None)


def cache_of(model_kwargs: dict) -> FixedSizeDynamicCache | None:
    """The cache that generate() goes on with, where it is one of ours."""
    cache = model_kwargs.get(CACHE_NAME)
    return cache if isinstance(cache, FixedSizeDynamicCache) else None
