# SPDX-License-Identifier: Apache-2.0
"""Where generate() of transformers makes its cache: the place at which an enabled model gets one of ours.

Importing puts one hook after ``GenerationMixin._prepare_cache_for_generation``, which does nothing for models that are
neither enabled nor of the attention implementation "fsdc", and one around each way to generate, for our caches only.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled

from .. import legacy
from ..compat.capability import check_made_for, is_prefix_tuning, reads_in_one_piece, text_config
from ..compat.transformers import (
    CACHE_NAME,
    CHUNKS_FORGET_EARLIER_TURNS,
    CHUNKS_FORGET_PADDING,
    DynamicCache,
    is_assisted,
    prompt_length,
)
from ..dynamic_cache import FixedSizeDynamicCache
from ..settings import CACHE_SIZE, FixedSizeCacheConfig
from . import attention_interface  # noqa: F401  registers the attention
from .assisted import skip_what_was_read
from .causes import changed_attention, shared_config
from .handed_over import Given, cache_of
from .marks import NAME, RUNNING, enabled, enabled_with

REMEDY = f"pass {CACHE_NAME}=FixedSizeDynamicCache(config=model.config), or nothing"
OTHER_CACHE = (
    f'generate: the cache of a model with "{NAME}" attention must be a FixedSizeDynamicCache or an empty DynamicCache; '
    "got {}; {}, or call disable(model)"
)
TEXT_INPUTS = {"attention_mask", "position_ids", "cache_position", "token_type_ids", CACHE_NAME}


DEFAULTS: list[Callable[[Any], None]] = []  # what as_default has set: functions that enable a model; the last counts


def _is_capped(model: Any) -> bool:
    """Whether the cache of a model must be one of ours."""
    cap = enabled(model)
    return cap.has_effect if cap is not None else text_config(model.config)._attn_implementation == NAME


def _check_kind(model: Any, generation_config: Any) -> None:
    """Before transformers makes a cache: what it would make, or be given, that cannot be one of ours."""
    asked_for = generation_config.cache_implementation
    if asked_for is not None and ("offloaded" in asked_for or "quantized" in asked_for):
        raise TypeError(OTHER_CACHE.format(f"cache_implementation={asked_for!r}", "leave it away"))
    check_adapter(model)


def check_adapter(model: Any) -> None:
    """Raises NotImplementedError where generate() of PEFT's prefix tuning runs this one."""
    tuned = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)  # PEFT sets it meanwhile
    if is_prefix_tuning(getattr(tuned, "active_peft_config", None)):
        raise NotImplementedError(
            "generate: every token of the cache must have been read by the model; got prefix tuning of PEFT, which "
            "brings virtual ones in a cache of its own; call disable(model)"
        )


def _prepare(model: Any, generation_config: Any, model_kwargs: dict, arguments: tuple) -> None:
    """After transformers has made a cache, or taken the user's: what an enabled model goes on with."""
    if cause := changed_attention(model):
        raise RuntimeError(f"generate: {cause}")
    cache = model_kwargs.get(CACHE_NAME)
    use_cache = model_kwargs.get("use_cache")
    use_cache = generation_config.use_cache if use_cache is None else use_cache
    if cache is None:
        if use_cache:
            raise NotImplementedError(
                f"generate: transformers must make the cache; it makes none for {type(model).__name__}, which has "
                "one of its own; call disable(model)"
            )
        return
    if generation_config.guidance_scale not in (None, 1):
        raise NotImplementedError(
            f'generate: guidance_scale must be 1 with "{NAME}" attention; got {generation_config.guidance_scale}, '
            "which runs the model on a second cache that generate() does not make; call disable(model)"
        )
    if isinstance(cache, FixedSizeDynamicCache):
        if use_cache is False:
            raise ValueError("generate: use_cache must be True with a FixedSizeDynamicCache; got False; leave one away")
        check_made_for(cache, model.config)
    elif type(cache) is not DynamicCache:
        asked_for = generation_config.cache_implementation
        remedy = REMEDY if asked_for is None else f"leave cache_implementation={asked_for!r} away"
        raise TypeError(OTHER_CACHE.format(f"a {type(cache).__name__}", remedy))
    else:
        legacy.adopt_empty(cache, FixedSizeDynamicCache(config=model.config, settings=_settings(model)))
    assisted = is_assisted(generation_config, arguments)
    if assisted:
        if cache.keeps_recording:
            raise ValueError(
                "generate: assisted decoding takes tokens back itself, so what it adds cannot be taken back later; go "
                "on from a copy of the cache, copy.deepcopy(cache), instead of activate_past_recording()"
            )
        cache.activate_past_recording()
        cache.keeps_recording = False
    elif not cache.keeps_recording:
        cache.stop_past_recording()
    cache.allow_compilation(generation_config.compile_config is not None)
    _choose_chunks(model, generation_config, model_kwargs, assisted)


def _settings(model: Any) -> FixedSizeCacheConfig:
    """Of an enabled model, or from the environment where only the attention was set."""
    cap = enabled(model)
    if cap is not None:
        return cap.settings
    if owners := enabled_with(text_config(model.config)):
        raise RuntimeError(f"generate: {type(model).__name__} is not enabled, but {shared_config(owners[0])}")
    if CACHE_SIZE not in os.environ:
        raise RuntimeError(
            f'generate: a model with attn_implementation="{NAME}" must be told the size of its cache; call '
            f"enable(model, cache_size=...), set {CACHE_SIZE}, or pass {CACHE_NAME}=FixedSizeDynamicCache("
            "config=model.config, cache_size=...)"
        )
    return FixedSizeCacheConfig()


def _choose_chunks(model: Any, generation_config: Any, model_kwargs: dict, assisted: bool) -> None:
    """Sets the chunks that the prompt is read in, in this call's own copy of the config."""
    mask, seen = model_kwargs.get("attention_mask"), model_kwargs[CACHE_NAME].get_seq_length()
    naive = (CHUNKS_FORGET_EARLIER_TURNS and seen > 0) or (
        CHUNKS_FORGET_PADDING and mask is not None and not bool(mask.all())
    )
    if generation_config.prefill_chunk_size is not None:
        if naive:
            raise ValueError(
                "generate: prefill_chunk_size must be None on this version of transformers with padding or tokens of "
                f"an earlier turn, which it would read wrongly; got {generation_config.prefill_chunk_size}; update "
                "transformers"
            )
        return
    cap, settings = enabled(model), model_kwargs[CACHE_NAME].settings
    chunk = settings.prefill_chunk_size if cap is None else cap.prefill_chunk_size
    if (
        naive
        or reads_in_one_piece(model.config)
        or assisted
        or not _is_text_only(model_kwargs)
        or generation_config.compile_config is not None
    ):
        return  # in one piece
    if prompt_length(generation_config, model_kwargs) > chunk and not processes_meet_in(model):
        generation_config.prefill_chunk_size = chunk


def processes_meet_in(model: Any) -> bool:
    """Whether each forward gathers weights from other processes (FSDP, ZeRO-3): then all must run equally many, and
    prompts of different lengths would have different numbers of chunks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    is_sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return torch.distributed.get_world_size() > 1 and (is_sharded or is_deepspeed_zero3_enabled())


def _is_text_only(model_kwargs: dict) -> bool:
    """Whether nothing but tokens came. Images, in whatever form, may see each other across the edge of a chunk."""
    others = [value for name, value in model_kwargs.items() if name not in TEXT_INPUTS]
    return not any(isinstance(x, Tensor) or (x and not isinstance(x, (bool, int, float, str))) for x in others)


def _install() -> None:
    original = GenerationMixin._prepare_cache_for_generation

    @functools.wraps(original)
    def prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any):
        if enabled(self) is None:
            for enable in DEFAULTS[-1:]:
                enable(self)
        is_capped = _is_capped(self)
        if is_capped:
            _check_kind(self, generation_config)
        result = original(self, generation_config, model_kwargs, *args, **kwargs)
        if is_capped:
            _prepare(self, generation_config, model_kwargs, (*args, *kwargs.values()))
        return result

    GenerationMixin._prepare_cache_for_generation = prepare_cache_for_generation

    for name in ("_sample", "_beam_search", "_assisted_decoding"):
        setattr(GenerationMixin, name, _with_history(getattr(GenerationMixin, name)))
    GenerationMixin.init_continuous_batching = _without_our_models(GenerationMixin.init_continuous_batching)


def _without_our_models(original: Callable) -> Callable:
    """Of continuous batching, which would switch to another attention where there is one, and go on with a cache that
    is not capped."""

    @functools.wraps(original)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_capped(self):
            raise NotImplementedError(
                "generate_batch: continuous batching has a paged cache of its own, which cannot be capped; got an "
                f"enabled {type(self).__name__}; call disable(model), or generate() with a padded batch"
            )
        return original(self, *args, **kwargs)

    return init_continuous_batching


def _with_history(original: Callable) -> Callable:
    """Of a way to generate: what it is handed is checked against our cache before the first token, and remembered."""

    @functools.wraps(original)
    def generate(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, before = cache_of(kwargs), (RUNNING.model, RUNNING.cache)
        RUNNING.model, RUNNING.cache = self, cache
        try:
            if cache is None:
                return original(self, input_ids, *args, **kwargs)
            given = Given(cache, input_ids, kwargs["generation_config"], kwargs)
            with skip_what_was_read(self, given) if is_assisted_loop else contextlib.nullcontext():
                cache.is_past_checked = True
                result = original(self, input_ids, *args, **kwargs)
            given.remember(result if isinstance(result, Tensor) else result.sequences)
            return result
        finally:
            for used in (cache, RUNNING.cache):
                if used is not None:
                    used.is_past_checked = False
            RUNNING.model, RUNNING.cache = before

    is_assisted_loop = original.__name__ == "_assisted_decoding"
    return generate


_install()
