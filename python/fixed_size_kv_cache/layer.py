# SPDX-License-Identifier: Apache-2.0
"""One layer of the cache: static slots, filled by ``update`` and pruned after attention."""

import math
import weakref

import torch
from torch import Tensor

from . import score_rule
from ._compat import DynamicLayer, query_length
from .attention import Skipped, attend
from .masks import read_mask
from .settings import Settings
from .stage import Stage

TOKEN_FACTS = ("scores", "positions", "value_weights", "redundancy")
PER_SLOT = ("keys", "values", *TOKEN_FACTS)
PER_ROW = ("seen", "skipped_keys", "skipped_values", "skipped_count")
NO_REPORT = (
    "{}: the attention of the previous step reported no scores to this cache, so it does not know what to keep. Use "
    "the forward of fixed_size_kv_cache.llama_attention, or call cache_truncate() after your attention; after an error "
    "inside a step call reset()"
)


class FixedSizeLayer(DynamicLayer):
    """Keeps at most ``settings.slots`` tokens per KV head.

    Slots ``[0, min(S, N))`` hold tokens, slot ``N`` is for the new token of a step. An empty slot (padding was never
    stored) has position -1 and score -inf. A step has two halves: ``update`` stages the new tokens and returns what
    attention reads, ``fold`` takes the attention's weights, adds them to the scores and evicts.

    State per slot, all ``[B, H, N + 1]``: ``scores`` float32, ``positions`` int32 (real tokens before it in its row),
    ``value_weights`` and ``redundancy`` float32; ``keys`` and ``values`` ``[B, H, N + 1, D]``. Per row: ``seen``
    ``[B]``.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    last_returned: tuple[weakref.ref, weakref.ref] | None = None  # the keys and values that cache_truncate returned

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.is_initialized = False
        self.settings = settings or Settings()
        self.columns = 0  # S: tokens seen, padding included
        self.group = 1  # query heads per KV head
        self.is_ordered = True  # slots are in token order
        self.may_have_holes = False  # a mask came, so some slots in use may be empty for want of a token
        self.staged: Stage | None = None

    # ---- the interface of transformers ------------------------------------------------------------------------------

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
            self.scores = torch.full((B, H, N + 1), -math.inf, **make)
            self.positions = torch.full((B, H, N + 1), -1, dtype=torch.int32, **make)
            self.value_weights = torch.zeros(B, H, N + 1, **make)
            self.redundancy = torch.zeros(B, H, N + 1, **make)
            self.seen = torch.zeros(B, dtype=torch.int32, **make)
            if self.settings.include_skipped:
                self.skipped_keys = torch.zeros(B, H, D, dtype=wide, **make)
                self.skipped_values = torch.zeros(B, H, value_states.shape[-1], dtype=wide, **make)
                self.skipped_count = torch.zeros(B, H, dtype=torch.int32, **make)
        self.is_initialized = True

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stages new tokens ``[B, H, Q, D]`` and returns the keys and values ``[B, H, T + Q, D]`` that they see.

        For one new token these are views of the slots, the new one last. They are valid until the step ends.
        """
        if self.staged is not None:
            raise RuntimeError(NO_REPORT.format("update"))
        if key_states.shape[2] == 0:
            raise ValueError(
                f"update: there must be at least one new token; got keys of sizes {list(key_states.shape)}"
            )
        if not self.is_initialized or (self.columns == 0 and not self._fits(key_states, value_states)):
            self.lazy_initialization(key_states, value_states)
        elif not self._fits(key_states, value_states):
            raise ValueError(
                f"update: new keys must be like those in the cache, {list(self.keys.shape[:2])} of {self.dtype} on "
                f"{self.device}; got {list(key_states.shape[:2])} of {key_states.dtype} on {key_states.device}; "
                "call reset() to begin anew"
            )
        T, Q = self.held_slots, key_states.shape[2]
        if Q == 1:
            self.keys[:, :, T] = key_states[:, :, 0]
            self.values[:, :, T] = value_states[:, :, 0]
            keys, values = self.keys[:, :, : T + 1], self.values[:, :, : T + 1]
        else:
            self._sort_by_position()
            keys = torch.cat([self.keys[:, :, :T], key_states], dim=2)
            values = torch.cat([self.values[:, :, :T], value_states], dim=2)
        self.staged = Stage(key_states, value_states, keys, values)
        return keys, values

    def get_seq_length(self, *args) -> int:
        """Tokens seen, padding included; not the tokens held."""
        return self.columns

    def get_max_length(self) -> int:
        return -1  # tokens seen are not limited

    get_max_cache_shape = get_max_length  # its name up to 5.12

    def get_mask_sizes(self, of: int | Tensor) -> tuple[int, int]:
        return self.held_slots + query_length(of), self.columns - self.held_slots

    def crop(self, count: int) -> None:
        """Takes the newest tokens back while nothing has been evicted: ``-count`` of them, or all but ``count``.

        What they have added to the scores of others stays.
        """
        if self.staged is not None:
            raise RuntimeError(NO_REPORT.format("crop"))
        if self.columns == 0 or count == 0:
            return
        remove = -count if count < 0 else max(0, self.columns - count)
        if remove == 0:
            return
        if self.columns > self.settings.slots:
            raise RuntimeError(
                f"crop: tokens can be taken back only until something is evicted, up to {self.settings.slots} tokens; "
                f"got {self.columns} tokens seen; use a larger cache_size, or generate without candidates"
            )
        left = max(0, self.columns - remove)
        self.seen -= (self.positions[:, 0, left : self.columns] >= 0).sum(-1, dtype=torch.int32)
        self.positions[:, :, left:] = -1
        self.scores[:, :, left:] = -math.inf
        self.columns = left

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffers."""
        self.columns, self.is_ordered, self.may_have_holes = 0, True, False
        self.staged = self.last_returned = None
        if not self.is_initialized:
            return
        self.positions.fill_(-1)
        self.scores.fill_(-math.inf)
        self.seen.zero_()
        for name in PER_ROW[1:]:
            if hasattr(self, name):
                getattr(self, name).zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._map_rows(lambda x: x[indices])

    def offload(self) -> None:
        raise NotImplementedError(
            "FixedSizeLayer: offloading is not supported; a cache of fixed size stays on its device"
        )

    prefetch = offload

    # ---- attention ---------------------------------------------------------------------------------------------------

    @property
    def held_slots(self) -> int:
        """T: the slots in use, tokens and holes."""
        return min(self.columns, self.settings.slots)

    @property
    def skipped(self) -> Skipped | None:
        """The entry of the evicted tokens, None where there can be none yet."""
        if not self.settings.include_skipped or self.columns <= self.settings.slots:
            return None
        return Skipped(self.skipped_keys, self.skipped_values, self.skipped_count, self.settings.skipped_mode)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention of the staged step's queries ``[B, Hq, Q, D]``: output and probabilities, see ``attention.attend``.

        ``mask`` is the model's attention mask; only what it says about the new tokens is read, see ``masks.read_mask``.
        """
        stage = self._stage("attend")
        stage.new = read_mask(mask, query.shape[0], stage.queries, self.columns)
        return attend(query, stage.all_keys, stage.all_values, self.visible(), scaling, self.skipped)

    def visible(self) -> Tensor | None:
        """Which of the ``T + Q`` columns each new query sees, bool broadcast to ``[B, H, Q, T + Q]``; None: all."""
        stage, T = self._stage("visible"), self.held_slots
        Q = stage.queries
        if stage.valid is None and not self.may_have_holes and Q == 1:
            return None
        if stage.new is not None and stage.new.sees is not None:
            among_new = stage.new.sees[:, None]  # [B, 1, Q, Q]
        else:
            among_new = torch.ones(Q, Q, dtype=torch.bool, device=self.device).tril()[None, None]
        old = (self.positions[:, :, None, :T] >= 0).expand(-1, -1, Q, -1)  # [B, H, Q, T]
        if stage.valid is None:
            return torch.cat([old, among_new.expand(*old.shape[:2], -1, -1)], dim=-1)
        new = among_new & stage.valid[:, None, None, :]  # [B, 1, Q, Q]
        seen = torch.cat([old, new.expand(*old.shape[:3], Q)], dim=-1)
        return seen & stage.valid[:, None, :, None]

    # ---- the second half of a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self, weights: Tensor | None) -> None:
        """Ends the step: adds the attention weights ``[B, Hq, Q, T + Q]`` to the scores and evicts what is too much.

        Without weights the step counts as if it had seen nothing.
        """
        stage = self._stage("fold")
        (B, H), Q = stage.keys.shape[:2], stage.queries
        if weights is None:
            weights = torch.zeros((), device=self.device).expand(B, H, Q, stage.all_keys.shape[2])
        if weights.dim() != 4 or weights.shape[0] != B or weights.shape[1] % H != 0 or weights.device != self.device:
            raise ValueError(
                f"attention weights must be [B, Hq, Q, columns] with B = {B} and a multiple of the {H} KV heads on "
                f"{self.device}; got sizes {list(weights.shape)} on {weights.device}"
            )
        if weights.shape[2:] != (Q, stage.all_keys.shape[2]):
            raise ValueError(
                f"attention weights must have the {Q} queries and {stage.all_keys.shape[2]} columns of this step, as "
                f"update() returned them; got sizes {list(weights.shape)}"
            )
        self.group = weights.shape[1] // H
        if stage.valid is not None:
            self.may_have_holes = True
        valid = torch.ones(B, Q, dtype=torch.bool, device=self.device) if stage.valid is None else stage.valid
        positions = self.seen[:, None] + valid.cumsum(-1, dtype=torch.int32) - 1
        positions = torch.where(valid, positions, -1)  # [B, Q]
        votes = score_rule.query_weights(valid, self.settings.score_decay)
        self.seen += valid.sum(-1, dtype=torch.int32)
        (self._fold_one if Q == 1 else self._fold_chunk)(stage, weights, valid, positions, votes)
        self.columns += Q
        self.staged = None

    def _fold_one(self, stage: Stage, weights: Tensor, valid: Tensor, positions: Tensor, votes) -> None:
        T, N = self.held_slots, self.settings.slots
        for name, x in self._new_facts(stage, valid, positions).items():
            getattr(self, name)[:, :, T : T + 1] = x
        torch.ops.fsdc.accumulate_scores_(self.scores[:, :, : T + 1], weights, *votes)
        if self.settings.redundancy > 0:
            score_rule.raise_redundancy(
                self.redundancy[:, :, :T], self.keys[:, :, :T], self.positions[:, :, :T], stage.keys, positions
            )
        if T == N:
            self._evict_one(stage)

    def _evict_one(self, stage: Stage) -> None:
        """Moves the token of slot N onto the slot of the one that goes, an empty slot first."""
        N = self.settings.slots
        victim = score_rule.least(self._eviction_scores(), self.positions)  # [B, H, 1]
        if self.settings.include_skipped:
            lost = self.positions.gather(2, victim) >= 0
            self._add_skipped(
                *(x.gather(2, victim[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (self.keys, self.values)),
                lost,
            )
        for name, new in (("keys", stage.keys), ("values", stage.values)):
            slots = getattr(self, name)
            slots.scatter_(2, victim[..., None].expand(-1, -1, -1, slots.shape[-1]), new)
        for name in TOKEN_FACTS:
            slots = getattr(self, name)
            slots.scatter_(2, victim, slots[:, :, N:].clone())
        self._clear(N)
        self.is_ordered = False

    def _fold_chunk(self, stage: Stage, weights: Tensor, valid: Tensor, positions: Tensor, votes) -> None:
        T, N, Q = self.held_slots, self.settings.slots, stage.queries
        new = self._new_facts(stage, valid, positions)
        state = {name: torch.cat([getattr(self, name)[:, :, :T], x], dim=2) for name, x in new.items()}
        torch.ops.fsdc.accumulate_scores_(state["scores"], weights, *votes)
        if self.settings.redundancy > 0:
            score_rule.raise_redundancy(state["redundancy"], stage.all_keys, state["positions"], stage.keys, positions)
        keys, values = stage.all_keys, stage.all_values
        if T + Q > N:
            eviction = score_rule.eviction_scores(**state, seen=self.seen, settings=self.settings, group=self.group)
            keys, values, kept = torch.ops.fsdc.truncate(keys, values, eviction, N)
            if self.settings.include_skipped:
                lost = (state["positions"] >= 0).scatter(2, kept, False)
                self._add_skipped(stage.all_keys, stage.all_values, lost)
            state = {name: x.gather(2, kept) for name, x in state.items()}
        held = keys.shape[2]
        for name, x in {"keys": keys, "values": values, **state}.items():
            getattr(self, name)[:, :, :held] = x
        self._clear(N)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, min(S, C), D]`` that are held; where the cache keeps the evicted ones and there are
        some, the last entry is their literal sum."""
        if not self.is_initialized:
            raise RuntimeError("this layer holds nothing yet; run the model first")
        T = self.held_slots
        keys, values = self.keys[:, :, :T], self.values[:, :, :T]
        if self.skipped is None:
            return keys, values
        return (
            torch.cat([keys, self.skipped_keys[:, :, None].to(keys.dtype)], dim=2),
            torch.cat([values, self.skipped_values[:, :, None].to(values.dtype)], dim=2),
        )

    def has_holes(self) -> bool:
        """Whether padding left slots in use empty. Waits for the device."""
        return self.may_have_holes and bool((self.positions[:, :, : self.held_slots] < 0).any())

    def load(self, keys: Tensor, values: Tensor) -> None:
        """Takes over tokens ``[B, H, S, D]`` of another cache: score 0, positions from 0 on, cut at once."""
        S = keys.shape[2]
        if S:
            self.update(keys, values)
            self.fold(None)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "last_returned"}

    def _stage(self, who: str) -> Stage:
        if self.staged is None:
            raise RuntimeError(f"{who}: there are no new tokens; call update() first, once for each step")
        return self.staged

    def _fits(self, keys: Tensor, values: Tensor) -> bool:
        return all(
            new.shape[:2] == old.shape[:2]
            and new.shape[3] == old.shape[3]
            and new.dtype == old.dtype
            and new.device == old.device
            for new, old in ((keys, self.keys), (values, self.values))
        )

    def _new_facts(self, stage: Stage, valid: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """What is known of the new tokens before anybody has voted, each ``[B, H, Q]``."""
        B, H, Q = stage.keys.shape[:3]
        return {
            "scores": torch.where(valid, 0.0, -math.inf)[:, None].expand(B, H, Q),
            "positions": positions[:, None].expand(B, H, Q),
            "value_weights": stage.values.float().norm(dim=-1),
            "redundancy": torch.zeros(B, H, Q, device=self.device),
        }

    def _eviction_scores(self) -> Tensor:
        state = {name: getattr(self, name) for name in TOKEN_FACTS}
        return score_rule.eviction_scores(**state, seen=self.seen, settings=self.settings, group=self.group)

    def _add_skipped(self, keys: Tensor, values: Tensor, lost: Tensor) -> None:
        """Adds the tokens ``[B, H, S, D]`` where ``lost`` ``[B, H, S]`` says so to the entry of the evicted ones."""
        for total, rows in ((self.skipped_keys, keys), (self.skipped_values, values)):
            total += torch.where(lost[..., None], rows.to(total.dtype), 0).sum(2)
        self.skipped_count += lost.sum(-1, dtype=torch.int32)

    def _clear(self, slot: int) -> None:
        self.positions[:, :, slot] = -1
        self.scores[:, :, slot] = -math.inf

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

    def _map_rows(self, change) -> None:
        """Applies a selection of batch rows to all state, in place where the batch size stays."""
        if self.staged is not None:
            raise RuntimeError(NO_REPORT.format("reorder"))
        for name in (*PER_SLOT, *(name for name in PER_ROW if hasattr(self, name))):
            old = getattr(self, name)
            with torch.inference_mode(False):
                new = change(old)
                if new.shape == old.shape:
                    old.copy_(new)
                else:
                    setattr(self, name, new)
        self.last_returned = None
