# SPDX-License-Identifier: Apache-2.0
"""``enable(model)``: from here on every generate() of a model has a cache of fixed size."""

import contextlib
import warnings
from typing import Any

from ..compat.capability import check_config, check_model, text_config
from ..compat.transformers import set_implementation
from ..dynamic_cache import FixedSizeDynamicCache
from ..layer.layer import FixedSizeLayer
from ..settings import FixedSizeCacheConfig, read_settings
from . import generate_hook
from .attention_interface import NAME

__all__ = ["Enabled", "as_default", "disable", "enable"]


class Enabled(contextlib.AbstractContextManager):
    """What ``enable`` returns. As a context manager it restores at the end what was before, ``enable`` included, unless
    another came after it."""

    def __init__(self, model: Any, settings: FixedSizeCacheConfig, prefill_chunk_size: int, previous: Any) -> None:
        self.model, self.settings, self.prefill_chunk_size = model, settings, prefill_chunk_size
        self.previous = previous
        self.original = text_config(model.config)._attn_implementation

    def disable(self) -> None:
        """Restores the model's attention and generate()."""
        if generate_hook.enabled(self.model) is self:
            delattr(self.model, generate_hook.MARK)
            set_implementation(text_config(self.model.config), self.original)

    def __exit__(self, *error: Any) -> None:
        is_current = generate_hook.enabled(self.model) is self
        self.disable()
        if is_current and self.previous is not None:
            set_implementation(text_config(self.model.config), NAME)
            setattr(self.model, generate_hook.MARK, self.previous)

    def __repr__(self) -> str:
        return f"Enabled({type(self.model).__name__}, cache_size={self.settings.cache_size})"


def enable(
    model_or_pipeline: Any,
    *,
    settings: FixedSizeCacheConfig | None = None,
    prefill_chunk_size: int | None = None,
    **fields: Any,
) -> Enabled:
    """Caps the cache of every generate() of a model, from now on.

    The attention of its text decoder becomes "fsdc", and generate() makes a :class:`FixedSizeDynamicCache`. One that is
    passed as ``past_key_values`` wins; an empty ``DynamicCache`` is taken over; any other cache is an error. Without a
    cache, or with gradients, the attention is PyTorch's. Nothing of it is saved with the model.

    Args:
        model_or_pipeline: a decoder-only model that can generate, or what holds one: a pipeline, a PEFT model, a
            compiled module. Of a model for images and text the text decoder is meant.
        settings: a :class:`FixedSizeCacheConfig`; or its fields one by one:
        prefill_chunk_size: longer prompts are read in chunks of so many tokens, so that memory stays at two caches and
            a chunk. Default ``max(512, cache_size)``. Prompts with images, as embeddings, for assisted decoding, for a
            compiled generate() and for rotary embeddings that depend on the length come in one piece.
        **fields: ``cache_size``, ``sink_tokens``, ``recent_tokens``, ``score_decay``, ``score_prior``,
            ``value_weight``, ``redundancy``, ``include_skipped``, ``skipped_mode``, ``free_memory``, ``policy``.

    Returns:
        A handle: ``with enable(model): ...`` disables at the end, ``handle.disable()`` at once. A second ``enable``
        replaces the first.

    Raises:
        TypeError: for what is no model, and for unknown settings.
        ValueError: for settings out of range.
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
        >>> out.past_key_values
        FixedSizeDynamicCache(8 of 24 tokens held, cache_size=8)
        >>> handle.disable()
    """
    model = unwrap(model_or_pipeline)
    made = read_settings("enable", settings, fields)
    chunk = max(512, made.cache_size) if prefill_chunk_size is None else prefill_chunk_size
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"enable: prefill_chunk_size must be a whole number of at least 1; got {chunk!r}")
    check_config(model.config)
    check_model(model)
    cache = FixedSizeDynamicCache(config=model.config, settings=made)
    previous = generate_hook.enabled(model)
    disable(model)
    handle = Enabled(model, made, chunk, previous)
    if any(isinstance(layer, FixedSizeLayer) for layer in cache.layers):
        set_implementation(text_config(model.config), NAME)
    else:
        warnings.warn(
            f"{type(model).__name__} has no layer whose cache grows: all have a sliding window or are linear, so there "
            "is nothing to cap",
            stacklevel=2,
        )
    setattr(model, generate_hook.MARK, handle)
    return handle


def disable(model_or_pipeline: Any) -> None:
    """Restores the attention and generate() of a model. Nothing happens to one that was never enabled."""
    handle = generate_hook.enabled(unwrap(model_or_pipeline))
    if handle is not None:
        handle.disable()


class Default(contextlib.AbstractContextManager):
    """What ``as_default`` returns. As a context manager it disables at the end all models that it has enabled."""

    def __init__(self, settings: FixedSizeCacheConfig, prefill_chunk_size: int | None) -> None:
        self.settings, self.prefill_chunk_size = settings, prefill_chunk_size
        self.handles: list[Enabled] = []
        self.previous = generate_hook.DEFAULT.enable
        generate_hook.DEFAULT.enable = self._enable

    def _enable(self, model: Any) -> None:
        self.handles.append(enable(model, settings=self.settings, prefill_chunk_size=self.prefill_chunk_size))

    def disable(self) -> None:
        """Ends it, for models that were enabled by it too."""
        if generate_hook.DEFAULT.enable == self._enable:
            generate_hook.DEFAULT.enable = None
        while self.handles:
            self.handles.pop().disable()

    def __exit__(self, *error: Any) -> None:
        is_current = generate_hook.DEFAULT.enable == self._enable
        self.disable()
        if is_current:
            generate_hook.DEFAULT.enable = self.previous


def as_default(
    *, settings: FixedSizeCacheConfig | None = None, prefill_chunk_size: int | None = None, **fields: Any
) -> Default:
    """Enables every model of this process at its next generate(), pipelines included.

    Takes the arguments of :func:`enable` but for the model, and raises as that does, for a model at its generate().
    A second call replaces the first for models that come after it.

    Returns:
        A handle: ``with as_default(cache_size=1024): ...``, or ``handle.disable()``.
    """
    return Default(read_settings("as_default", settings, fields), prefill_chunk_size)


def unwrap(model_or_pipeline: Any) -> Any:
    """The model that generates, out of a pipeline, a PEFT model or a compiled module."""
    from transformers import PreTrainedModel

    model, wrapped = model_or_pipeline, True
    while wrapped:
        wrapped = False
        if hasattr(model, "_orig_mod"):  # torch.compile(model)
            model, wrapped = model._orig_mod, True
        elif hasattr(model, "get_base_model"):  # PEFT
            model, wrapped = model.get_base_model(), True
        elif not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "model", None), PreTrainedModel):
            model, wrapped = model.model, True  # a pipeline
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise TypeError(
            "enable: model_or_pipeline must be a model of transformers that can generate, or a pipeline, PEFT model or "
            f"compiled module of one; got {type(model).__name__}"
        )
    return model
