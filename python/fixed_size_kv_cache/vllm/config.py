# SPDX-License-Identifier: Apache-2.0
"""What a model of ours asks of vLLM's configuration, and the settings that it carries."""

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..settings import FixedSizeCacheConfig, read_settings
from ..sizes import check_whole
from .refusals import refuse_settings, refuse_surroundings

KEY = "fsdc"  # in additional_config


class FixedSizeModelConfig(VerifyAndUpdateConfig):
    """Called once, before anything is built."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        chunk, cache = read_chunk_size(vllm_config), vllm_config.cache_config
        refuse_surroundings(vllm_config, chunk)
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        # What is evicted depends on where a prompt is cut, and the scheduler cuts by load. In this mode it cuts at
        # multiples of a block only, where the state is kept for prompts that begin alike.
        cache.enable_prefix_caching = True
        cache.mamba_cache_mode = "align"
        cache.block_size = cache.mamba_block_size = chunk
        cache.user_specified_block_size = True


def read_config(vllm_config: VllmConfig) -> FixedSizeCacheConfig:
    """The settings of the cache."""
    fields = {name: value for name, value in _fields(vllm_config).items() if name != "prefill_chunk_size"}
    settings = read_settings(f"additional_config[{KEY!r}]", None, fields)
    refuse_settings(settings)
    return settings


def read_chunk_size(vllm_config: VllmConfig) -> int:
    """How many tokens of a prompt are read at a time."""
    chunk = _fields(vllm_config).get("prefill_chunk_size", read_config(vllm_config).prefill_chunk_size)
    return check_whole("prefill_chunk_size", chunk, 1)


def _fields(vllm_config: VllmConfig) -> dict:
    additional = vllm_config.additional_config
    fields = additional.get(KEY) if isinstance(additional, dict) else None
    if not isinstance(fields, dict):
        raise ValueError(
            f'additional_config must have the settings of the cache under {KEY!r}, as in {{"{KEY}": '
            f'{{"cache_size": 1024}}}}; got {additional!r}'
        )
    return fields
