# SPDX-License-Identifier: Apache-2.0
"""How much each KV head of a model needs the whole text: what ``profile_heads`` measures, as an object and a file."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from .compat.capability import text_config, with_usual_heads

FORMAT = 1
SHAPE = (  # what a config says of the shape of a model; other fields differ between versions of transformers
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class HeadProfile:
    """The output error of each KV head of a model.

    Args:
        model: its name, for people.
        size: its number of parameters.
        config_hash: of the shape that its config gives it, :func:`hash_config`. Models of one shape, such as
            a base model and what was tuned from it, may share a profile.
        output_error: a row for each layer with a number for each KV head, at least 0; an empty one for a layer that
            keeps transformers' own cache.

    Raises:
        ValueError: for an error that is negative or not finite.

    Example:
        >>> profile = HeadProfile("tiny", 1000, "0" * 16, ((0.5, 0.25), (0.0, 1.0)))
        >>> profile.output_error[0][1]
        0.25
    """

    model: str
    size: int
    config_hash: str
    output_error: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rows = tuple(tuple(float(error) for error in layer) for layer in self.output_error)
        object.__setattr__(self, "output_error", rows)
        wrong = [error for layer in rows for error in layer if not (math.isfinite(error) and error >= 0)]
        if wrong:
            raise ValueError(f"HeadProfile: output_error must be finite and at least 0; got {wrong[0]}")

    def check_model(self, config: Any) -> None:
        """Raises ValueError where this is the profile of a model of another shape."""
        found = hash_config(config)
        if found != self.config_hash:
            raise ValueError(
                f"head_profile must be of the same model, here {text_config(config).model_type} with hash {found}; got "
                f"that of {self.model} with hash {self.config_hash}; make one with profile_heads(model, tokenizer) or "
                "fsdc profile"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON."""
        said = {"format": FORMAT, "model": self.model, "size": self.size, "config_hash": self.config_hash}
        rows = ",\n".join(json.dumps(layer) for layer in self.output_error)
        text = json.dumps({**said, "output_error": []}, indent=2)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text.replace("[]", f"[\n{rows}\n]") + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadProfile":
        """Reads what :meth:`save` has written.

        Raises:
            OSError: where there is no such file.
            ValueError: where it is no profile, or one of another format.
        """
        with open(path, encoding="utf-8") as file:
            try:
                said = json.load(file)
            except ValueError as error:
                raise ValueError(f"HeadProfile: {os.fspath(path)} must be a JSON file; got {error}") from error
        found = said.get("format") if isinstance(said, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"HeadProfile: {os.fspath(path)} must be a profile of format {FORMAT}; got format {found}; make it "
                "anew with fsdc profile"
            )
        try:
            return cls(str(said["model"]), int(said["size"]), str(said["config_hash"]), said["output_error"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"HeadProfile: {os.fspath(path)} must have model, size, config_hash and output_error [layers][heads]; "
                f"got {type(error).__name__}: {error}"
            ) from error


def hash_config(config: Any) -> str:
    """16 hexadecimal digits for the shape of a model's text decoder."""
    text = text_config(config)
    said = text.to_dict()  # not its attributes: some are an error where layers differ
    shape = with_usual_heads({name: said.get(text.attribute_map.get(name, name)) for name in SHAPE})
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]
