# SPDX-License-Identifier: Apache-2.0
"""Which models can be capped. What cannot is refused by name, before anything is computed."""

from typing import Any

from .transformers import CHUNKS_FORGET_STATE, DynamicLayer, is_kv_sharing, make_stock_layers, on_attention_interface

INSTEAD = "; use it without a fixed-size cache"
NAMES_OF_STOCK_LAYERS = (  # which keep their own, constant memory
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "DummyLayer",  # a layer without attention
)


def check_config(config: Any) -> None:
    """Raises NotImplementedError for a model whose cache cannot be capped, as far as its config tells."""
    text = text_config(config)
    name = text.model_type
    if text.is_encoder_decoder:
        raise NotImplementedError(
            f"a fixed-size cache is for decoder-only models; got {name}, an encoder-decoder{INSTEAD}"
        )
    if getattr(text, "kv_lora_rank", None) is not None:
        raise NotImplementedError(
            f"a cache must hold the keys that attention sees; got {name}, whose latent attention expands them "
            f"after the cache{INSTEAD}"
        )
    if is_kv_sharing(text):
        raise NotImplementedError(
            f"each layer must have a cache of its own; got {name}, whose layers share keys and values{INSTEAD}"
        )


def check_layers(layers: list, config: Any) -> None:
    """Raises NotImplementedError where transformers' cache of a model has layers that grow and are not plain ones."""
    for layer in layers:
        kind = type(layer)
        if kind is not DynamicLayer and kind.__name__ not in NAMES_OF_STOCK_LAYERS:
            raise NotImplementedError(
                f"layers of a cache must be plain, sliding or linear; got {kind.__name__} of "
                f"{text_config(config).model_type}{INSTEAD}"
            )


def check_made_for(cache: Any, config: Any) -> None:
    """Raises ValueError where a model needs layers of transformers' own that a cache made without its config lacks."""
    needed = make_stock_layers(config)
    for i, layer in enumerate(needed):
        has = type(cache.layers[i]) if i < len(cache.layers) else DynamicLayer
        if type(layer) is not DynamicLayer and has is not type(layer):
            raise ValueError(
                f"layer {i} of {text_config(config).model_type} must keep transformers' own cache, a "
                f"{type(layer).__name__}; make the cache with FixedSizeDynamicCache(config=model.config)"
            )


def has_window(module: Any, layer_idx: int) -> bool:
    """Whether the config of an attention module says that the layer sees a window or a chunk of the text."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return layer_idx < len(kinds) and kinds[layer_idx] in ("sliding_attention", "chunked_attention")


def rotates_by_length(config: Any) -> bool:
    """Whether rotary embeddings depend on the length of the text (dynamic NTK, longrope): a key keeps the rotation of
    the length at which it was read."""
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    kinds = [str(each.get("rope_type", each.get("type"))) for each in (rope, *by_layer_type)]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def is_prefix_tuning(peft_config: Any) -> bool:
    """Whether PEFT brings keys and values that no token made, in a cache of its own."""
    return str(getattr(peft_config, "peft_type", "")).rpartition(".")[2] in ("PREFIX_TUNING", "CARTRIDGE")


def forgets_state(config: Any) -> bool:
    """Whether several tokens behind others are read as if nothing had come before."""
    return text_config(config).model_type in CHUNKS_FORGET_STATE


def reads_in_one_piece(config: Any) -> bool:
    """Whether a prompt that is read in chunks is another one to the model."""
    return forgets_state(config) or rotates_by_length(config)


def check_model(model: Any) -> None:
    """Raises NotImplementedError where a model's attention does not go through transformers' AttentionInterface."""
    check_config(model.config)
    config = text_config(model.config)
    if not model._supports_default_dynamic_cache():
        raise NotImplementedError(
            f"transformers must make the cache; it makes none for {type(model).__name__}, which has one of its "
            f"own{INSTEAD}"
        )
    decoders = text_decoders(model, config)
    for decoder in decoders:
        if not on_attention_interface(type(decoder)):
            raise NotImplementedError(
                f"the model's attention must be on transformers' AttentionInterface; got {type(decoder).__name__}, "
                f"which computes its own{INSTEAD}"
            )
    if not decoders:
        raise NotImplementedError(
            f"the model must have a text decoder; got {type(model).__name__}, none of whose parts has the config of "
            f"its text model{INSTEAD}"
        )


DESCRIBED = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def describe(config: Any) -> dict[str, Any]:
    """What a cache made for one model and another model must have in common, as far as the config says it."""
    text = text_config(config)
    return with_usual_heads({name: field(text, name) for name in DESCRIBED})


def with_usual_heads(shape: dict[str, Any]) -> dict[str, Any]:
    """What a config says of a model, with what some versions leave out because it is usual."""
    if shape["num_key_value_heads"] is None:
        shape["num_key_value_heads"] = shape["num_attention_heads"]
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    if shape["head_dim"] is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        shape["head_dim"] = width // heads
    return shape


def field(config: Any, name: str) -> Any:
    """A field of a config; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError, of transformers 5.23 on
        return None


def text_config(config: Any) -> Any:
    """The config of the text decoder of any model."""
    return config.get_text_config(decoder=True)


def text_decoders(model: Any, config: Any) -> list:
    """The parts of a model that are models with this config."""
    from transformers import PreTrainedModel

    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config]
