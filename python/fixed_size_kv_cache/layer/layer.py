# SPDX-License-Identifier: Apache-2.0
"""One layer of the cache: ``update`` stages new tokens, ``attend`` or ``fold`` ends the step and evicts."""

import torch
from torch import Tensor

from ..compat.transformers import SHOWS_PADDING_EVERYTHING
from . import attention, chunk, decode
from .attention import LogitRule
from .checks import HIDDEN, no_report, sizes_differ
from .new_tokens import ALL_REAL, Stage, Visibility, hides_the_past, read_mask
from .recorded import Recorded
from .state import LayerState


class FixedSizeLayer(LayerState):
    """Keeps at most ``N = settings.slots`` tokens per KV head.

    A step has two halves. ``update`` stages the new tokens and returns what attention reads. Then either ``attend``
    computes the attention, or ``fold`` takes the weights of somebody else's; both add to the scores and evict.
    """

    # ---- a step ------------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stages new tokens ``[B, H, Q, D]`` and returns the keys and values ``[B, H, T + Q, D]`` that they see.

        For one new token these are views of the slots, the new one last. They are valid until the step ends. While a
        graph is compiled these are all slots, so that shapes stay; only our attention knows which of them are empty.
        """
        if self.staged is not None:
            raise RuntimeError(no_report("update"))
        Q = key_states.shape[2]
        if Q == 0 or value_states.shape[2] != Q:
            raise ValueError(sizes_differ(key_states, value_states))
        if self.slots is None or not self.slots.fits(key_states, value_states):
            self._make_room_for(key_states, value_states)
        if self.recorded is not None and not self.record_past:
            self.crop(0)
        stage = self._stage_one if Q == 1 and not self.record_past else self._stage_many
        self.staged = stage(key_states, value_states)
        return self.staged.all_keys, self.staged.all_values

    def _stage_one(self, keys: Tensor, values: Tensor) -> Stage:
        length = self.settings.slots if torch.compiler.is_compiling() else self.tokens_folded
        T = min(length, self.settings.slots)
        return Stage(keys, values, *self.slots.put_behind(T, keys, values), 1, T, length=length)

    def _stage_many(self, keys: Tensor, values: Tensor) -> Stage:
        before = [self.slots.order(self.tokens_held), *([] if self.recorded is None else [self.recorded])]
        all_keys = torch.cat([*(x.keys for x in before), keys], dim=2)
        all_values = torch.cat([*(x.values for x in before), values], dim=2)
        Q = keys.shape[2]
        return Stage(keys, values, all_keys, all_values, Q, all_keys.shape[2] - Q)

    def _make_room_for(self, keys: Tensor, values: Tensor) -> None:
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(sizes_differ(keys, values))
        if self.slots is not None and self.tokens_seen != 0:
            held = [self.slots.seen.shape[0], self.slots.heads_held]
            raise ValueError(
                f"update: new keys must be like those in the cache, {held} of {self.dtype} on {self.device}; got "
                f"{list(keys.shape[:2])} of {keys.dtype} on {keys.device}; call reset() to begin anew"
            )
        self.lazy_initialization(keys, values)

    def attend(self, query: Tensor, mask: Tensor | None, rule: LogitRule) -> Tensor:
        """Ends the step: the attention of its queries ``[B, Hq, Q, D]``, then votes and eviction.

        Returns ``[B, Hq, Q, Dv]``. Of ``mask``, the model's, only what it says about the new tokens is read, see
        ``read_mask``.
        """
        stage = self.stage_of("attend")
        self.has_attended = True
        self._read_mask(stage, mask)
        return self.finish(stage, query, rule)

    def finish(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        """:meth:`attend` for new tokens whose mask has been read."""
        if query.dtype != self.dtype:  # under autocast
            query = query.to(self.dtype)
        if self.record_past:
            output = self._attend_recorded(stage, query, rule)
            this = Recorded(stage.keys, stage.values, query, stage.new, rule)
            self.recorded = this if self.recorded is None else self.recorded.then(this)
            self._seen += stage.queries
            self.staged = None
            return output
        self.group = query.shape[1] // stage.keys.shape[1]
        if stage.queries == 1:
            output = decode.attend(self.slots, self.settings, stage, query, rule)
        else:
            output = self._attend_many(stage, query, rule)
        self._end(stage)
        return output

    def _attend_recorded(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        """Attention to what is held, what was recorded and the new tokens; nobody votes until it is known who stays."""
        return attention.attend(query, stage.all_keys, stage.all_values, self._visibility(stage), rule, self.skipped)

    def _attend_many(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        return chunk.attend(self.slots, self.settings, stage, query, rule, self._visibility(stage), self.skipped)

    def fold(self, weights: Tensor | None) -> None:
        """Ends the step with attention weights ``[B, Hq, Q, T + Q]``; without, as if it had seen nothing."""
        stage = self.stage_of("fold")
        if self.record_past:
            raise RuntimeError(
                "fold: tokens can be taken back only where this package computes the attention; got weights while "
                "recording; call enable(model), or generate without candidates"
            )
        if weights is None:
            weights = torch.zeros((), device=self.device).expand(*stage.keys.shape[:3], stage.all_keys.shape[2])
        stage.check_weights(weights)
        self.group = weights.shape[1] // stage.keys.shape[1]
        (decode if stage.queries == 1 else chunk).fold(self.slots, self.settings, stage, weights)
        self._end(stage)

    def attention_weights(self, query: Tensor, mask: Tensor | None, rule: LogitRule) -> Tensor:
        """What ``attend`` attends with, ``[B, Hq, Q, T + Q]``, all at once. Ends nothing."""
        stage = self.stage_of("attention_weights")
        self._read_mask(stage, mask)
        _, visible = self._visibility(stage).of_block(0, stage.queries, self.device)
        products = attention.products_of(query, stage.all_keys, rule)
        return attention.attend_with_weights(query, products, stage.all_values, visible, rule, self.skipped)[1]

    def load(self, keys: Tensor, values: Tensor) -> None:
        """Takes over tokens ``[B, H, S, D]`` of another cache: score 0, positions from 0 on, cut at once."""
        if keys.shape[2]:
            self.update(keys, values)
            self.fold(None)

    def stage_of(self, who: str) -> Stage:
        """The new tokens of the step that ``who`` is to end."""
        if self.staged is None:
            raise RuntimeError(f"{who}: there are no new tokens; call update() first, once for each step")
        return self.staged

    def _read_mask(self, stage: Stage, mask: Tensor | None) -> None:
        if mask is None:
            stage.new = ALL_REAL
            return
        seen = None if torch.compiler.is_compiling() else self.tokens_seen
        stage.new = read_mask(mask, stage.keys.shape[0], stage.queries, seen, SHOWS_PADDING_EVERYTHING)

    def check_past(self, mask: Tensor) -> None:
        """Raises ValueError where the mask of a step hides tokens of earlier ones. A decode step on CUDA does not wait
        for the answer, which is an assertion of the device."""
        if torch.compiler.is_compiling():
            return
        stage, S, seen = self.stage_of("attend"), self.get_seq_length(), self.slots.seen
        if self.recorded is not None:
            valid = self.recorded.new.valid
            seen = seen + (self.recorded.tokens if valid is None else valid.sum(-1, dtype=torch.int32))
        new = read_mask(mask, stage.keys.shape[0], stage.queries, S, SHOWS_PADDING_EVERYTHING)
        hides = hides_the_past(mask, new, stage.queries, S, seen)
        if hides is None:
            return
        if stage.queries == 1 and hides.device.type == "cuda":
            torch._assert_async(~hides, HIDDEN.format("tokens"))
        elif hides:
            raise ValueError(HIDDEN.format(f"{S} tokens"))

    def _visibility(self, stage: Stage) -> Visibility:
        """Who sees whom: slots, recorded tokens, new ones."""
        held, recorded = None, self.recorded
        T = stage.held if recorded is None else stage.held - recorded.tokens
        if self.slots.may_have_holes or (recorded is not None and recorded.new.valid is not None):
            held = self.slots.read(T).positions >= 0
            held = held if recorded is None else recorded.behind(held)
        return Visibility(stage.held, stage.queries, held, stage.new)

    def _end(self, stage: Stage) -> None:
        if stage.valid is not None:
            self.slots.may_have_holes = True
        self._seen = None if torch.compiler.is_compiling() else self.tokens_seen + stage.queries
        self.slots.columns.add_(stage.queries)
        self.staged = None

    # ---- tokens taken back -------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """From now on evicts nothing before the next ``crop``, so that tokens can be taken back as if they had never
        come: what a step needs is kept, and done again with the tokens that stay. Ends with :meth:`reset` or
        :meth:`stop_past_recording`."""
        self.record_past = True

    def stop_past_recording(self) -> None:
        """What was recorded stays, and is evicted down to the size; in the midst of a step by the next ``update``."""
        self.record_past = False
        if self.staged is None:
            self.crop(0)

    def crop(self, count: int) -> None:
        """Takes the newest tokens back: ``-count`` of them, or all but ``count``. Zero keeps all and evicts.

        While recording it is exact: the cache is that of a run that never saw them. Otherwise tokens can be taken back
        until something is evicted, and what they have added to the scores of others stays.
        """
        if self.staged is not None:
            raise RuntimeError(no_report("crop"))
        if not self.is_initialized:
            return
        remove = -count if count <= 0 else max(0, self.tokens_seen - count)
        if remove:
            self.history = None
        if self.recorded is not None:
            self._crop_recorded(remove)
        elif remove:
            self._crop_slots(remove)

    def _crop_recorded(self, remove: int) -> None:
        recorded = self.recorded
        if remove > recorded.tokens:
            raise RuntimeError(
                f"crop: at most the {recorded.tokens} tokens since the last crop can be taken back; got {remove}"
            )
        self._seen -= recorded.tokens
        self.recorded = None
        if remove == recorded.tokens:
            return
        again = recorded.first(recorded.tokens - remove)
        was, self.record_past = self.record_past, False
        self.update(again.keys, again.values)
        self.staged.new = again.new
        self.finish(self.staged, again.query, again.rule)
        self.record_past = was

    def _crop_slots(self, remove: int) -> None:
        if self.tokens_seen > self.slots.least:
            raise RuntimeError(
                f"crop: tokens can be taken back only until something is evicted, up to {self.slots.least} tokens; "
                f"got {self.tokens_seen} tokens seen; call cache.activate_past_recording() before the tokens that are "
                "to be taken back, or go on from a copy of the cache, copy.deepcopy(cache)"
            )
        if self.slots.may_have_holes and not self.slots.is_ordered:  # a compiled step has put tokens into holes
            raise RuntimeError(
                "crop: tokens of a padded batch can be taken back only before a compiled step; call "
                "activate_past_recording() before these tokens come"
            )
        left = max(0, self.tokens_seen - remove)
        self.slots.crop(self.tokens_seen, left)
        self._seen = left
