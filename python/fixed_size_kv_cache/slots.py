# SPDX-License-Identifier: Apache-2.0
"""The state of one layer: static buffers, and what happens to whole rows and slots of them."""

import copy
import math
import weakref

import torch
from torch import Tensor

from ._compat import DynamicLayer
from .attention import Skipped
from .protected_spans import read_spans, spans_as_tensor
from .settings import FixedSizeCacheConfig
from .stage import Recorded, Stage

RULE_FACTS = ("scores", "positions", "value_weights", "redundancy")  # what the eviction score is made of
TOKEN_FACTS = (*RULE_FACTS, "key_scales")
PER_SLOT = ("keys", "values", *TOKEN_FACTS)
SKIPPED = ("skipped_keys", "skipped_values", "skipped_count", "lost")
PER_ROW = ("seen", "carry", "spans", *SKIPPED)
NO_REPORT = (
    "{}: the attention of the previous step reported no scores to this cache, so it does not know what to keep. Call "
    "enable(model), use the forward of fixed_size_kv_cache.llama_attention, or call cache_truncate() after your "
    "attention; after an error inside a step call reset()"
)


class Slots(DynamicLayer):
    """At most ``N = settings.slots`` tokens per KV head.

    Slots ``[0, min(S, N))`` hold tokens, slot ``N`` is for the new token of a step. An empty slot (padding was never
    stored) has position -1 and score -inf; what else it holds means nothing.

    State per slot, all ``[B, H, N + 1]``: ``scores`` float32, ``positions`` int32 (real tokens before it in its row),
    ``value_weights``, ``redundancy`` and ``key_scales`` (1 over the norm of the key) float32; ``keys`` and ``values``
    ``[B, H, N + 1, D]``. Per row: ``seen`` int32 ``[B]``, and the entry of the evicted tokens. None of them moves in
    memory while the batch stays.
    """

    is_sliding = False
    last_returned: tuple[weakref.ref, weakref.ref] | None = None  # the keys and values that cache_truncate returned

    def __init__(self, settings: FixedSizeCacheConfig | None = None, protected_spans=None) -> None:
        super().__init__()
        self.is_initialized = False
        self.settings = settings or FixedSizeCacheConfig()
        self.protected_spans = read_spans(protected_spans, self.settings)
        self.group = 1  # query heads per KV head, once attention has shown it
        self.is_compileable = False  # generate() compiles the steps of a cache that says yes
        self._forget()

    def _forget(self) -> None:
        self._columns: int | None = 0  # S on the host; None: only the device knows, after compiled steps
        self.is_ordered = True  # slots are in token order
        self.may_have_holes = False  # a mask came, so some slots in use may be empty for want of a token
        self.staged: Stage | None = None
        self.record_past = False  # evict nothing before crop(), see activate_past_recording
        self.recorded: Recorded | None = None
        self.last_returned = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        value_states = key_states if value_states is None else value_states
        B, H, _, D = key_states.shape
        N = self.settings.slots
        self.dtype, self.device = key_states.dtype, key_states.device
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # or they could not be written to outside of it
            make = {"device": self.device}
            self.keys = torch.zeros(B, H, N + 1, D, dtype=self.dtype, **make)
            self.values = torch.zeros(B, H, N + 1, value_states.shape[-1], dtype=self.dtype, **make)
            self.scores = torch.full((B, H, N + 1), -math.inf, dtype=torch.float32, **make)
            self.positions = torch.full((B, H, N + 1), -1, dtype=torch.int32, **make)
            for name in ("value_weights", "redundancy", "key_scales"):
                setattr(self, name, torch.zeros(B, H, N + 1, dtype=torch.float32, **make))
            self.seen = torch.zeros(B, dtype=torch.int32, **make)
            self.columns_on_device = torch.zeros((), dtype=torch.int64, **make)
            self.carry = torch.full((B,), self.settings.score_decay, dtype=torch.float32, **make)  # for one query
            self.spans = spans_as_tensor(self.protected_spans, B, self.device)
            if self.settings.include_skipped:
                self.skipped_keys = torch.zeros(B, H, D, dtype=wide, **make)
                self.skipped_values = torch.zeros(B, H, value_states.shape[-1], dtype=wide, **make)
                self.skipped_count = torch.zeros(B, H, dtype=torch.int32, **make)
                self.lost = torch.zeros(B, H, dtype=torch.float32, **make)  # share of the last step's attention
        self.is_initialized = True

    @property
    def columns(self) -> int:
        """S: tokens that were folded into the slots, padding included. After compiled steps it waits for the device."""
        if self._columns is None:
            self._columns = int(self.columns_on_device)
        return self._columns

    @property
    def held_slots(self) -> int:
        """T: the slots in use, tokens and holes."""
        return min(self.columns, self.settings.slots)

    @property
    def skipped(self) -> Skipped | None:
        """The entry of the evicted tokens, None where there can be none yet."""
        if not self.settings.include_skipped:
            return None
        if not torch.compiler.is_compiling() and self.columns <= self.settings.slots:
            return None
        return Skipped(self.skipped_keys, self.skipped_values, self.skipped_count, self.settings.skipped_mode)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, min(S, C), D]`` that are held, as views; where the cache keeps the evicted ones and
        there are some, the last entry is their literal sum."""
        if not self.is_initialized:
            raise RuntimeError("this layer holds nothing yet; run the model first")
        T = self.held_slots
        if self.skipped is not None:
            if self.staged is not None:
                raise RuntimeError(
                    "what a layer holds can be seen between steps; got new tokens of a step not yet ended"
                )
            self.keys[:, :, T] = self.skipped_keys.to(self.dtype)  # slot N is free between steps
            self.values[:, :, T] = self.skipped_values.to(self.dtype)
            T += 1
        return self.keys[:, :, :T], self.values[:, :, :T]

    def has_holes(self) -> bool:
        """Whether padding left slots in use empty. Waits for the device."""
        return self.may_have_holes and bool((self.positions[:, :, : self.held_slots] < 0).any())

    # ---- whole rows --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffers."""
        self._forget()
        if not self.is_initialized:
            return
        self.positions.fill_(-1)
        self.scores.fill_(-math.inf)
        for name in ("seen", "columns_on_device", *SKIPPED):
            if hasattr(self, name):
                getattr(self, name).zero_()
        self.is_initialized = self.seen.shape[0] % len(self.protected_spans) == 0  # else another batch is to come
        if self.is_initialized:
            self.spans = spans_as_tensor(self.protected_spans, self.seen.shape[0], self.device)  # rows were reordered

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._map_rows(lambda x: x[indices])

    def _map_rows(self, change) -> None:
        """Applies a selection of batch rows to all state, in place where the batch size stays."""
        if self.staged is not None:
            raise RuntimeError(NO_REPORT.format("reorder"))
        for name in (*PER_SLOT, *PER_ROW):
            old = getattr(self, name, None)
            if old is None:
                continue
            with torch.inference_mode(False):
                new = change(old)
                if new.shape == old.shape:
                    old.copy_(new)
                else:
                    setattr(self, name, new)
        if self.recorded is not None:
            self.recorded = self.recorded.map_rows(change)
        self.last_returned = None

    def offload(self) -> None:
        raise NotImplementedError(
            "FixedSizeLayer: offloading is not supported; a cache of fixed size stays on its device"
        )

    prefetch = offload

    # ---- whole slots -------------------------------------------------------------------------------------------------

    def _clear(self, slot: int) -> None:
        self.positions[:, :, slot].fill_(-1)
        self.scores[:, :, slot].fill_(-math.inf)

    def _sort_by_position(self) -> None:
        if self.is_ordered:
            return
        T = self.held_slots
        order = self.positions[:, :, :T].argsort(dim=-1, stable=True)
        for name in PER_SLOT:
            slots = getattr(self, name)[:, :, :T]
            index = order[..., None].expand_as(slots) if slots.dim() == 4 else order
            slots.copy_(slots.gather(2, index))
        self.is_ordered = True

    def _add_skipped(self, keys: Tensor, values: Tensor, lost: Tensor) -> None:
        """Adds the tokens ``[B, H, S, D]`` where ``lost`` ``[B, H, S]`` says so to the entry of the evicted ones."""
        for total, rows in ((self.skipped_keys, keys), (self.skipped_values, values)):
            total += torch.where(lost[..., None], rows.to(total.dtype), 0).sum(2)
        self.skipped_count += lost.sum(-1, dtype=torch.int32)

    def _fits(self, keys: Tensor, values: Tensor) -> bool:
        return all(
            new.shape[:2] == old.shape[:2]
            and new.shape[3] == old.shape[3]
            and new.dtype == old.dtype
            and new.device == old.device
            for new, old in ((keys, self.keys), (values, self.values))
        )

    def __deepcopy__(self, memo: dict) -> "Slots":
        """Also inside inference mode a copy that can be written to outside of it."""
        memo[id(self)] = copied = type(self).__new__(type(self))
        with torch.inference_mode(False):
            vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "last_returned"}
