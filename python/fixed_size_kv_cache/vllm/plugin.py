# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls in each of its processes, through the entry point ``vllm.general_plugins``."""

from packaging.version import Version

ARCHITECTURES = {f"FixedSize{name}": name for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")}
MINORS = ((0, 32),)  # of vLLM, those that the plugin was run with: its classes move from one to the next


def register() -> None:
    """Makes the architectures known. What they need is imported when a model has one of them."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{__package__}.models:{name}")
    if is_known(_vllm_version()):
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .config import FixedSizeModelConfig

        MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES, FixedSizeModelConfig))


def is_known(of_vllm: str) -> bool:
    return Version(of_vllm).release[:2] in MINORS


def require_known() -> None:
    """Raises where a model of ours is loaded into a vLLM that the plugin was never run with."""
    found = _vllm_version()
    if not is_known(found):
        known = " or ".join(f"{major}.{minor}" for major, minor in MINORS)
        raise ImportError(f"fixed_size_kv_cache.vllm: vLLM must be {known}; got {found}")


def _vllm_version() -> str:
    import vllm

    return vllm.__version__
