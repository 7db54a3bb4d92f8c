# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls in each of its processes, through the entry point ``vllm.general_plugins``."""

from .refusals import MODEL_TYPES, is_known


def register() -> None:
    """Makes the architectures known. What they need is imported when a model has one of them; that of a vLLM that the
    plugin does not know fails then."""
    import vllm

    for name in MODEL_TYPES:
        vllm.ModelRegistry.register_model(name, f"{__package__}.models:{name}")
    if is_known(vllm.__version__):
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .config import FixedSizeModelConfig

        MODELS_CONFIG_MAP.update(dict.fromkeys(MODEL_TYPES, FixedSizeModelConfig))
