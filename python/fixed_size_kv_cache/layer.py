# SPDX-License-Identifier: Apache-2.0
"""One layer of the cache: ``update`` stages new tokens, ``attend`` or ``fold`` ends the step and evicts."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import attention, score_rule
from ._compat import query_length
from .attention import LogitRule
from .column_sums import add_column_sums_
from .masks import read_mask
from .protected_spans import in_spans
from .slots import NO_REPORT, RULE_FACTS, Slots
from .stage import Recorded, Stage
from .visibility import Visibility


class FixedSizeLayer(Slots):
    """Keeps at most ``settings.slots`` tokens per KV head; :class:`Slots` describes its state.

    A step has two halves. ``update`` stages the new tokens and returns what attention reads. Then either ``attend``
    computes the attention, or ``fold`` takes the weights of somebody else's; both add to the scores and evict.
    """

    is_croppable = True

    # ---- the first half of a step, and what transformers asks --------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stages new tokens ``[B, H, Q, D]`` and returns the keys and values ``[B, H, T + Q, D]`` that they see.

        For one new token these are views of the slots, the new one last. They are valid until the step ends. While a
        graph is compiled these are all slots, so that shapes stay; only our attention knows which of them are empty.
        """
        if self.staged is not None:
            raise RuntimeError(NO_REPORT.format("update"))
        if key_states.shape[2] == 0:
            raise ValueError(
                f"update: there must be at least one new token; got keys of sizes {list(key_states.shape)}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif not self._fits(key_states, value_states):
            if self.get_seq_length() != 0:
                raise ValueError(
                    f"update: new keys must be like those in the cache, {list(self.keys.shape[:2])} of {self.dtype} on "
                    f"{self.device}; got {list(key_states.shape[:2])} of {key_states.dtype} on {key_states.device}; "
                    "call reset() to begin anew"
                )
            self.lazy_initialization(key_states, value_states)
        if self.recorded is not None and not self.record_past:
            self.crop(0)
        Q = key_states.shape[2]
        if Q == 1 and not self.record_past:
            T = self.settings.slots if torch.compiler.is_compiling() else self.held_slots
            self.keys[:, :, T : T + 1] = key_states
            self.values[:, :, T : T + 1] = value_states
            keys, values = _first(self.keys, T + 1), _first(self.values, T + 1)
        else:
            self._sort_by_position()
            T, before = self.held_slots, [] if self.recorded is None else [self.recorded]
            keys = torch.cat([self.keys[:, :, :T], *(x.keys for x in before), key_states], dim=2)
            values = torch.cat([self.values[:, :, :T], *(x.values for x in before), value_states], dim=2)
        self.staged = Stage(key_states, value_states, keys, values)
        return keys, values

    def get_seq_length(self, *args) -> int | Tensor:
        """Tokens seen, padding included; not the tokens held. While a graph is compiled it is a tensor."""
        if torch.compiler.is_compiling() and self.is_initialized:
            return self.columns_on_device
        return self.columns + (0 if self.recorded is None else self.recorded.tokens)

    def get_max_length(self) -> int:
        return -1  # tokens seen are not limited

    get_max_cache_shape = get_max_length  # its name up to 5.12

    def get_mask_sizes(self, of: int | Tensor) -> tuple[int, int | Tensor]:
        Q = query_length(of)
        if torch.compiler.is_compiling() and self.is_initialized and Q == 1:
            return self.settings.slots + 1, self.columns_on_device - self.settings.slots
        recorded = 0 if self.recorded is None else self.recorded.tokens
        return self.held_slots + recorded + Q, self.columns - self.held_slots

    def activate_past_recording(self) -> None:
        """From now on evicts nothing before the next ``crop``, so that tokens can be taken back as if they had never
        come: what a step needs is kept, and done again with the tokens that stay. Ends with ``reset`` or
        ``record_past = False``."""
        self.record_past = True

    def crop(self, count: int) -> None:
        """Takes the newest tokens back: ``-count`` of them, or all but ``count``. Zero keeps all and evicts.

        While recording it is exact: the cache is that of a run that never saw them. Otherwise tokens can be taken back
        until something is evicted, and what they have added to the scores of others stays.
        """
        if self.staged is not None:
            raise RuntimeError(NO_REPORT.format("crop"))
        if not self.is_initialized:
            return
        remove = -count if count <= 0 else max(0, self.get_seq_length() - count)
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
        self.recorded = None
        if remove == recorded.tokens:
            return
        again = recorded.first(recorded.tokens - remove)
        was, self.record_past = self.record_past, False
        self.update(again.keys, again.values)
        self.staged.new = again.new
        self._step(self.staged, again.query, again.rule)
        self.record_past = was

    def _crop_slots(self, remove: int) -> None:
        if self.columns > self.settings.slots:
            raise RuntimeError(
                f"crop: tokens can be taken back only until something is evicted, up to {self.settings.slots} tokens; "
                f"got {self.columns} tokens seen; call activate_past_recording() before these tokens come, as "
                "generate() of an enabled model does"
            )
        if self.may_have_holes and not self.is_ordered:  # a compiled step has put tokens into holes
            raise RuntimeError(
                "crop: tokens of a padded batch can be taken back only before a compiled step; call "
                "activate_past_recording() before these tokens come"
            )
        left = max(0, self.columns - remove)
        self.seen -= (self.positions[:, 0, left : self.columns] >= 0).sum(-1, dtype=torch.int32)
        self.positions[:, :, left:] = -1
        self.scores[:, :, left:] = -math.inf
        self._columns = left
        self.columns_on_device.fill_(left)

    # ---- the second half of a step -----------------------------------------------------------------------------------

    def attend(self, query: Tensor, mask: Tensor | None, rule: LogitRule) -> Tensor:
        """Ends the step: the attention of its queries ``[B, Hq, Q, D]``, as ``[B, Hq, Q, D]``, then votes and eviction.

        ``mask`` is the model's attention mask; only what it says about the new tokens is read, see ``masks.read_mask``.
        """
        stage = self._stage("attend")
        self._read_mask(stage, mask)
        return self._step(stage, query, rule)

    def fold(self, weights: Tensor | None) -> None:
        """Ends the step with attention weights ``[B, Hq, Q, T + Q]``; without, as if it had seen nothing."""
        stage = self._stage("fold")
        if self.record_past:
            raise RuntimeError(
                "fold: tokens can be taken back only where this package computes the attention; got weights while "
                "recording; call enable(model), or generate without candidates"
            )
        (B, H), Q = stage.keys.shape[:2], stage.queries
        if weights is None:
            weights = torch.zeros((), device=self.device).expand(B, H, Q, stage.all_keys.shape[2])
        _check_weights(weights, B, H, Q, stage.all_keys.shape[2], self.device)
        self.group = weights.shape[1] // H
        if Q == 1:
            new = self._write_facts(stage)
            likeness = score_rule.unit_keys(stage.keys, new["key_scales"]) @ stage.all_keys.mT
            self._fold_one(stage, new, weights, likeness[:, :, 0])
        else:
            self._fold_many(stage, functools.partial(_add_weights, weights))

    def attention_weights(self, query: Tensor, mask: Tensor | None, rule: LogitRule) -> Tensor:
        """What ``attend`` attends with, ``[B, Hq, Q, T + Q]``, all at once. Ends nothing."""
        stage = self._stage("attention_weights")
        self._read_mask(stage, mask)
        _, visible = self._visibility(stage).of_block(0, stage.queries, self.device)
        products = attention.products_of(query, stage.all_keys, rule)
        return attention.attend_with_weights(query, products, stage.all_values, visible, rule, self.skipped)[1]

    def _read_mask(self, stage: Stage, mask: Tensor | None) -> None:
        seen = None if torch.compiler.is_compiling() else self.get_seq_length()
        stage.new = read_mask(mask, stage.keys.shape[0], stage.queries, seen)

    def _step(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        if self.record_past:
            output = attention.attend(
                query, stage.all_keys, stage.all_values, self._visibility(stage), rule, self.skipped
            )
            this = Recorded(stage.keys, stage.values, query, stage.new, rule)
            self.recorded = this if self.recorded is None else self.recorded.then(this)
            self.staged = None
            return output
        self.group = query.shape[1] // stage.keys.shape[1]
        return (self._step_one if stage.queries == 1 else self._step_many)(stage, query, rule)

    def _visibility(self, stage: Stage) -> Visibility:
        T = stage.all_keys.shape[2] - stage.queries
        held = None
        if self.may_have_holes or (self.recorded is not None and self.recorded.new.valid is not None):
            held = self.positions[:, :, : min(T, self.settings.slots)] >= 0
            if self.recorded is not None:
                held, valid = held[:, :, : T - self.recorded.tokens], self.recorded.new.valid
                if valid is None:
                    valid = torch.ones(held.shape[0], self.recorded.tokens, dtype=torch.bool, device=self.device)
                held = torch.cat([held, valid[:, None].expand(-1, held.shape[1], -1)], dim=2)
        return Visibility(T, stage.queries, held, stage.new)

    # ---- one new token -----------------------------------------------------------------------------------------------

    def _step_one(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        """Attention, votes and eviction in place. Shapes and addresses are those of the step before."""
        (B, H, _, D), T = stage.keys.shape, stage.all_keys.shape[2] - 1
        new = self._write_facts(stage)
        # The new key is one more query: its products with the keys say how alike they are.
        unit_key = score_rule.unit_keys(stage.keys, new["key_scales"])
        products = (
            torch.cat([rule.scaled(query).reshape(B, H, -1, D), unit_key], dim=2) @ stage.all_keys.mT
        )  # [B, H, G + 1, T + 1]
        visible = None
        if torch.compiler.is_compiling() or stage.valid is not None or self.may_have_holes:
            visible = _first(self.positions, T + 1)[:, :, None] >= 0
            visible = visible if stage.valid is None else visible & stage.valid[:, None, None]
        output, weights, lost = attention.attend_with_weights(
            query, products[:, :, :-1], stage.all_values, visible, rule, self.skipped
        )
        if lost is not None:
            self.lost.copy_(lost.view(B, H, -1).mean(-1))
        self._fold_one(stage, new, weights, products[:, :, -1])
        return output

    def _write_facts(self, stage: Stage) -> dict[str, Tensor]:
        """What is known of the one new token before anybody votes, each ``[B, H, 1]``; into the slot where it lies."""
        new, T = self._new_facts(stage), stage.all_keys.shape[2] - 1
        # Of slot N, which is emptied in this step, only what its eviction score is made of; redundancy stays 0 there.
        for name in new if self.settings.slots > T else ("scores", "positions", "value_weights"):
            getattr(self, name)[:, :, T : T + 1] = new[name]
        return new

    def _fold_one(self, stage: Stage, new: dict[str, Tensor], weights: Tensor, likeness: Tensor) -> None:
        """``likeness`` ``[B, H, T + 1]``: the products of the keys with the new one, scaled to length 1."""
        T, valid = stage.all_keys.shape[2] - 1, stage.valid
        votes = (None, self.carry) if valid is None else score_rule.query_weights(valid, self.settings.score_decay)
        torch.ops.fsdc.accumulate_scores_(_first(self.scores, T + 1), weights, *votes)
        if self.settings.redundancy > 0:
            cosine = likeness[..., :T] * self.key_scales[:, :, :T]
            cosine = cosine if valid is None else cosine.masked_fill_(~valid[:, None], 0.0)
            self.redundancy[:, :, :T].clamp_(min=cosine.float())  # of the older tokens; pads change nothing
        self.seen += 1 if valid is None else valid.sum(-1, dtype=torch.int32)
        if self.settings.slots == T:
            self._evict_one(stage, new)
        self._end(stage)

    def _evict_one(self, stage: Stage, new: dict[str, Tensor]) -> None:
        """Moves the token of slot N onto the slot of the one that goes, an empty slot first."""
        N = self.settings.slots
        eviction = score_rule.eviction_scores(**self._facts(), seen=self.seen, settings=self.settings, group=self.group)
        victim = score_rule.least(eviction, self.positions)  # [B, H, 1]
        key_row = victim[..., None].expand_as(stage.keys)
        value_row = key_row if stage.values.shape == stage.keys.shape else victim[..., None].expand_as(stage.values)
        if self.settings.include_skipped:
            lost = self.positions.gather(2, victim) >= 0
            self._add_skipped(self.keys.gather(2, key_row), self.values.gather(2, value_row), lost)
        self.keys.scatter_(2, key_row, stage.keys)
        self.values.scatter_(2, value_row, stage.values)
        for name, x in {**new, "scores": self.scores[:, :, N:].clone()}.items():
            getattr(self, name).scatter_(2, victim, x)
        self._clear(N)
        self.is_ordered = False

    # ---- several new tokens ------------------------------------------------------------------------------------------

    def _step_many(self, stage: Stage, query: Tensor, rule: LogitRule) -> Tensor:
        visibility, skipped = self._visibility(stage), self.skipped
        output = attention.attend(query, stage.all_keys, stage.all_values, visibility, rule, skipped)

        def add_votes(scores: Tensor, query_weights: Tensor, carry: Tensor) -> None:
            lost = add_column_sums_(scores, query, stage.all_keys, visibility, rule, skipped, query_weights, carry)
            if lost is not None:
                voters = (query_weights > 0).sum(-1).clamp(min=1) * (query.shape[1] // stage.keys.shape[1])
                self.lost.copy_(lost / voters[:, None])

        self._fold_many(stage, add_votes)
        return output

    def _fold_many(self, stage: Stage, add_votes: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        B, Q, N = stage.keys.shape[0], stage.queries, self.settings.slots
        T = stage.all_keys.shape[2] - Q
        valid = torch.ones(B, Q, dtype=torch.bool, device=self.device) if stage.valid is None else stage.valid
        new = self._new_facts(stage)
        state = {name: torch.cat([getattr(self, name)[:, :, :T], x], dim=2) for name, x in new.items()}
        add_votes(state["scores"], *score_rule.query_weights(valid, self.settings.score_decay))
        if self.settings.redundancy > 0:
            old = (state[name] for name in ("redundancy", "key_scales", "positions"))
            units = score_rule.unit_keys(stage.keys, new["key_scales"])
            score_rule.raise_redundancy(*old, stage.all_keys, units, new["positions"][:, 0])
        self.seen += valid.sum(-1, dtype=torch.int32)
        keys, values = stage.all_keys, stage.all_values
        if T + Q > N:
            facts = {name: state[name] for name in RULE_FACTS}
            eviction = score_rule.eviction_scores(**facts, seen=self.seen, settings=self.settings, group=self.group)
            keys, values, kept = torch.ops.fsdc.truncate(keys, values, eviction, N)
            if self.settings.include_skipped:
                lost = (state["positions"] >= 0).scatter(2, kept, False)
                self._add_skipped(stage.all_keys, stage.all_values, lost)
            state = {name: x.gather(2, kept) for name, x in state.items()}
        held = keys.shape[2]
        for name, x in {"keys": keys, "values": values, **state}.items():
            getattr(self, name)[:, :, :held] = x
        self._clear(N)
        self._end(stage)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def load(self, keys: Tensor, values: Tensor) -> None:
        """Takes over tokens ``[B, H, S, D]`` of another cache: score 0, positions from 0 on, cut at once."""
        if keys.shape[2]:
            self.update(keys, values)
            self.fold(None)

    def _stage(self, who: str) -> Stage:
        if self.staged is None:
            raise RuntimeError(f"{who}: there are no new tokens; call update() first, once for each step")
        return self.staged

    def _end(self, stage: Stage) -> None:
        if stage.valid is not None:
            self.may_have_holes = True
        self.columns_on_device.add_(stage.queries)
        self._columns = None if torch.compiler.is_compiling() else self.columns + stage.queries
        self.staged = None

    def _new_facts(self, stage: Stage) -> dict[str, Tensor]:
        """What is known of new tokens before anybody votes, each ``[B, H, Q]``. Padding has position and score of an
        empty slot; what the user protects has all the score there is."""
        (B, H, Q), valid = stage.keys.shape[:3], stage.valid
        positions = self.seen.clone().view(B, 1)  # not the same memory: it is raised in this step
        if Q > 1 or valid is not None:
            counted = torch.ones(B, Q, dtype=torch.bool, device=self.device) if valid is None else valid
            positions = positions + counted.cumsum(-1, dtype=torch.int32) - 1
        scores = nothing = torch.zeros(B, H, Q, dtype=torch.float32, device=self.device)
        if valid is not None:
            positions = positions.masked_fill(~valid, -1)
            scores = nothing.masked_fill(~valid[:, None], -math.inf)
        if self.spans is not None:
            scores = scores.masked_fill(in_spans(self.spans, positions)[:, None], math.inf)
        return {
            "scores": scores,
            "positions": positions[:, None].expand(B, H, Q),
            "value_weights": torch.linalg.vector_norm(stage.values.float(), dim=-1),
            "redundancy": nothing,
            "key_scales": torch.linalg.vector_norm(stage.keys.float(), dim=-1).clamp_(min=1e-12).reciprocal_(),
        }

    def _facts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in RULE_FACTS}


def _first(x: Tensor, count: int) -> Tensor:
    """The first slots of a buffer ``[B, H, N + 1, ...]``; the buffer itself where these are all, for no cost."""
    return x if count == x.shape[2] else x[:, :, :count]


def _add_weights(weights: Tensor, scores: Tensor, query_weights: Tensor, carry: Tensor) -> None:
    torch.ops.fsdc.accumulate_scores_(scores, weights, query_weights, carry)


def _check_weights(weights: Tensor, B: int, H: int, Q: int, columns: int, device: torch.device) -> None:
    if weights.dim() != 4 or weights.shape[0] != B or weights.shape[1] % H != 0 or weights.device != device:
        raise ValueError(
            f"attention weights must be [B, Hq, Q, columns] with B = {B} and a multiple of the {H} KV heads on "
            f"{device}; got sizes {list(weights.shape)} on {weights.device}"
        )
    if weights.shape[2:] != (Q, columns):
        raise ValueError(
            f"attention weights must have the {Q} queries and {columns} columns of this step, as "
            f"update() returned them; got sizes {list(weights.shape)}"
        )
