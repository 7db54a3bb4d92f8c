# SPDX-License-Identifier: Apache-2.0
"""What a layer of transformers' own holds, in any version: windows, and the states of linear layers.

Their attributes are tensors, numbers, a type, a device, or a dict of such by the number of a state.
"""

from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, type(None))


def read_state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The attributes that are tensors, by name, and the others, for JSON."""
    tensors, others = {}, {}
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            tensors |= {f"{name}.{number}": x for number, x in value.items() if isinstance(x, Tensor)}
            others[name] = {"numbered": {n: None if isinstance(x, Tensor) else _plain(x) for n, x in value.items()}}
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            others[name] = _plain(value)
    return tensors, others


def write_state(layer: Any, tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
    """Into a layer that is as it was made.

    Raises:
        ValueError: where it has other attributes, or another window.
    """
    known = vars(layer).keys() | {"dtype", "device", "is_initialized"}  # some versions set these with the first tokens
    names = others.keys() | {name for name in tensors if "." not in name}
    if differ := sorted((vars(layer).keys() - names) | (names - known)):
        raise ValueError(f"a {type(layer).__name__} must have the attributes of this version; {differ[0]} differs")
    window = getattr(layer, "sliding_window", None)
    if others.get("sliding_window") != window:
        raise ValueError(f"its window must have {window} tokens; got {others.get('sliding_window')}")
    device = next((x.device for x in tensors.values()), None)
    with torch.inference_mode(False):
        tensors = {name: x.clone() for name, x in tensors.items()}
    for name, value in others.items():
        if isinstance(value, dict) and "numbered" in value:
            value = {int(n): tensors.pop(f"{name}.{n}", x) for n, x in value["numbered"].items()}
        elif isinstance(value, dict):
            value = device if "device" in value else getattr(torch, value["dtype"])
        setattr(layer, name, value)
    for name, x in tensors.items():
        setattr(layer, name, x)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if not isinstance(value, PLAIN):
        raise TypeError(
            f"save: layers of transformers' own must hold tensors and numbers; got a {type(value).__name__}"
        )
    return value
