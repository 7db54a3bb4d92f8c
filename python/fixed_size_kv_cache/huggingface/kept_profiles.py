# SPDX-License-Identifier: Apache-2.0
"""``head_profile=True``: the profile of a model is made when it is first asked for, and kept in a folder.

A file is named by the shape of the model and a fingerprint of its weights. What cannot be read is made anew; where
nothing can be written the profile is made each time.
"""

import functools
import hashlib
import os
import uuid
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import logging

from ..head_profile import FORMAT, HeadProfile, hash_config
from .generate_hook import processes_meet_in
from .profiling import KEPT, LENGTH, profile_heads

FOLDER = "FSDC_PROFILES"
SAMPLES = 64  # values of each weight


def kept_profile(model: nn.Module) -> HeadProfile:
    """The profile of a model by random ids: from the folder, or made now with transformers' progress bar.

    Raises:
        NotImplementedError: for what :func:`profile_heads` refuses, and for weights that are not here as plain tensors.
    """
    path = folder() / f"{hash_config(model.config)}-{fingerprint(model)}.json"
    try:
        profile = HeadProfile.load(path)
        profile.check_model(model.config)
        return profile
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        warnings.warn(f"enable: the profile kept as {path} is made anew: {error}", stacklevel=3)
    profile = profile_heads(model, progress=functools.partial(logging.tqdm, desc="profiling KV heads"))
    try:
        _keep(profile, path)
    except OSError as error:
        warnings.warn(
            f"enable: the profile cannot be kept, so the next process makes it anew: {error}; {FOLDER} names another "
            "folder",
            stacklevel=3,
        )
    return profile


def folder() -> Path:
    """Where profiles are kept."""
    if named := os.environ.get(FOLDER):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fixed_size_kv_cache/profiles"


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits for the weights of a model, and for how it is profiled.

    Of each parameter and buffer count its name, shape, type, and up to 64 values at equal distances. Training changes
    some of them; an edit of a few weights may not.
    """
    digest, shared = hashlib.sha256(f"{FORMAT} {LENGTH} {KEPT}".encode()), processes_meet_in(model)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.is_meta or is_traceable_wrapper_subclass(weight) or shared:
            raise NotImplementedError(
                "enable: head_profile=True must find all weights in this process, as plain tensors; got "
                f"{name} as {'a meta tensor' if weight.is_meta else type(weight).__name__}; make a profile with "
                "profile_heads or fsdc profile, and name its file"
            )
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, -(-len(flat) // SAMPLES))].cpu().contiguous()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _keep(profile: HeadProfile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # in the same folder, so that a rename is enough
    try:
        profile.save(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
