# SPDX-License-Identifier: Apache-2.0
"""The cache that users hold."""

import contextlib
import copy
import functools
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import legacy, saving
from .compat.capability import check_config, check_layers, describe
from .compat.transformers import SHOWS_PADDING_EVERYTHING, DynamicLayer, init_cache
from .contents import CacheContents
from .layer.attention import LogitRule
from .layer.handoff import HANDOFF
from .layer.layer import FixedSizeLayer
from .layer.new_tokens import read_mask
from .layer.unequal import UnequalLayer
from .settings import FixedSizeCacheConfig, read_settings

__all__ = ["FixedSizeDynamicCache"]


class FixedSizeDynamicCache(CacheContents):
    """A ``DynamicCache`` that holds at most ``cache_size`` tokens per layer and KV head.

    Those with the most accumulated attention stay, see :mod:`fixed_size_kv_cache.layer.score_rule`.
    ``get_seq_length()`` is the number of tokens seen, not of those held. All arguments are keywords; what is not given
    comes from the environment (``FSDC_KV_CACHE_SIZE``, ``FSDC_INCLUDE_SKIPPED``, ``FSDC_FREE_MEMORY``, read now) or
    from the defaults of :class:`FixedSizeCacheConfig`, which documents every one of them.

    Args:
        config: the model's config, or the model. Layers with a sliding window keep transformers' own cache, and so do
            the linear ones of hybrid models.
        settings: a :class:`FixedSizeCacheConfig`; or its fields one by one:
        **fields: ``cache_size`` (one number, or one for each layer or KV head), ``sink_tokens``, ``recent_tokens``,
            ``score_decay``, ``score_prior``, ``value_weight``, ``redundancy``, ``include_skipped``, ``skipped_mode``,
            ``free_memory``, ``static``, ``policy``.
        protected_spans: parts of the text that are never evicted, ``[(start, stop), ...]``: half-open positions of real
            tokens (padding is not counted), one list for all rows or one per row.

    Raises:
        TypeError: for positional or unknown arguments.
        ValueError: for settings out of range, spans that do not fit, and environment variables that cannot be read.
        NotImplementedError: for a model whose cache cannot be capped, with the reason.

    Example:
        >>> cache = FixedSizeDynamicCache(cache_size=16)
        >>> keys, values = cache.update(torch.ones(1, 2, 20, 4), torch.ones(1, 2, 20, 4), layer_idx=0)
        >>> weights = torch.rand(1, 4, 20, 20).tril()  # what your attention computed over these keys
        >>> keys, values = cache.cache_truncate(0, torch.ones(1, 4, 20, 4), keys, weights)
        >>> keys.shape, cache.get_seq_length()
        (torch.Size([1, 2, 16, 4]), 20)
    """

    def __init__(
        self,
        *args: Any,
        config: Any = None,
        settings: FixedSizeCacheConfig | None = None,
        protected_spans: Sequence | None = None,
        **fields: Any,
    ) -> None:
        if args and isinstance(args[0], Iterator):
            raise TypeError(
                "FixedSizeDynamicCache: caches of several replicas cannot be gathered into one, as nn.DataParallel "
                "does with its outputs; call it with use_cache=False, or generate() of its .module"
            )
        if args:
            raise TypeError(
                "FixedSizeDynamicCache takes keyword arguments only: "
                "FixedSizeDynamicCache(config=model.config, cache_size=1024)"
            )
        config = getattr(config, "config", config)  # of a model
        made = read_settings("FixedSizeDynamicCache", settings, fields)
        if config is not None:
            check_config(config)
        init_cache(self, config)
        check_layers(self.layers, config)
        self.settings, self.protected_spans = made, protected_spans
        self.stock_layers = copy.deepcopy(self.layers)  # as they were, empty
        self._check_sizes()
        self.layers = [
            self.new_layer(i) if type(layer) is DynamicLayer else layer for i, layer in enumerate(self.layers)
        ]
        self.record_past = False  # of layers that come later
        self.layer_class_to_replicate = None  # we append layers ourselves
        own = [i for i, layer in enumerate(self.layers) if isinstance(layer, FixedSizeLayer)]
        self.first_layer, self.last_layer = (own[0], own[-1]) if own else (0, None)
        self.keeps_recording = False  # the user asked for it, so generate() does not end it
        self.is_past_checked = False  # while generate() runs, which has looked at its mask at the start
        self.trained_positions = None if config is None else trained_positions(config)
        self.made_for = None if config is None else describe(config)  # for saving

    def new_layer(self, i: int) -> FixedSizeLayer:
        """An empty layer of ours with the settings of layer ``i``."""
        heads = self.settings.of_layer(i)
        if len(set(heads)) > 1:
            return UnequalLayer(heads, self.protected_spans)
        layer = FixedSizeLayer(heads[0], self.protected_spans)
        layer.head_count = len(heads) if len(heads) > 1 else None
        return layer

    def _check_sizes(self) -> None:
        """And spans, which must fit into the layers that are yet to come."""
        sizes = self.settings.cache_size
        if isinstance(sizes, int):
            self.new_layer(0)
        elif self.layers and len(sizes) != len(self.layers):
            raise ValueError(f"cache_size must have a size for each of the {len(self.layers)} layers; got {len(sizes)}")
        elif not self.layers:
            for i in range(len(sizes)):
                if sizes[i] != ():
                    self.new_layer(i)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "settings" and name in vars(self):
            raise AttributeError(
                "FixedSizeDynamicCache: settings must not be replaced, buffers and scores are made for them; make "
                "another cache"
            )
        super().__setattr__(name, value)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stages new tokens ``[B, H, Q, D]`` of a layer; returns the keys and values ``[B, H, T + Q, D]`` they see.

        After attention over these, :meth:`cache_truncate` must follow. Padding is not stored.

        Raises:
            RuntimeError: if a gradient would be needed, or nobody has reported the attention of the step before.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "FixedSizeDynamicCache: keys and values must not require gradients, there is no backward; "
                "call the model under torch.no_grad() or torch.inference_mode(), or train with use_cache=False"
            )
        if not isinstance(layer_idx, int) or layer_idx < 0:
            raise TypeError(f"update: layer_idx must be a whole number of at least 0; got {layer_idx!r}")
        while len(self.layers) <= layer_idx:
            self.layers.append(self.new_layer(len(self.layers)))
            self.layers[-1].record_past = self.record_past
        layer = self.layers[layer_idx]
        if not isinstance(layer, FixedSizeLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if value_states.dtype != key_states.dtype and torch.is_autocast_enabled(key_states.device.type):
            # Keys come rotated in float32; attention would round them, and does so for the stock cache.
            key_states = key_states.to(value_states.dtype)
        if value_states.dtype != key_states.dtype:
            if torch.promote_types(key_states.dtype, value_states.dtype) != key_states.dtype:
                raise TypeError(
                    f"update: values must have the type of keys, {key_states.dtype}, or a narrower one; got "
                    f"{value_states.dtype}"
                )
            value_states = value_states.to(key_states.dtype)
        if not torch.compiler.is_compiling():
            if layer_idx > 0:
                self._check_steps(layer_idx, key_states.shape[2])
            if layer_idx == self.last_layer and self.trained_positions is not None:
                self._check_positions(layer.tokens_seen + key_states.shape[2])
        with _without_autograd():
            keys, values = layer.update(key_states, value_states)
        HANDOFF.offer(self, layer_idx, keys)
        return keys, values

    def _check_steps(self, layer_idx: int, Q: int) -> None:
        """A forward that broke off between layers left some of them a step behind."""
        first, layer = self.layers[0], self.layers[layer_idx]
        if not isinstance(first, FixedSizeLayer):  # one of transformers' own
            first = next(x for x in self.layers if isinstance(x, FixedSizeLayer))
        if layer is first or first.staged is not None:
            return
        ahead, expected = first.tokens_seen, layer.tokens_seen + Q
        if ahead and ahead != expected:
            raise RuntimeError(
                f"update: layer {layer_idx} must have seen as many tokens as the layers before it, {ahead} with this "
                f"step; got {expected}; a forward broke off between layers: call reset() to begin anew"
            )

    def _check_positions(self, seen: int) -> None:
        if seen > self.trained_positions:
            _warn_of_positions(self.trained_positions)

    def attend(self, layer_idx: int, query_states: Tensor, attention_mask: Tensor | None, rule: LogitRule) -> Tensor:
        """Ends the step of a layer: attention of its queries ``[B, Hq, Q, D]``, then votes and eviction.

        Args:
            layer_idx: the layer, for which ``update`` was called before.
            query_states: ``[B, Hq, Q, D]``.
            attention_mask: the model's mask; only the columns of the new tokens are read, and it must not hide others.
            rule: what the model makes of ``q @ k``.

        Returns:
            The output ``[B, Hq, Q, D]``.

        Raises:
            RuntimeError: where ``update`` was not called, and where a gradient would be needed.
            ValueError: where the mask hides tokens that were read before.
        """
        HANDOFF.clear()
        if torch.is_grad_enabled() and query_states.requires_grad:
            raise RuntimeError(
                "FixedSizeDynamicCache: queries must not require gradients, there is no backward; call the model under "
                "torch.no_grad() or torch.inference_mode(), or train with use_cache=False"
            )
        layer = self._own_layer(layer_idx)
        if attention_mask is not None and layer_idx == self.first_layer and not self.is_past_checked:
            layer.check_past(attention_mask)
        with _without_autograd():
            output = layer.attend(query_states, attention_mask, rule)
        if self.settings.free_memory:
            self._free_memory(layer_idx, query_states.shape[2])
        return output

    def activate_past_recording(self) -> None:
        """Evicts nothing before the next ``crop``, so that it can take tokens back. Assisted decoding calls it, and who
        wants to take back what generate() adds: it lasts until :meth:`stop_past_recording` or :meth:`reset`."""
        self.record_past, self.keeps_recording = True, not self.is_past_checked
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def stop_past_recording(self) -> None:
        """What was recorded stays, and is evicted down to the size."""
        self.record_past = self.keeps_recording = False
        for layer in self.layers:
            if isinstance(layer, FixedSizeLayer):
                layer.stop_past_recording()

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffers. A step that broke off, or recording, ends with it too."""
        self.record_past = self.keeps_recording = False
        for i, layer in enumerate(self.layers):
            if isinstance(layer, FixedSizeLayer):
                layer.reset()
            else:  # not its own reset(): before 5.23 a window keeps its width
                self.layers[i] = copy.deepcopy(self.stock_layers[i])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to a file of safetensors, from which :meth:`load` makes it again, bit for bit: the next
        logits, all later evictions, and what generate() checks of the text that was read.

        The file takes the place of one of the same name when it is whole, so there is never half of one. It holds the
        tokens that the cache holds, the settings, and the sizes of the model, not its weights.

        Raises:
            RuntimeError: in the midst of a step, and where tokens may be taken back (``activate_past_recording``).
            ImportError: without the package safetensors.
        """
        saving.save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: Any = None, device: torch.device | str | None = None
    ) -> "FixedSizeDynamicCache":
        """Makes the cache that :meth:`save` has written.

        Args:
            path: the file.
            config: the config of the model that the cache was saved for, or the model: then it is checked that it fits.
                Needed where layers have a sliding window or are linear.
            device: where to put it. Default: where the model is, if one was given, else the CPU.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: for a file that ``save`` has not written or that was cut off, for one of a newer format, and
                where the config is that of another model.
            ImportError: without the package safetensors.
        """
        return saving.load(cls, path, config, device)

    def allow_compilation(self, allowed: bool) -> None:
        """Whether generate() may compile the decode step where it compiles those of static caches."""
        for layer in self.layers:
            if isinstance(layer, FixedSizeLayer):
                layer.allow_compilation(allowed)

    @classmethod
    def from_legacy_cache(cls, cache: Any = None, layer_idx: int | None = None) -> "FixedSizeDynamicCache":
        """Makes a cache of this class out of what transformers handed over.

        Args:
            cache: None for an empty cache; one of ours, which is returned as it is; a stock ``DynamicCache``, which is
                changed in place if it is empty, or if only layer ``layer_idx`` holds tokens, those of this step; or the
                old tuple of ``(keys, values)`` per layer, whose tokens enter with score 0 and are cut at once.
            layer_idx: the layer that is being computed.

        Raises:
            TypeError: for any other cache, naming its class and the remedy.
            ValueError: for a stock cache that already holds tokens of earlier steps.
        """
        return legacy.from_legacy_cache(cls, cache, layer_idx)

    @torch.no_grad()
    def cache_truncate(
        self,
        layer_idx: int,
        query_states: Tensor,
        key_states: Tensor,
        attn_weights: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ends the step of a layer: adds its attention to the scores and evicts down to ``cache_size``.

        Args:
            layer_idx: the layer.
            query_states: ``[B, Hq, Q, D]`` of this step.
            key_states: the keys that ``update`` returned, ``[B, H, T + Q, D]``, or repeated for each query head.
            attn_weights: the attention over them, ``[B, Hq, Q, T + Q]``; computed from queries and keys if not given.
            attention_mask: the model's mask. Padding is understood by our own ``forward`` only.

        Returns:
            The keys and values that are held, ``[B, H, min(S, cache_size), D]``: views, valid until the next step.

        Raises:
            ValueError: where the weights do not have the columns of ``update``, and where the mask shows padding.
            RuntimeError: where ``update`` was not called.
        """
        HANDOFF.clear()
        layer = self._own_layer(layer_idx)
        stage = layer.stage_of("cache_truncate")
        B, columns = stage.all_keys.shape[0], stage.all_keys.shape[2]
        if query_states.shape[0] != B or query_states.shape[2] != stage.queries:
            raise ValueError(
                f"cache_truncate: query_states must be [B, Hq, Q, D] with B = {B} and Q = {stage.queries}, the "
                f"tokens of this step; got sizes {list(query_states.shape)}"
            )
        if key_states.shape[2] != columns:
            raise ValueError(
                f"cache_truncate: key_states must have the {columns} tokens that update() returned; "
                f"got sizes {list(key_states.shape)}"
            )
        if stage.new is None:  # not our own forward
            new = read_mask(attention_mask, B, stage.queries, layer.get_seq_length(), SHOWS_PADDING_EVERYTHING)
            if new.valid is not None and not new.valid.all():
                raise ValueError(
                    "cache_truncate: attention_mask shows padding, which only our own attention understands; call "
                    "enable(model), use the forward of fixed_size_kv_cache.llama_attention, or pass one text at a time"
                )
            stage.new = new._replace(valid=None)
            if self.settings.include_skipped:
                _warn_of_entry()
        if attn_weights is None:
            layer.finish(stage, query_states, LogitRule(query_states.shape[-1] ** -0.5))
        elif attn_weights.shape[:2] != query_states.shape[:2]:
            raise ValueError(
                f"cache_truncate: attn_weights must be [B, Hq, Q, columns] with B, Hq = "
                f"{list(query_states.shape[:2])}; got sizes {list(attn_weights.shape)}"
            )
        else:
            layer.fold(attn_weights)
        held = layer.held()
        layer.last_returned = (weakref.ref(held[0]), weakref.ref(held[1]))
        if self.settings.free_memory:
            self._free_memory(layer_idx, stage.queries)
        return held

    def _free_memory(self, layer_idx: int, queries: int) -> None:
        """Once per forward, after the last layer's compaction, never in a decode step or while a graph is captured."""
        if queries == 1 or layer_idx != self.last_layer:
            return
        if self.layers[layer_idx].device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.empty_cache()


def trained_positions(config: Any) -> int | None:
    """How many tokens a model was trained to read at once, None where its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


@functools.cache
def _warn_of_positions(trained: int) -> None:
    """Once per process and length."""
    warnings.warn(
        f"this text is longer than the {trained} tokens that the model was trained to read (max_position_embeddings); "
        "a cache of fixed size bounds memory, it does not extend that",
        stacklevel=3,
    )


def _without_autograd() -> contextlib.AbstractContextManager:
    """A step is many small operations and none has a gradient: this takes a tenth off. A compiler needs no help."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


@functools.cache
def _warn_of_entry() -> None:
    """Once per process."""
    warnings.warn(
        "include_skipped: only our own attention (enable(model), or the forward of fixed_size_kv_cache.llama_attention)"
        " attends to the entry of the evicted tokens; update() does not return it to others",
        stacklevel=3,
    )
