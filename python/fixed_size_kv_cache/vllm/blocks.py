# SPDX-License-Identifier: Apache-2.0
"""To vLLM a state is a block, and which blocks a later request may go on from is decided here."""

from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # registers vLLM's own, which it does not once there is another


class PromptStates(MambaManager):
    """Keeps the states of prompts alone. One that has read generated tokens one by one is not that of a prompt with the
    same tokens, which is read in chunks; whether it is still there would decide what is evicted."""

    def cache_blocks(self, request, num_tokens: int, *args, **kwargs) -> None:
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)


@register_kv_cache_spec(manager_class=PromptStates, uniform_type_base_spec=MambaSpec)
@dataclass(frozen=True, kw_only=True)
class StateSpec(MambaSpec):
    """A state of one layer."""
