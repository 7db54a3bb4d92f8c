# SPDX-License-Identifier: Apache-2.0
"""A cache as a file of safetensors, and back, bit for bit.

The tensors of layer 3 are ``layers.3.keys`` and so on. All else is JSON under one name in the metadata: the number of
the format, who wrote it, the settings, what model the cache was made for, and what each layer knows on the host.
"""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .compat.capability import describe
from .compat.stock_state import read_state, write_state
from .compat.versions import transformers_version
from .layer.history import History
from .layer.layer import FixedSizeLayer
from .layer.protected_spans import read_spans
from .layer.saved import Saved
from .settings import SETTING_NAMES, FixedSizeCacheConfig

NAME = "fixed_size_kv_cache"  # of our part of the metadata
FORMAT = 1  # of it; whatever older packages would read wrongly gets a new number
PREFIX = "layers"


def save(cache: Any, path: str | os.PathLike) -> None:
    """See ``FixedSizeDynamicCache.save``."""
    safetensors = _import("save")
    _check_at_rest(cache)
    tensors, layers = {}, []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, FixedSizeLayer):
            kind, saved = "fixed", Saved.of(layer)
        else:
            kind, saved = type(layer).__name__, Saved(*read_state(layer))
        layers.append({"kind": kind, **saved.facts})
        tensors |= {f"{PREFIX}.{i}.{name}": x.detach().contiguous() for name, x in saved.tensors.items()}
    history = next((x.history for x in cache.layers if isinstance(x, FixedSizeLayer)), None)
    about = {
        "format": FORMAT,
        "version": __version__,
        "transformers": transformers_version(),
        "settings": dataclasses.asdict(cache.settings),
        "protected_spans": read_spans(cache.protected_spans, cache.settings),
        "model": cache.made_for,
        "layers": layers,
        "history": None if history is None else {"tokens": history.tokens, "hashes": history.hashes.tolist()},
    }
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # of the same file system, so that a rename is enough
    try:
        safetensors.torch.save_file(tensors, beside, {NAME: json.dumps(about)})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(make: Callable, path: str | os.PathLike, config: Any, device: Any) -> Any:
    """See ``FixedSizeDynamicCache.load``; ``make`` is the class."""
    safetensors = _import("load")
    model, config = config if isinstance(config, torch.nn.Module) else None, getattr(config, "config", config)
    if device is None:
        device = "cpu" if model is None else model.device
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            about = _read_metadata(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"load: path must be a whole file that FixedSizeDynamicCache.save() wrote; got {str(path)!r}, which is none"
            f" or was cut off ({error})"
        ) from error
    made_for = about["model"]
    if config is not None and made_for is not None:
        _check_model(config, made_for)
    spans = about["protected_spans"]
    cache = make(
        config=config,
        settings=_read_settings(about),
        protected_spans=[[tuple(span) for span in row] for row in spans] if any(spans) else None,
    )
    cache.made_for = cache.made_for or made_for
    layers = about["layers"]
    if cache.layers and len(cache.layers) != len(layers):
        raise _other_model(f"{len(layers)} layers", f"{len(cache.layers)}")
    for i, facts in enumerate(layers):
        of_layer, prefix = {}, f"{PREFIX}.{i}."
        for name in [name for name in tensors if name.startswith(prefix)]:
            of_layer[name.removeprefix(prefix)] = tensors.pop(name)
        _restore(cache, i, facts.pop("kind"), Saved(of_layer, facts), about)
    if about["history"] is not None:
        own = next(layer for layer in cache.layers if isinstance(layer, FixedSizeLayer))
        own.history = History(about["history"]["tokens"], torch.tensor(about["history"]["hashes"]))
    _check_type(model, cache)
    return cache


def _restore(cache: Any, i: int, kind: str, saved: Saved, about: dict) -> None:
    if i == len(cache.layers):
        if kind != "fixed":
            raise ValueError(
                f"load: config must be given for a model with layers of transformers' own; got None, and layer {i} is a"
                f" {kind}"
            )
        cache.layers.append(cache.new_layer(i))
    layer = cache.layers[i]
    has = "fixed" if isinstance(layer, FixedSizeLayer) else type(layer).__name__
    if has != kind:
        raise _other_model(f"a layer {i} of kind {kind}", has)
    try:
        if kind == "fixed":
            saved.restore(layer)
        else:
            write_state(layer, saved.tensors, saved.facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load: path must hold what save() wrote of layer {i}; {error}; it was written by {NAME} "
            f"{about['version']} with transformers {about['transformers']}, this is {__version__} with "
            f"{transformers_version()}"
        ) from error


def _import(who: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"FixedSizeDynamicCache.{who} needs safetensors: pip install safetensors") from error
    return safetensors


def _check_at_rest(cache: Any) -> None:
    own = [layer for layer in cache.layers if isinstance(layer, FixedSizeLayer)]
    if any(layer.staged is not None for layer in own):
        raise RuntimeError(
            "save: a cache must be between two steps; got one in the midst of a step; let the forward end, or call "
            "reset() after an error in it"
        )
    if cache.record_past or any(layer.record_past or layer.recorded is not None for layer in own):
        raise RuntimeError(
            "save: tokens that may be taken back cannot be saved; got a cache that records them; call "
            "crop() and stop_past_recording() first"
        )


def _read_metadata(path: Any, metadata: dict | None) -> dict:
    about = None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        about = json.loads(metadata[NAME])
    if not isinstance(about, dict) or not isinstance(about.get("format"), int) or "layers" not in about:
        raise ValueError(
            f"load: path must be a file that FixedSizeDynamicCache.save() wrote; got {str(path)!r}, a file of "
            "safetensors without a cache in it"
        )
    if about["format"] > FORMAT:
        raise ValueError(
            f"load: path must be of format {FORMAT} or older; got format {about['format']}, written by {NAME} "
            f"{about.get('version')}; update this package, which is {__version__}"
        )
    return about


def _read_settings(about: dict) -> FixedSizeCacheConfig:
    if unknown := sorted(about["settings"].keys() - set(SETTING_NAMES)):
        raise ValueError(
            f"load: settings must be known to this package, which is {__version__}; got {', '.join(unknown)}, written "
            f"by {NAME} {about['version']}; update this package"
        )
    return FixedSizeCacheConfig(**about["settings"])


def _other_model(saved: str, got: str) -> ValueError:
    return ValueError(f"load: config must be that of the model whose cache was saved, with {saved}; got {got}")


def _check_model(config: Any, made_for: dict) -> None:
    given = describe(config)
    for name, saved in made_for.items():
        if given.get(name) != saved:
            raise _other_model(f"{name} = {saved}", f"{given.get(name)}")


def _check_type(model: Any, cache: Any) -> None:
    """Where a model was given. Under autocast keys have another type than weights."""
    held = next((x.dtype for x in cache.layers if isinstance(x, FixedSizeLayer) and x.is_initialized), None)
    if model is None or held is None or torch.is_autocast_enabled(model.device.type):
        return
    if held != model.dtype:
        raise _other_model(f"keys in {held}", f"a model in {model.dtype}")
