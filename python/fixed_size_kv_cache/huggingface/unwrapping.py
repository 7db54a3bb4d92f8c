# SPDX-License-Identifier: Apache-2.0
"""The model in what users call their model."""

from typing import Any

import torch


def unwrap(model_or_pipeline: Any, who: str) -> Any:
    """The model that generates, out of a pipeline, a PEFT model, or a compiled or parallel module."""
    from transformers import PreTrainedModel

    model, wrapped = model_or_pipeline, True
    while wrapped:
        wrapped = False
        if hasattr(model, "_orig_mod"):  # torch.compile(model)
            model, wrapped = model._orig_mod, True
        elif hasattr(model, "get_base_model"):  # PEFT
            model, wrapped = model.get_base_model(), True
        elif not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "module", None), torch.nn.Module):
            model, wrapped = model.module, True  # DistributedDataParallel, DataParallel, what Accelerator made of it
        elif not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "model", None), PreTrainedModel):
            model, wrapped = model.model, True  # a pipeline
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise TypeError(
            f"{who}: model_or_pipeline must be a model of transformers that can generate, or a pipeline, PEFT model, "
            f"compiled or parallel module of one; got {type(model).__name__}"
        )
    return model
