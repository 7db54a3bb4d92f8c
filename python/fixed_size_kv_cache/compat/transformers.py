# SPDX-License-Identifier: Apache-2.0
"""The differences between versions of transformers, all of them.

From 4.56 on a cache is a list of layers. Up to 4.53 it is two lists of tensors; there our cache brings the layers and
the methods that go through them itself. (4.54 and 4.55 were in between and are not supported.)
"""

import inspect
from typing import NamedTuple

from . import require  # noqa: F401  first: where there is none it says how to get it

# isort: split
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode

HAS_LAYERS = hasattr(cache_utils, "DynamicLayer")

# What models and generate() call the cache: "cache" from 5.24 on, which takes the older name until 5.40.
_parameters = inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _parameters else "past_key_values"

# On CUDA, for the sake of sdpa, these versions let a row of padding that would see nothing see all columns.
SHOWS_PADDING_EVERYTHING = not HAS_LAYERS


class Contents(NamedTuple):
    """What a layer of a cache of transformers holds."""

    keys: Tensor  # [B, H, S, D]
    values: Tensor  # [B, H, S, D]


if HAS_LAYERS:
    from transformers.cache_utils import DynamicLayer

    BaseCache = DynamicCache

    def init_cache(cache: Cache, config) -> None:
        """Runs the base class's ``__init__``; ``cache.layers`` are stock layers afterwards."""
        DynamicCache.__init__(cache, **({} if config is None else {"config": config}))

    def stock_contents(cache: Cache) -> list[Contents | None]:
        """What each layer holds, None where it is empty. A layer that is not a plain one is a TypeError."""
        for layer in cache.layers:
            if type(layer) is not DynamicLayer:
                raise TypeError(f"{type(cache).__name__} with layers of type {type(layer).__name__}")
        return [
            None if layer.keys is None or layer.keys.numel() == 0 else Contents(layer.keys, layer.values)
            for layer in cache.layers
        ]

    def drop_stock_storage(cache: Cache) -> None:
        """Before the class of a stock cache is changed to ours."""

else:

    class DynamicLayer:  # the part of transformers' class that our layer builds on
        """A layer of a cache."""

        def __init__(self) -> None:
            self.keys: Tensor | None = None
            self.values: Tensor | None = None
            self.is_initialized = False

    class BaseCache(DynamicCache):
        """DynamicCache on layers: every public method that would use the two lists of tensors."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

        def get_max_cache_shape(self) -> None:
            return None

        def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
            if layer_idx >= len(self.layers):
                return cache_position.shape[0], 0
            return self.layers[layer_idx].get_mask_sizes(cache_position)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            for layer in self.layers:
                layer.reorder_cache(beam_idx)

        def crop(self, max_length: int) -> None:
            for layer in self.layers:
                layer.crop(max_length)

        def batch_repeat_interleave(self, repeats: int) -> None:
            for layer in self.layers:
                layer.batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            for layer in self.layers:
                layer.batch_select_indices(indices)

        def reset(self) -> None:
            for layer in self.layers:
                layer.reset()

        def __len__(self) -> int:
            return len(self.layers)

    def init_cache(cache: Cache, config) -> None:
        if isinstance(cache, torch.nn.Module):
            torch.nn.Module.__init__(cache)
        cache.layers = []

    def stock_contents(cache: Cache) -> list[Contents | None]:
        pairs = zip(cache.key_cache, cache.value_cache, strict=True)
        return [Contents(keys, values) if len(keys) > 0 else None for keys, values in pairs]

    def drop_stock_storage(cache: Cache) -> None:
        del cache.key_cache, cache.value_cache


def make_stock_layers(config) -> list:
    """The layers that a stock cache made for a model begins with. From 4.56 on."""
    return DynamicCache(config=config).layers


def on_attention_interface(model_class: type) -> bool:
    """Whether a class of models calls attention through the AttentionInterface.

    transformers looks into the source of the class's module; a user's subclass in a notebook has none, so ask for the
    class that it comes from.
    """
    known = [c for c in model_class.__mro__ if c.__module__.startswith("transformers.models.")]
    return (known[0] if known else model_class)._can_set_attn_implementation()


def is_kv_sharing(config) -> bool:
    """Whether some layers use the keys and values of others. ``kv_sharing_modes`` is new in 5.23."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    return "reuse" in modes or bool(getattr(config, "num_kv_shared_layers", None))


def is_assisted(generation_config, arguments: tuple) -> bool:
    """Whether generate() will propose tokens and take some back. From 4.57 on it says so, before that it gives the
    assistant model; the third argument of ``_prepare_cache_for_generation`` in both."""
    if getattr(generation_config, "is_assistant", False):
        return True
    third = arguments[0] if arguments else None
    if isinstance(third, GenerationMode):
        return third == GenerationMode.ASSISTED_GENERATION
    proposes_itself = (generation_config.prompt_lookup_num_tokens, generation_config.assistant_early_exit)
    return third is not None or any(x is not None for x in proposes_itself)


def prompt_length(generation_config, model_kwargs: dict) -> int:
    """Tokens that generate() was given, with those of earlier turns. From 5.23 on a mask of ones is dropped, and its
    length is in the config."""
    mask = model_kwargs.get("attention_mask")
    return getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[-1]


# A prompt in chunks, wrong upstream: below 5.23 it is read from column 0 on, whatever the cache holds; up to 4.57
# padding is counted in the position ids.
CHUNKS_FORGET_EARLIER_TURNS = Version(transformers.__version__) < Version("5.23")
CHUNKS_FORGET_PADDING = hasattr(transformers.GenerationMixin, "_prefill_chunking")
# Before transformers 5 a text is cut by the length of the cache, whatever its mask says.
TAKES_NEW_TOKENS_ONLY = hasattr(transformers.GenerationMixin, "_prefill")
# Families whose linear layers read a chunk as if nothing had come before it, in every version.
CHUNKS_FORGET_STATE = ("jamba",)


def set_implementation(config, name: str) -> None:
    """Sets the attention of one config only: the text decoder's, not the vision tower's."""
    config._attn_implementation = name


def query_length(of: int | Tensor) -> int:
    """``get_mask_sizes`` is given the number of new tokens from 5.4 on, before that their ``cache_position``."""
    return of if isinstance(of, int) else of.shape[0]
