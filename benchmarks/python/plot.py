# SPDX-License-Identifier: Apache-2.0
"""Draws README's picture from the committed results: pip install matplotlib && python benchmarks/python/plot.py"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "fsdc", "svg.fonttype": "none", "font.size": 11})
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CASE = "LLaMA, 12 layers of 512, float32"
SHOWN = {"stock, sdpa": ("full cache", "#b0413e"), "fixed_size_kv_cache": ("fixed size, {} tokens", "#2c6e91")}


def main() -> None:
    result = json.loads((ROOT / "benchmarks/results/generate_cpu.json").read_text())
    case, machine = result["cases"][CASE], result["machine"]
    seen = [point["tokens_seen"] for point in case["lengths"]]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, (label, color) in SHOWN.items():
        label = label.format(case["cache_size"])
        taken = [point["times_per_token"][name]["median_us"] / 1e3 for point in case["lengths"]]
        held = [point["bytes"][name] / 2**20 for point in case["lengths"]]
        time.plot(seen, taken, "o-", color=color, label=label)
        memory.plot(seen, held, "o-", color=color, label=label)
    for axes, title in ((time, "ms per token"), (memory, "MiB of cache")):
        axes.set(xlabel="tokens seen", ylim=(0, None), xlim=(0, None))
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    time.legend(frameon=False)
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    figure.supxlabel(f"{CASE}, generate() on {machine['processor']}, {threads}", fontsize=8, color="gray")
    figure.savefig(ROOT / "docs/growth.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
