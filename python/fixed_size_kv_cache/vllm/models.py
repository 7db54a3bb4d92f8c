# SPDX-License-Identifier: Apache-2.0
"""Models of vLLM with a cache of fixed size."""

# ruff: noqa: E402
from vllm import __version__

from .refusals import refuse_layer, refuse_version

refuse_version(__version__)  # before what may have moved is imported

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import MambaCopySpec
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from .layer import FixedSizeAttention
from .state import STATE


def replace_attention(model, vllm_config: VllmConfig) -> None:
    """Puts our layer in the place of every attention, also where vLLM looks layers up by name."""
    layers = vllm_config.compilation_config.static_forward_context
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            refuse_layer(name, module, vllm_config.model_config.dtype)
            parent, _, child = name.rpartition(".")
            ours = FixedSizeAttention(module, vllm_config)
            setattr(model.get_submodule(parent), child, ours)
            layers[module.layer_name] = ours


def copy_whole(state, block_ids: list[int], index: int, accepted: int) -> MambaCopySpec:
    """Where the state of a request goes on in another block."""
    source = state[block_ids[index]]
    return MambaCopySpec(source.data_ptr(), source.numel())


class FixedSizeModel:
    """Before a model of vLLM in the order of its base classes."""

    # Of vLLM's protocols HasInnerState, IsAttentionFree and SupportsMambaPrefixCaching, whose own __init__ would come
    # before the model's.
    has_inner_state = is_attention_free = supports_mamba_prefix_caching = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        replace_attention(self, vllm_config)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types):
        return dict.fromkeys(mamba_types, (copy_whole,) * len(STATE))


class FixedSizeLlamaForCausalLM(FixedSizeModel, LlamaForCausalLM):
    pass


class FixedSizeQwen2ForCausalLM(FixedSizeModel, Qwen2ForCausalLM):
    pass


class FixedSizeQwen3ForCausalLM(FixedSizeModel, Qwen3ForCausalLM):
    pass
