# SPDX-License-Identifier: Apache-2.0
"""One layer of the cache: ``update`` stages new tokens, ``attend`` or ``fold`` ends the step and evicts."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from ..compat.transformers import SHOWS_PADDING_EVERYTHING, DynamicLayer, query_length
from ..settings import FixedSizeCacheConfig
from . import attention, chunk, decode
from .attention import LogitRule
from .checks import HIDDEN, make_slots, no_report, refuse_assignment, sizes_differ
from .history import History
from .new_tokens import ALL_REAL, Stage, Visibility, hides_the_past, read_mask
from .protected_spans import read_spans
from .recorded import Recorded
from .slots import Slots


class FixedSizeLayer(DynamicLayer):
    """Keeps at most ``N = settings.slots`` tokens per KV head, in :class:`Slots`.

    A step has two halves. ``update`` stages the new tokens and returns what attention reads. Then either ``attend``
    computes the attention, or ``fold`` takes the weights of somebody else's; both add to the scores and evict.
    """

    is_sliding = False
    is_croppable = True
    last_returned: tuple[weakref.ref, weakref.ref] | None = None  # the keys and values that cache_truncate returned

    def __init__(self, settings: FixedSizeCacheConfig | None = None, protected_spans: Any = None) -> None:
        super().__init__()
        self.is_initialized = False  # transformers 4.56 does not say so
        self.settings = settings or FixedSizeCacheConfig()
        self.protected_spans = read_spans(protected_spans, self.settings)
        self.group = 1  # query heads per KV head, once attention has shown it
        self.has_attended = False  # what is the same at every step has been checked
        self.is_compileable = False  # generate() compiles the steps of a cache that says yes
        self.slots: Slots | None = None
        self._forget()

    def _forget(self) -> None:
        self._seen: int | None = 0  # get_seq_length() on the host; None: only the device knows, after compiled steps
        self.staged: Stage | None = None
        self.record_past = False  # evict nothing before crop(), see activate_past_recording
        self.recorded: Recorded | None = None
        self.history: History | None = None  # the ids that generate() has read, in the first layer of a cache
        self.last_returned = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Makes the buffers for keys ``[B, H, ..., D]`` and values like these."""
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.slots = make_slots(key_states, value_states, self.settings, self.protected_spans)
        self.is_initialized = True

    # ---- what it holds -----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """The keys held ``[B, H, T, D]``, as a view; None before the first step."""
        return None if self.slots is None else self.slots.read(self.tokens_held).keys

    @property
    def values(self) -> Tensor | None:
        """The values held, as :attr:`keys`."""
        return None if self.slots is None else self.slots.read(self.tokens_held).values

    @keys.setter
    def keys(self, tensor: None) -> None:
        refuse_assignment("keys", tensor)

    @values.setter
    def values(self, tensor: None) -> None:
        refuse_assignment("values", tensor)

    @property
    def tokens_seen(self) -> int:
        """S: tokens that came, padding included. After compiled steps it waits for the device."""
        if self._seen is None:
            self._seen = int(self.slots.columns)
        return self._seen

    @property
    def tokens_recorded(self) -> int:
        """How many of them may be taken back."""
        return 0 if self.recorded is None else self.recorded.tokens

    @property
    def tokens_folded(self) -> int:
        """How many of them have been through the slots: all but those that are recorded."""
        return self.tokens_seen - self.tokens_recorded

    @property
    def tokens_held(self) -> int:
        """T: the slots in use, tokens and holes."""
        return min(self.tokens_folded, self.settings.slots)

    @property
    def skipped(self) -> attention.Skipped | None:
        """The entry of the evicted tokens, None where there can be none yet."""
        if self.slots.skipped is None or self.tokens_folded <= self.settings.slots:
            return None
        return self.slots.skipped

    @property
    def decode_path(self) -> str:
        """How steps of one token are computed: ``fused``, by one call of ``torch.ops.fsdc.decode_attention_``, or
        ``plain``, by torch's own operators (the baselines, and CUDA)."""
        if self.slots is None:
            raise RuntimeError("this layer holds nothing yet; run the model first")
        return "fused" if decode.is_fused(self.settings, self.device) else "plain"

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return 0 if self.slots is None else sum(x.nbytes for x in self.slots.tensors)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, min(S, C), D]`` that are held, as views; where the cache keeps the evicted ones and
        there are some, the last entry is their literal sum."""
        if self.slots is None:
            raise RuntimeError("this layer holds nothing yet; run the model first")
        T = self.tokens_held
        if self.skipped is not None:
            if self.staged is not None:
                raise RuntimeError(
                    "what a layer holds can be seen between steps; got new tokens of a step not yet ended"
                )
            free = self.slots.tokens  # slot N is free between steps
            free.keys[:, :, T] = self.slots.skipped.keys.to(self.dtype)
            free.values[:, :, T] = self.slots.skipped.values.to(self.dtype)
            T += 1
        held = self.slots.read(T)
        return held.keys, held.values

    def tokens_of_rows(self) -> list[int]:
        """Tokens seen of each row, padding not counted, nor those that may be taken back. Waits for the device."""
        return self.slots.seen.tolist()

    def has_holes(self) -> bool:
        """Whether padding left slots in use empty. Waits for the device."""
        return self.slots is not None and self.slots.has_holes(self.tokens_held)

    # ---- what transformers asks --------------------------------------------------------------------------------------

    def get_seq_length(self, *args) -> int | Tensor:
        """Tokens seen, padding included; not the tokens held. While a graph is compiled it is a tensor."""
        if torch.compiler.is_compiling() and self.is_initialized:
            return self.slots.columns
        return self.tokens_seen

    def get_max_length(self) -> int:
        return -1  # tokens seen are not limited

    get_max_cache_shape = get_max_length  # its name up to 5.12

    def get_mask_sizes(self, of: int | Tensor) -> tuple[int, int | Tensor]:
        Q = query_length(of)
        if torch.compiler.is_compiling() and self.is_initialized and Q == 1:
            return self.settings.slots + 1, self.slots.columns - self.settings.slots
        evicted = self.tokens_folded - self.tokens_held
        return self.tokens_seen - evicted + Q, evicted

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
        if Q == 1 and not self.record_past:
            T = self.settings.slots if torch.compiler.is_compiling() else self.tokens_held
            keys, values = self.slots.put_behind(T, key_states, value_states)
        else:
            before = [self.slots.order(self.tokens_held), *([] if self.recorded is None else [self.recorded])]
            keys = torch.cat([*(x.keys for x in before), key_states], dim=2)
            values = torch.cat([*(x.values for x in before), value_states], dim=2)
            T = keys.shape[2] - Q
        self.staged = Stage(key_states, value_states, keys, values, Q, T)
        return keys, values

    def _make_room_for(self, keys: Tensor, values: Tensor) -> None:
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(sizes_differ(keys, values))
        if self.slots is not None and self.tokens_seen != 0:
            held = list(self.slots.tokens.keys.shape[:2])
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
            output = attention.attend(
                query, stage.all_keys, stage.all_values, self._visibility(stage), rule, self.skipped
            )
            this = Recorded(stage.keys, stage.values, query, stage.new, rule)
            self.recorded = this if self.recorded is None else self.recorded.then(this)
            self._seen += stage.queries
            self.staged = None
            return output
        self.group = query.shape[1] // stage.keys.shape[1]
        if stage.queries == 1:
            output = decode.attend(self.slots, self.settings, stage, query, rule)
        else:
            visibility = self._visibility(stage)
            output = chunk.attend(self.slots, self.settings, stage, query, rule, visibility, self.skipped)
        self._end(stage)
        return output

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
        if self.tokens_seen > self.settings.slots:
            raise RuntimeError(
                f"crop: tokens can be taken back only until something is evicted, up to {self.settings.slots} tokens; "
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

    # ---- whole rows --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffers."""
        self._forget()
        if self.slots is None:
            return
        if self.slots.seen.shape[0] % len(self.protected_spans) == 0:
            self.slots.clear()
        else:  # rows were selected, so another batch is to come
            self.slots, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_rows(lambda rows: rows[indices])

    def _select_rows(self, choose) -> None:
        if self.staged is not None:
            raise RuntimeError(no_report("reorder"))
        if self.slots is None:
            return
        rows = choose(torch.arange(self.slots.seen.shape[0], device=self.device))
        self.slots.select_rows(rows)
        if self.recorded is not None:
            self.recorded = self.recorded.select_rows(rows)
        if self.history is not None:
            self.history = self.history.select_rows(rows)
        self.last_returned = None

    def offload(self) -> None:
        raise NotImplementedError(
            "FixedSizeLayer: offloading is not supported; a cache of fixed size stays on its device"
        )

    prefetch = offload

    def __deepcopy__(self, memo: dict) -> "FixedSizeLayer":
        """Also inside inference mode a copy that can be written to outside of it."""
        memo[id(self)] = copied = type(self).__new__(type(self))
        with torch.inference_mode(False):
            vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "last_returned"}
