# SPDX-License-Identifier: Apache-2.0
"""What a layer of the cache holds, what transformers asks of it, and what is done to whole rows of it."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from ..compat.transformers import DynamicLayer, query_length
from ..settings import FixedSizeCacheConfig
from . import attention, decode
from .checks import no_report, refuse_assignment
from .history import History
from .new_tokens import Stage
from .protected_spans import read_spans
from .recorded import Recorded
from .slots import Slots, Tokens


class LayerState(DynamicLayer):
    """At most ``N = settings.slots`` tokens per KV head in :class:`Slots`, and the new ones of a step under way."""

    is_sliding = False
    is_croppable = True
    last_returned: tuple[weakref.ref, weakref.ref] | None = None  # the keys and values that cache_truncate returned

    def __init__(self, settings: FixedSizeCacheConfig | None = None, protected_spans: Any = None) -> None:
        super().__init__()
        self.is_initialized = False  # transformers 4.56 does not say so
        self.settings = settings or FixedSizeCacheConfig()
        self.protected_spans = read_spans(protected_spans, self.settings)
        self.head_count: int | None = None  # KV heads that there must be
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
        self.slots = self._make_slots(key_states, value_states, self.settings.static or self.is_compileable)
        self.is_initialized = True

    def _make_slots(self, keys: Tensor, values: Tensor, at_full_size: bool) -> Slots:
        self.heads_here(keys.shape[1])
        return Slots(keys, values, self.settings, self.protected_spans, at_full_size)

    def rows_of(self, H: int, T: int) -> tuple[int, ...]:
        """Sizes of the positions of ``T`` tokens between batch and end, as :class:`Slots` has them."""
        return H, T

    def heads_here(self, H: int) -> slice:
        """Which of the KV heads that ``cache_size`` has sizes for are the ``H`` of this layer: all of them, or the part
        of this process where they are shared out among processes."""
        if self.head_count in (None, H):
            return slice(None)
        is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_shared and H * torch.distributed.get_world_size() == self.head_count:
            first = H * torch.distributed.get_rank()
            return slice(first, first + H)
        raise ValueError(f"cache_size must have a size for each of the {H} KV heads; got {self.head_count}")

    def allow_compilation(self, allowed: bool) -> None:
        """Whether generate() may compile its steps, for which the buffers must have their full size."""
        self.is_compileable = allowed
        if allowed and self.slots is not None:
            self.slots.make_room(self.settings.slots)

    # ---- what it holds -----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """The keys held ``[B, H, T, D]``, as a view; None before the first step."""
        return None if self.slots is None else self._rectangle("keys").keys

    @property
    def values(self) -> Tensor | None:
        """The values held, as :attr:`keys`."""
        return None if self.slots is None else self._rectangle("values").values

    @keys.setter
    def keys(self, tensor: None) -> None:
        refuse_assignment("keys", tensor)

    @values.setter
    def values(self, tensor: None) -> None:
        refuse_assignment("values", tensor)

    def _rectangle(self, what: str) -> Tokens:
        """The tokens held ``[B, H, T, ...]``."""
        return self.slots.read(self.tokens_held)

    @property
    def positions(self) -> Tensor:
        """The positions of the tokens held, int32 ``[B, H, T]``, -1 for empty slots."""
        return self.slots.read(self.tokens_held).positions

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
        if self.slots.skipped is None or self.tokens_folded <= self.slots.least:
            return None
        return self.slots.skipped

    @property
    def decode_path(self) -> str:
        """How steps of one token are computed: ``fused``, by one call of ``torch.ops.fsdc.decode_attention_``, or
        ``plain``, by torch's own operators (the baselines)."""
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

    def __deepcopy__(self, memo: dict) -> "LayerState":
        """Also inside inference mode a copy that can be written to outside of it."""
        memo[id(self)] = copied = type(self).__new__(type(self))
        with torch.inference_mode(False):
            vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "last_returned"}
