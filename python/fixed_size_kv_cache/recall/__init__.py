# SPDX-License-Identifier: Apache-2.0
"""The embedded model: a small LLaMA that reads facts and answers questions about them, and its streams of text."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A folder as ``from_pretrained`` reads it: config.json, model.safetensors, tokenizer.json, and README.md, its card."""

POSITIONS = 512
"""Words that the model was trained to read at once."""
