# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of README.md from the committed results, so that they cannot drift apart.

python benchmarks/python/readme_table.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = "benchmarks/results/truncate_cpu.json"
BLOCK = re.compile(r"(<!-- figures: .*? -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def table() -> str:
    result = json.loads((ROOT / RESULT).read_text())
    machine, cases = result["machine"], result["cases"]
    contenders = list(next(iter(cases.values()))["times"])
    lines = [
        "| truncate on the CPU, time per call | " + " | ".join(contenders) + " |",
        "| --- |" + " ---: |" * len(contenders),
    ]
    for name, case in cases.items():
        cells = []
        for contender in contenders:
            faster = case["times_faster_than"].get(contender)
            ratio = f" ({faster:.1f}x ours)" if faster else ""
            cells.append(f"{case['times'][contender]['median_us']:.0f} us{ratio}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    where = f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_isa']}, torch {machine['torch']}"
    lines += ["", f"Medians of contenders taking turns in one process, outputs allocated anew; {where}.", ""]
    return "\n".join(lines)


def rendered(readme: str) -> str:
    return BLOCK.sub(lambda block: block[1] + table() + block[2], readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
