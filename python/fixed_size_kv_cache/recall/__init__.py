# SPDX-License-Identifier: Apache-2.0
"""The embedded model: a small LLaMA that reads facts and answers questions about them, and its streams of text."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MODEL = Path(__file__).parent / "model"
"""A folder as ``from_pretrained`` reads it: config.json, model.safetensors, tokenizer.json, and README.md, its card."""

POSITIONS = 512
"""Words that the model was trained to read at once."""


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a model is faster so, and figures do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
