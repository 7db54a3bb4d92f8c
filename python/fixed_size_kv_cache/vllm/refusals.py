# SPDX-License-Identifier: Apache-2.0
"""What a cache of fixed size cannot do inside vLLM, or what nobody has tried: an error each, and none is silent."""

from typing import Any

from ..settings import FixedSizeCacheConfig


def refuse_settings(settings: FixedSizeCacheConfig) -> None:
    """Raises ValueError for settings that transformers' cache has and this one has not."""
    _require(isinstance(settings.cache_size, int), "cache_size", "one number for all KV heads", settings.cache_size)
    _require(not settings.include_skipped, "include_skipped", "False", True)
    _require(settings.policy == "attention", "policy", "'attention'", repr(settings.policy))


def refuse_surroundings(vllm_config: Any, chunk: int) -> None:
    """Raises ValueError for a configuration in which the cache would be wrong, or was never run."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config

    speculative = vllm_config.speculative_config
    _require(speculative is None, "speculative_config", "None: a token that was evicted cannot be taken back", "one")
    _require(vllm_config.lora_config is None, "enable_lora", "False: adapters were never tried", True)
    has_connector = vllm_config.kv_transfer_config is not None
    _require(not has_connector, "kv_transfer_config", "None: a connector would move blocks of tokens", "one")
    is_plain = cache.cache_dtype in ("auto", str(model.dtype).removeprefix("torch."))
    _require(is_plain, "kv_cache_dtype", "'auto': the state has the type of the model", repr(cache.cache_dtype))

    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name)
        _require(size == 1, name, "1: only tensor parallelism was tried", size)
    heads = model.get_total_num_kv_heads()
    at_most = f"at most the {heads} KV heads, each of which has one state"
    _require(parallel.tensor_parallel_size <= heads, "tensor_parallel_size", at_most, parallel.tensor_parallel_size)

    _require(not model.use_mla, "the model", "without latent attention (MLA)", model.model)
    _require(not model.is_multimodal_model, "the model", "of text alone", model.model)
    has_graphs = compilation.cudagraph_mode is not None and bool(compilation.cudagraph_mode)
    eager = "NONE: a graph would skip what the cache does between kernels; pass enforce_eager=True"
    _require(not has_graphs or model.enforce_eager, "cudagraph_mode", eager, compilation.cudagraph_mode)

    most = scheduler.max_num_batched_tokens
    if scheduler.long_prefill_token_threshold > 0:
        most = min(most, scheduler.long_prefill_token_threshold)
    together = f"at most the {most} tokens that one step may read of a prompt, or load would decide what is evicted"
    _require(chunk <= most, "prefill_chunk_size", together, chunk)
    unit = cache.prefix_match_unit
    _require(unit in (None, chunk), "prefix_match_unit", f"prefill_chunk_size, {chunk}, or not given", unit)


def refuse_layer(name: str, layer: Any) -> None:
    """Raises ValueError for an attention of the model that is more than the operators compute."""
    impl = layer.impl
    _require(layer.attn_type == "decoder", name, "causal attention of a decoder", layer.attn_type)
    _require(layer.sliding_window is None, name, "without a window", f"one of {layer.sliding_window}")
    _require(not layer.has_sink, name, "without attention sinks, which were never tried", "some")
    _require(getattr(impl, "alibi_slopes", None) is None, name, "without ALiBi", "some slopes")
    _require(not getattr(impl, "logits_soft_cap", None), name, "without a cap on its logits", "one")
    shares = layer.kv_sharing_target_layer_name
    _require(shares is None, name, "with keys and values of its own", f"those of {shares}")


def _require(holds: bool, what: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"fixed_size_kv_cache.vllm: {what} must be {rule}; got {got}")
