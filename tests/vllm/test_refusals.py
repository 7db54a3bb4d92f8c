# SPDX-License-Identifier: Apache-2.0
"""What is refused, and what is said."""

import re
from types import SimpleNamespace

import pytest
import torch
import vllm
from engines import capped, random_prompts, tokens
from transformers import AutoModelForCausalLM, DeepseekV2Config, LlamaConfig
from vllm.engine.arg_utils import EngineArgs

from fixed_size_kv_cache.recall import MODEL
from fixed_size_kv_cache.vllm import refusals

SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=128)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1)
FSDC = {"cache_size": 32, "prefill_chunk_size": 32}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Its configuration alone."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**SIZES, **HEADS, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def configure(folder, fsdc=FSDC, **options):
    """As LLM() does before it builds anything."""
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        hf_overrides={"architectures": ["FixedSizeLlamaForCausalLM"]},
        additional_config={"fsdc": fsdc} if fsdc is not None else {},
        **options,
    ).create_engine_config()


def test_what_is_set(llama):
    config = configure(llama, max_num_batched_tokens=64)
    cache = config.cache_config
    assert (cache.block_size, cache.mamba_block_size, cache.mamba_cache_mode) == (32, 32, "align")
    assert cache.enable_prefix_caching


OPTIONS = [
    (dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2}), "speculative_config must be None"),
    (dict(enable_lora=True), "enable_lora must be False"),
    (dict(kv_offloading_size=1.0), "kv_transfer_config and kv_offloading_size must be None"),
    (
        dict(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}),
        "kv_transfer_config and kv_offloading_size must be None",
    ),
    (dict(kv_cache_dtype="fp8"), "kv_cache_dtype must be auto or bfloat16, the type of the model; got fp8"),
    (dict(pipeline_parallel_size=2), "pipeline_parallel_size must be 1"),
    (dict(tensor_parallel_size=2), "tensor_parallel_size must be at most the 1 KV heads"),
    (dict(compilation_config={"cudagraph_mode": "FULL"}), "cudagraph_mode must be NONE"),
    (dict(compilation_config={"cudagraph_mode": "PIECEWISE"}), "cudagraph_mode must be NONE"),
    (dict(max_num_batched_tokens=16, max_num_seqs=16), "prefill_chunk_size must be at most the 16 tokens of a step"),
    (dict(long_prefill_token_threshold=16), "prefill_chunk_size must be at most the 16 tokens of a step"),
    (dict(block_size=16), "block_size must be prefill_chunk_size, 32"),
    (dict(mamba_block_size=16, enable_prefix_caching=True), "mamba_block_size must be prefill_chunk_size, 32"),
    (dict(mamba_cache_mode="all"), "mamba_cache_mode"),  # which 0.32 itself no longer has
    (dict(prefix_match_unit=16), "prefix_match_unit must be prefill_chunk_size, 32"),
    (dict(fsdc=None), "additional_config must have the settings of the cache under 'fsdc'"),
    (dict(fsdc={"size": 3}), "additional_config['fsdc'] takes cache_size"),
    (dict(fsdc={"cache_size": [[8], [24]]}), "cache_size must be one number for all KV heads"),
    (dict(fsdc={"cache_size": 32, "include_skipped": True}), "include_skipped must be False"),
    (dict(fsdc={"cache_size": 32, "policy": "random"}), "policy must be 'attention'"),
    (dict(fsdc={"cache_size": 32, "prefill_chunk_size": 0}), "prefill_chunk_size must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[message[:40] for _, message in OPTIONS])
def test_configurations(llama, options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        configure(llama, **{"dtype": "bfloat16"} | options)


def test_devices_without_operators(llama):
    config = configure(llama)
    config.device_config.device_type = "xpu"
    with pytest.raises(ValueError, match="device must be cpu or cuda, for which there are operators; got xpu"):
        refusals.refuse_surroundings(config, 32)


def test_latent_attention(tmp_path):
    DeepseekV2Config(**SIZES, architectures=["DeepseekV2ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a FixedSizeLlamaForCausalLM must be of type llama; got deepseek_v2"):
        configure(tmp_path)


def attention(**different):
    """What of an Attention of vLLM is looked at."""
    impl = SimpleNamespace(alibi_slopes=None, logits_soft_cap=0)
    plain = dict(kv_cache_dtype="auto", attn_type="decoder", sliding_window=None, has_sink=False)
    layer = SimpleNamespace(**plain, kv_sharing_target_layer_name=None, impl=impl)
    for name, value in different.items():
        setattr(impl if hasattr(impl, name) else layer, name, value)
    return layer


LAYERS = [
    (dict(kv_cache_dtype="fp8"), "kv_cache_dtype must be auto or float32"),
    (dict(attn_type="encoder_only"), "layer must be causal attention of a decoder; got encoder_only"),
    (dict(sliding_window=16), "layer must be without a window; got one of 16"),
    (dict(has_sink=True), "layer must be without attention sinks"),
    (dict(alibi_slopes=[1.0]), "layer must be without ALiBi"),
    (dict(logits_soft_cap=30.0), "layer must be without a cap on its logits"),
    (dict(kv_sharing_target_layer_name="first"), "layer must be with keys and values of its own; got those of first"),
]


@pytest.mark.parametrize(("different", "message"), LAYERS, ids=[message[:40] for _, message in LAYERS])
def test_layers(different, message):
    refusals.refuse_layer("layer", attention(), torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        refusals.refuse_layer("layer", attention(**different), torch.float32)


def test_a_model_with_windows(tmp_path):
    config = LlamaConfig(**SIZES, **HEADS)
    config.sliding_window, config.layer_types = 16, ["full_attention", "sliding_attention"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match="must be without a window; got one of 16"),
        capped(tmp_path, 32, max_model_len=128),
    ):
        pass


@pytest.mark.parametrize("version", ["0.30.0", "0.33.0", "0.3.2", "dev"])
def test_other_versions(version):
    refusals.refuse_version(vllm.__version__)
    refusals.refuse_version("0.31.3")
    with pytest.raises(ImportError, match=rf"vLLM must be 0\.31 or 0\.32; got {re.escape(version)}"):
        refusals.refuse_version(version)


def test_memory_in_which_a_request_might_lose_its_state():
    """Four requests need eight states and the one that is nobody's; with them no request is ever preempted."""
    of_one = 2 * 2 * 33 * (32 + 32 + 5) * 4  # layers, KV heads, slots; keys, values, facts, position of four bytes each
    with (
        pytest.raises(ValueError, match="max_num_seqs must be at most 3, for there is memory for 8 states"),
        capped(MODEL, 32, kv_cache_memory_bytes=8 * of_one),
    ):
        pass
    prompts = random_prompts([*range(20, 200, 15)])
    with capped(MODEL, 32, kv_cache_memory_bytes=9 * of_one, disable_log_stats=False) as llm:
        answers = tokens(llm, prompts, 100)
        preempted = [x.value for x in llm.get_metrics() if x.name == "vllm:num_preemptions"]
    assert preempted == [0]
    assert [len(answer) for answer in answers] == [100] * len(prompts)
