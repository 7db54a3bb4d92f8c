# SPDX-License-Identifier: Apache-2.0
"""The attention of a model, with a state of constant size in place of a cache that grows: to vLLM a Mamba layer."""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..layer.attention import LogitRule
from .backend import FixedSizeBackend, Metadata
from .blocks import StateSpec
from .config import read_chunk_size, read_config
from .refusals import refuse_memory
from .state import RequestState, as_tokens, state_dtypes, state_shapes


class FixedSizeAttention(nn.Module, MambaBase):
    """Takes the place of an ``Attention``."""

    mamba_type = MambaAttentionBackendEnum.CUSTOM

    def __init__(self, attention: Attention, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.layer_name = attention.layer_name
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_size, self.head_size_v = attention.head_size, attention.head_size_v
        self.rule = LogitRule(scaling=attention.impl.scale)
        self.dtype = vllm_config.model_config.dtype
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.settings, self.chunk_size = read_config(vllm_config), read_chunk_size(vllm_config)
        self.kv_cache = ()

    # ---- what vLLM asks ----------------------------------------------------------------------------------------------

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.settings, self.num_kv_heads, self.head_size, self.head_size_v)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> StateSpec:
        cache = vllm_config.cache_config
        return StateSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=cache.mamba_block_size,
            mamba_type=self.mamba_type,
            mamba_cache_mode=cache.mamba_cache_mode,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Takes the memory of all states, of which a request has two where it goes on to another block."""
        refuse_memory(kv_cache.shape[0], self.max_num_seqs)
        super().bind_kv_cache(kv_cache)

    def get_attn_backend(self) -> type[FixedSizeBackend]:
        return FixedSizeBackend

    # ---- a step ------------------------------------------------------------------------------------------------------

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of all tokens of a step, ``[tokens, heads * D]`` each."""
        output = query.new_empty(query.shape[0], self.num_heads * self.head_size_v)
        torch.ops.vllm.fixed_size_attention(query, key, value, output, self.layer_name)
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, metadata: Metadata) -> None:
        """Request by request, each on its own state."""
        query = query.view(-1, self.num_heads, 1, self.head_size)
        key = key.view(-1, self.num_kv_heads, 1, self.head_size)
        value = value.view(-1, self.num_kv_heads, 1, self.head_size_v)
        output = output.view(-1, self.num_heads, 1, self.head_size_v)
        states, seen = as_tokens(self.kv_cache), metadata.seen.clone()  # the operators count in it
        for i, request in enumerate(metadata.requests):
            tokens = slice(request.start, request.stop)
            new = query[tokens], key[tokens], value[tokens]  # [tokens, heads, 1, D]
            state = RequestState(states, request.block, request.seen, seen[i : i + 1], self.settings)
            if request.is_prompt:
                new = (x.transpose(0, 2) for x in new)  # [1, heads, tokens, D]
                output[tokens] = state.read(*new, self.rule, self.chunk_size).transpose(0, 2)
            else:
                output[tokens] = state.decode(*new, self.rule)


def fixed_size_attention(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    """Opaque to a compiler, as vLLM's own attention is: state and metadata come from the context."""
    context = get_forward_context()
    if context.attn_metadata is None:  # vLLM measures memory
        output.zero_()
        return
    layer = context.no_compile_layers[layer_name]
    layer.attend(query, key, value, output, context.attn_metadata[layer_name])


def _fake(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    return


direct_register_custom_op("fixed_size_attention", fixed_size_attention, mutates_args=["output"], fake_impl=_fake)
