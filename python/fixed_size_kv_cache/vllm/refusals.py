# SPDX-License-Identifier: Apache-2.0
"""What a cache of fixed size cannot do inside vLLM, or what nobody has tried: an error each, and none is silent."""

from typing import Any

from ..operators.register import DEVICES
from ..settings import FixedSizeCacheConfig

MINORS = ("0.31", "0.32")  # of vLLM, with which all this was run; what it builds on moves from one to the next
MODEL_TYPES = {  # what can be in hf_overrides, and of which type the model must be
    "FixedSizeLlamaForCausalLM": "llama",
    "FixedSizeQwen2ForCausalLM": "qwen2",
    "FixedSizeQwen3ForCausalLM": "qwen3",
}


def is_known(version: str) -> bool:
    return ".".join(version.split(".")[:2]) in MINORS


def refuse_version(version: str) -> None:
    """Raises ImportError for a vLLM that the plugin was never run with."""
    if not is_known(version):
        raise ImportError(f"fixed_size_kv_cache.vllm: vLLM must be {' or '.join(MINORS)}; got {version}")


def refuse_settings(settings: FixedSizeCacheConfig) -> None:
    """Raises ValueError for settings that transformers' cache has and this one has not."""
    _require(isinstance(settings.cache_size, int), "cache_size", "one number for all KV heads", settings.cache_size)
    _require(not settings.include_skipped, "include_skipped", "False", True)
    _require(settings.policy == "attention", "policy", "'attention'", repr(settings.policy))


def refuse_surroundings(vllm_config: Any, chunk: int) -> None:
    """Raises ValueError for a configuration in which the cache would be wrong, or was never run."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    architecture, found = model.architecture, model.hf_config.model_type
    _require(found == MODEL_TYPES[architecture], f"a {architecture}", f"of type {MODEL_TYPES[architecture]}", found)

    device = vllm_config.device_config.device_type
    _require(device in DEVICES, "device", "cpu or cuda, for which there are operators", device)
    speculative = vllm_config.speculative_config
    _require(speculative is None, "speculative_config", "None: a token that was evicted cannot be taken back", "one")
    _require(vllm_config.lora_config is None, "enable_lora", "False: adapters were never tried", True)
    has_connector = vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None
    _require(not has_connector, "kv_transfer_config and kv_offloading_size", "None: states stay where they are", "one")
    refuse_quantized(cache.cache_dtype, model.dtype)
    graphs = vllm_config.compilation_config.cudagraph_mode
    _require(not graphs, "cudagraph_mode", "NONE: a graph would not repeat what is done between kernels", graphs)

    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name)
        _require(size == 1, name, "1: only tensor parallelism was tried", size)
    heads, shares = model.get_total_num_kv_heads(), parallel.tensor_parallel_size
    _require(shares <= heads, "tensor_parallel_size", f"at most the {heads} KV heads, each with one state", shares)

    scheduler, together = vllm_config.scheduler_config, "so that load does not decide where a prompt is cut"
    most = min(scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold or chunk)
    _require(chunk <= most, "prefill_chunk_size", f"at most the {most} tokens of a step, {together}", chunk)
    block = cache.block_size if cache.user_specified_block_size else chunk
    units = dict(block_size=block, mamba_block_size=cache.mamba_block_size, prefix_match_unit=cache.prefix_match_unit)
    for name, size in units.items():
        _require(size in (None, chunk), name, f"prefill_chunk_size, {chunk}, {together}", size)
    mode = cache.mamba_cache_mode
    _require(mode in ("none", "align"), "mamba_cache_mode", f"align, {together}", mode)


def refuse_quantized(cache_dtype: str, dtype: Any) -> None:
    """Raises ValueError for a state that is not of the model's type."""
    plain = str(dtype).removeprefix("torch.")
    _require(cache_dtype in ("auto", plain), "kv_cache_dtype", f"auto or {plain}, the type of the model", cache_dtype)


def refuse_layer(name: str, layer: Any, dtype: Any) -> None:
    """Raises ValueError for an attention of the model that is more than the operators compute."""
    refuse_quantized(layer.kv_cache_dtype, dtype)
    impl, shared = layer.impl, layer.kv_sharing_target_layer_name
    _require(layer.attn_type == "decoder", name, "causal attention of a decoder", layer.attn_type)
    _require(layer.sliding_window is None, name, "without a window", f"one of {layer.sliding_window}")
    _require(not layer.has_sink, name, "without attention sinks, which were never tried", "some")
    _require(getattr(impl, "alibi_slopes", None) is None, name, "without ALiBi", "some slopes")
    _require(not getattr(impl, "logits_soft_cap", None), name, "without a cap on its logits", "one")
    _require(shared is None, name, "with keys and values of its own", f"those of {shared}")


def refuse_memory(blocks: int, max_num_seqs: int) -> None:
    """Raises ValueError where vLLM might have to take a request's state away and read its text again: what it has
    generated would be read in chunks then, after which other tokens are held. Block 0 is nobody's."""
    most = (blocks - 1) // 2
    enough = f"at most {most}, for there is memory for {blocks} states and a request has up to two"
    _require(max_num_seqs <= most, "max_num_seqs", enough, max_num_seqs)


def _require(holds: bool, what: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"fixed_size_kv_cache.vllm: {what} must be {rule}; got {got}")
