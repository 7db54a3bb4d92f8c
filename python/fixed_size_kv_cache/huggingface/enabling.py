# SPDX-License-Identifier: Apache-2.0
"""``enable(model)``: from here on every generate() of a model has a cache of fixed size."""

import contextlib
import os
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from ..compat.capability import check_config, check_model, text_config
from ..dynamic_cache import FixedSizeDynamicCache
from ..head_profile import HeadProfile
from ..layer.layer import FixedSizeLayer
from ..settings import FixedSizeCacheConfig, read_settings
from . import generate_hook, marks, own_cache
from .head_sizes import with_profile
from .kept_profiles import kept_profile
from .marks import Cap
from .unwrapping import unwrap, virtual_tokens

__all__ = ["Enabled", "as_default", "disable", "enable"]


ENDED = "with: the handle must not have ended, nothing would be capped; got one that has; call {} again"


class Enabled(contextlib.AbstractContextManager["Enabled"]):
    """What ``enable`` returns: one cap of a model, which ends with the block or with :meth:`disable`, whatever other
    blocks begin or end meanwhile, in whatever thread. It does not keep the model alive."""

    def __init__(self, model: Any, cap: Cap) -> None:
        self._model, self._cap = weakref.ref(model), cap
        self._name = type(model).__name__

    @property
    def settings(self) -> FixedSizeCacheConfig:
        return self._cap.settings

    @property
    def prefill_chunk_size(self) -> int:
        return self._cap.prefill_chunk_size

    def disable(self) -> None:
        """Ends this cap. The one before it counts then; after the last one the model is as it was."""
        model = self._model()
        if model is not None:
            marks.remove(model, self._cap)

    def __enter__(self) -> "Enabled":
        model = self._model()
        if model is None or not marks.holds(model, self._cap):
            raise RuntimeError(ENDED.format("enable(model, ...)"))
        return self

    def __exit__(self, *error: Any) -> None:
        self.disable()

    def __repr__(self) -> str:
        size = self.settings.average_size
        on_average = "" if size == self.settings.cache_size else " on average"
        return f"Enabled({self._name}, cache_size={size}{on_average})"


def enable(
    model_or_pipeline: Any,
    cache_size: int | Sequence[int | Sequence[int] | None] | None = None,
    *,
    settings: FixedSizeCacheConfig | None = None,
    prefill_chunk_size: int | None = None,
    head_profile: HeadProfile | str | os.PathLike | bool | None = None,
    head_floor: float = 0.25,
    max_tokens: int | None = None,
    **fields: Any,
) -> Enabled:
    """Caps the cache of every generate() of a model, from now on.

    The attention of its text decoder becomes "fsdc", and generate() makes a :class:`FixedSizeDynamicCache`. One that is
    passed as ``cache`` (``past_key_values`` before transformers 5.24) wins; an empty ``DynamicCache`` is taken over,
    any other cache is an error. ``model(ids)`` without gradients returns one too; what is read in one call sees all of
    it. Without a cache, or with gradients, the attention is PyTorch's. Nothing of it is saved with the model.

    Args:
        model_or_pipeline: a decoder-only model that can generate, or what holds one: a pipeline, a PEFT model, a
            compiled or parallel module. Of a model for images and text the text decoder is meant.
        cache_size: tokens per layer and KV head: one number, or one for each layer or for each KV head of each layer.
        settings: a :class:`FixedSizeCacheConfig`; or its fields one by one:
        prefill_chunk_size: longer prompts are read in chunks of so many tokens, so that memory stays at two caches and
            a chunk. Default ``max(1024, cache_size)``. Prompts with images, as embeddings, for assisted decoding, for a
            compiled generate() and for rotary embeddings that depend on the length come in one piece.
        head_profile: a :class:`HeadProfile` of the model, or its file (``profile_heads``, ``fsdc profile``): then
            ``cache_size`` is the average over all KV heads, and those that err more with few tokens get more of it.
            ``True``: one by random ids, made now and kept in a folder (``FSDC_PROFILES``, default
            ``~/.cache/fixed_size_kv_cache/profiles``) for the next time.
        head_floor: the share of ``cache_size`` that every head has then.
        max_tokens: no head gets more then, such as the longest text there will be.
        **fields: ``sink_tokens``, ``recent_tokens``, ``score_decay``, ``score_prior``,
            ``value_weight``, ``redundancy``, ``include_skipped``, ``skipped_mode``, ``free_memory``, ``static``,
            ``policy``.

    Returns:
        A handle: ``with enable(model): ...`` ends at the end of the block, ``handle.disable()`` at once. Of several the
        last counts, until it ends; ``disable(model)`` ends all of them.

    Raises:
        TypeError: for what is no model, and for unknown settings.
        ValueError: for settings out of range, and for the profile of another model.
        NotImplementedError: for a model whose cache cannot be capped, with the reason.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> handle = enable(model, cache_size=8)
        >>> out = model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=20, return_dict_in_generate=True,
        ...                      eos_token_id=None, pad_token_id=0)
        >>> out.cache
        FixedSizeDynamicCache(8 of 24 tokens held, cache_size=8)
        >>> handle.disable()
    """
    model = unwrap(model_or_pipeline, "enable")
    made = read_settings("enable", settings, _with_size(cache_size, fields))
    chunk = made.prefill_chunk_size if prefill_chunk_size is None else prefill_chunk_size
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"enable: prefill_chunk_size must be a whole number of at least 1; got {chunk!r}")
    check_config(model.config)
    check_model(model)
    if head_profile is True:
        head_profile = kept_profile(model)
    if head_profile is not None and head_profile is not False:
        made = with_profile(made, head_profile, head_floor, max_tokens, model.config)
    cache = FixedSizeDynamicCache(config=model.config, settings=made)
    has_effect = any(isinstance(layer, FixedSizeLayer) for layer in cache.layers)
    cap = Cap(made, chunk, has_effect, virtual_tokens(model_or_pipeline))
    if not cap.has_effect:
        warnings.warn(
            f"{type(model).__name__} has no layer whose cache grows: all have a sliding window or are linear, so there "
            "is nothing to cap",
            stacklevel=2,
        )
    marks.add(model, cap)
    own_cache.install(model, text_config(model.config))
    return Enabled(model, cap)


def disable(model_or_pipeline: Any) -> None:
    """Ends every ``enable`` of a model: its attention and generate() are as before. One that was never enabled stays as
    it is."""
    marks.remove(unwrap(model_or_pipeline, "enable"))


class Default(contextlib.AbstractContextManager["Default"]):
    """What ``as_default`` returns. At its end the models that it has enabled are as before."""

    def __init__(self, settings: FixedSizeCacheConfig, prefill_chunk_size: int | None) -> None:
        self.settings, self.prefill_chunk_size = settings, prefill_chunk_size
        self._enabled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # models and their handles
        self._enable = self._enable_model  # one object, to be found again
        with marks.LOCK:
            generate_hook.DEFAULTS.append(self._enable)

    def _enable_model(self, model: Any) -> None:
        """Whatever comes to generate() in this process; a model that cannot be capped goes on as it is."""
        with marks.LOCK:
            if self._enable not in generate_hook.DEFAULTS or self._enabled.get(model, self) is None:
                return  # it has ended, or the model could not be capped
            try:
                generate_hook.check_adapter(model)
                handle = enable(model, settings=self.settings, prefill_chunk_size=self.prefill_chunk_size)
            except NotImplementedError as error:
                handle = None
                warnings.warn(
                    f"as_default: {type(model).__name__} keeps transformers' own cache: {error}", stacklevel=2
                )
            self._enabled[model] = handle

    def disable(self) -> None:
        """Ends it, for models that were enabled by it too."""
        with marks.LOCK:
            generate_hook.DEFAULTS[:] = [other for other in generate_hook.DEFAULTS if other is not self._enable]
            handles = [handle for handle in self._enabled.values() if handle is not None]
            self._enabled.clear()
        for handle in handles:
            handle.disable()

    def __enter__(self) -> "Default":
        if self._enable not in generate_hook.DEFAULTS:
            raise RuntimeError(ENDED.format("as_default(...)"))
        return self

    def __exit__(self, *error: Any) -> None:
        self.disable()


def as_default(
    cache_size: int | None = None,
    *,
    settings: FixedSizeCacheConfig | None = None,
    prefill_chunk_size: int | None = None,
    **fields: Any,
) -> Default:
    """Enables every model of this process at its next generate(), pipelines included.

    Takes the arguments of :func:`enable` but for the model. A model that cannot be capped keeps its own cache, and a
    warning says why. Of several the last counts for models that come after it, until it ends.

    Returns:
        A handle: ``with as_default(cache_size=1024): ...``, or ``handle.disable()``.
    """
    return Default(read_settings("as_default", settings, _with_size(cache_size, fields)), prefill_chunk_size)


def _with_size(cache_size: int | None, fields: dict) -> dict:
    return fields if cache_size is None else {"cache_size": cache_size, **fields}
