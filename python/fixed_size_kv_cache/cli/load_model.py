# SPDX-License-Identifier: Apache-2.0
"""The model and tokenizer of ``fsdc generate``, the profile of its heads, and what it says of those it cannot use."""

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging

from ..dynamic_cache import trained_positions
from ..head_profile import HeadProfile
from ..recall import MODEL


class Refused(Exception):
    """What the user asked for cannot be done; the text says why."""


def load(name: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer: a folder, a name on the Hub, or None for the embedded model; on a GPU where there is one, if
    the device is "auto".

    Raises:
        Refused: where there is no such model, where it is not a decoder, or where it cannot be reached.
    """
    where = str(MODEL) if name is None else name
    _check_name(where)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1).to(device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"--device {device}: {one_line(error)}") from error
    cached_only = not Path(where).is_dir() and not constants.HF_HUB_OFFLINE and not _hub_answers()
    options = {"local_files_only": cached_only, "trust_remote_code": False}  # None would ask on stdout
    try:
        config = AutoConfig.from_pretrained(where, **options)
        _check_decoder(config, where)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model, info = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
        _check_weights(model, info["missing_keys"], where)
        return model.to(device).eval(), tokenizer
    except Refused:
        raise
    except Exception as error:  # missing, damaged, unreachable, too large: transformers has no common class for them
        if "trust_remote_code" in str(error):
            raise Refused(
                f"--model must be of a family that transformers has; {where} brings code of its own"
            ) from error
        raise Refused(f"--model {where}: {one_line(error)}") from error


def load_profile(given: str | None, model: Any) -> HeadProfile | None:
    """What ``--head-profile`` means: a file, or "auto" for a profile made now, or kept since it was.

    Raises:
        Refused: for a file that is none, and for a model that cannot be profiled.
    """
    if given is None:
        return None
    from ..huggingface.kept_profiles import kept_profile

    if sys.stderr.isatty():
        logging.enable_progress_bar()  # it takes seconds to a minute
    try:
        return kept_profile(model) if given == "auto" else HeadProfile.load(given)
    except (NotImplementedError, OSError, ValueError) as error:
        raise Refused(f"--head-profile {given}: {one_line(error)}") from error
    finally:
        logging.disable_progress_bar()


def learned_positions(model: Any) -> int | None:
    """How many positions a model has learned a vector for, None where it has none that end. Longer texts are errors."""
    positions, words = trained_positions(model.config), model.get_input_embeddings()
    for part in model.modules() if positions is not None else ():
        if isinstance(part, nn.Embedding) and part is not words and 0 <= part.num_embeddings - positions <= 2:
            return positions  # or up to two more: OPT's begin at the third
    return None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_name(name: str) -> None:
    if not name:
        raise Refused("--model must be a folder with a config.json or a name on the Hub; got ''")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise Refused(
                f"--model must be a folder with a config.json or a name on the Hub; {name} has no config.json"
            )
    elif Path(name).exists() or name.startswith((".", "~")) or Path(name).is_absolute() or len(Path(name).parts) > 2:
        raise Refused(f"--model must be a folder with a config.json or a name on the Hub; there is no folder {name}")


def _hub_answers() -> bool:
    """Asks once: huggingface_hub itself tries for half a minute before it says that there is no network."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return True
    except Exception as error:  # requests' or httpx's, as the version has it
        print(f"fsdc: {constants.ENDPOINT} does not answer ({one_line(error)})", file=sys.stderr)
        return False


def _check_decoder(config: Any, where: str) -> None:
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    if config.is_encoder_decoder or is_encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Refused(f"--model must be a decoder-only language model; {where} is {config.model_type}")


def _check_weights(model: Any, missing: Any, where: str) -> None:
    """transformers fills weights that are missing with random numbers. Tied ones are not missing."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    lacking = sorted(name for name in missing if name in weights and id(weights[name]) not in loaded)
    if lacking:
        raise Refused(
            f"--model must be saved with all weights of {type(model).__name__}; {where} lacks {len(lacking)}, "
            f"{lacking[0]} the first"
        )
