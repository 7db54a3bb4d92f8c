# SPDX-License-Identifier: Apache-2.0
"""The model in what users call their model."""

from collections.abc import Iterator
from typing import Any

import torch

from ..compat.capability import is_prefix_tuning


def unwrap(model_or_pipeline: Any, who: str) -> Any:
    """The model that generates, out of a pipeline, a PEFT model, or a compiled or parallel module."""
    from transformers import PreTrainedModel

    *_, model = wrappers(model_or_pipeline)
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise TypeError(
            f"{who}: model_or_pipeline must be a model of transformers that can generate, or a pipeline, PEFT model, "
            f"compiled or parallel module of one; got {type(model).__name__}"
        )
    return model


def wrappers(model: Any) -> Iterator[Any]:
    """What was handed over, and what each wrapper holds, down to the model."""
    yield model
    while (model := _held_by(model)) is not None:
        yield model


def _held_by(wrapper: Any) -> Any:
    from transformers import PreTrainedModel

    if hasattr(wrapper, "_orig_mod"):  # torch.compile(model)
        return wrapper._orig_mod
    if hasattr(wrapper, "get_base_model"):  # PEFT
        return wrapper.get_base_model()
    if isinstance(wrapper, PreTrainedModel):
        return None
    if isinstance(module := getattr(wrapper, "module", None), torch.nn.Module):
        return module  # DistributedDataParallel, DataParallel, what Accelerator made of a model
    model, is_module = getattr(wrapper, "model", None), isinstance(wrapper, torch.nn.Module)
    return model if isinstance(model, PreTrainedModel) or not is_module else None  # a pipeline, or a user's module


def virtual_tokens(model_or_pipeline: Any) -> int:
    """How many of them a PEFT model of prefix tuning puts before every text."""
    configs = [getattr(each, "active_peft_config", None) for each in wrappers(model_or_pipeline)]
    return max((config.num_virtual_tokens for config in configs if is_prefix_tuning(config)), default=0)
