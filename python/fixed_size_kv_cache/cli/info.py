# SPDX-License-Identifier: Apache-2.0
"""``fsdc info``: what is installed, what was built, and what computes the steps of a layer."""

import json
import platform

import torch

from .. import _C, __version__
from ..compat import versions
from ..layer import chunk, decode
from ..operators.load import BUILD
from ..operators.register import DEVICES, OPERATORS
from ..settings import POLICIES, FixedSizeCacheConfig


def show(verbose: bool, as_json: bool) -> None:
    """The command. One line for each fact, however long: it is pasted, and read by programs."""
    found = collect()
    if verbose:
        found |= {"runs on": operators(), "steps": steps()}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    lines = {}
    for name, value in found.items():
        if isinstance(value, dict):
            lines |= {f"{key}": text for key, text in value.items()}
        else:
            lines[name] = ", ".join(value) if isinstance(value, list) else value
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


def collect() -> dict[str, str | list[str]]:
    """Versions, the build, and this machine."""
    found = versions.transformers_version()
    support = versions.transformers_support(found)
    return {
        "fixed_size_kv_cache": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built with {BUILD['torch']})",
        "transformers": support if found is None else f"{found} ({support}; at least {versions.OLDEST_TRANSFORMERS})",
        "CUDA kernels": f"CUDA {BUILD['cuda']}" if BUILD["cuda"] else f"none: {BUILD['without_cuda_because']}",
        "CUDA architectures": BUILD["cuda_architectures"] or "none",
        "CUDA devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none",
        "CPU instruction set": _C.cpu_isa(),
        "compiler": _C.build_info()["compiler"],
        "operators": [f"torch.ops.fsdc.{name}" for name in OPERATORS if hasattr(torch.ops.fsdc, name)],
    }


def operators() -> dict[str, str]:
    """What runs each operator on a device."""

    on_cuda = f"kernel for {BUILD['cuda_architectures']}" if BUILD["cuda"] else "refused, this build has no kernels"
    return {f"torch.ops.fsdc.{name}": f"cpu: {_C.cpu_isa_of(name)}; cuda: {on_cuda}" for name in OPERATORS}


def steps() -> dict[str, str]:
    """How a layer computes its steps, by device and policy: ``fused`` by an operator of its own, or plain torch."""
    found: dict[str, dict[str, list[str]]] = {}
    for device in DEVICES:
        for policy in POLICIES:
            settings = FixedSizeCacheConfig(cache_size=64, include_skipped=False, free_memory=False, policy=policy)
            is_fused = {
                "decode": decode.is_fused(settings, torch.device(device)),
                "chunk": chunk.is_fused(torch.device(device)),
            }
            for step, fused in is_fused.items():
                by_path = found.setdefault(f"{step} step on {device}", {})
                path = f"fused, {step}_attention_" if fused else "plain torch, accumulate_scores_"
                by_path.setdefault(path + ("; then truncate" if step == "chunk" else ""), []).append(policy)
    return {
        step: "; ".join(
            path if len(by_path) == 1 else f"policy {' or '.join(policies)}: {path}"
            for path, policies in by_path.items()
        )
        for step, by_path in found.items()
    }
