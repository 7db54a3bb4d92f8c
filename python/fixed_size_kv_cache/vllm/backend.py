# SPDX-License-Identifier: Apache-2.0
"""Which requests a step has, and where their states lie."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor


class Request(NamedTuple):
    """A request's part of a step."""

    block: int  # its state
    start: int  # its first token in the step
    stop: int
    seen: int  # tokens before these
    is_prompt: bool  # of its prompt, or one that it has generated


@dataclass
class Metadata:
    requests: list[Request]
    seen: Tensor  # int32, of each, for the operators


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        of, mode = common_attn_metadata, self.vllm_config.cache_config.mamba_cache_mode
        blocks = mamba_get_block_table_tensor(of.block_table_tensor, of.seq_lens, self.kv_cache_spec, mode)[:, 0]
        starts = of.query_start_loc_cpu.tolist()
        lengths, prompts = of.seq_lens.tolist(), of.is_prefilling.tolist()
        requests = [
            Request(block, start, stop, length - (stop - start), is_prompt)
            for block, start, stop, length, is_prompt in zip(
                blocks.tolist(), starts[:-1], starts[1:], lengths, prompts, strict=True
            )
        ]
        return Metadata(requests, of.seq_lens - of.query_start_loc.diff())


class FixedSizeBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "FIXED_SIZE"

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True
