# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of README.md and docs/ from the committed results, so that they cannot drift apart.

    python benchmarks/python/tables.py

A block between ``<!-- figures NAME: ... -->`` and ``<!-- end of figures -->`` is written by the function ``NAME``.
"""

import json
import re
from pathlib import Path

import noise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = ("README.md", "docs/eviction.md")
BLOCK = re.compile(r"(<!-- figures (\w+): .*? -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def rendered(document: str) -> str:
    return BLOCK.sub(lambda block: block[1] + globals()[block[2]]() + "\n" + block[3], document)


def _read(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the columns after the first ``left`` are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def truncate() -> str:
    """Time per call of truncate and its contenders."""
    result = _read("truncate_cpu")
    machine, cases = result["machine"], result["cases"]
    contenders = list(next(iter(cases.values()))["times"])
    rows = []
    for name, case in cases.items():
        rows.append([name])
        for contender in contenders:
            faster = case["times_faster_than"].get(contender)
            ratio = f" ({faster:.1f}x ours)" if faster else ""
            rows[-1].append(f"{case['times'][contender]['median_us']:.0f} us{ratio}")
    where = f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_isa']}, torch {machine['torch']}"
    return (
        _table(["truncate on the CPU, time per call", *contenders], rows)
        + "\n\nMedians of contenders taking turns in one process, outputs allocated anew. Warm cache: each has just "
        + f"been called three times; cold: the others have. {where}."
    )


def generate() -> str:
    """Time per token of whole generate(), ours and stock, as the text grows."""
    result = _read("generate_cpu")
    machine, rows = result["machine"], []
    for name, case in result["cases"].items():
        for point in case["lengths"]:
            stock, ours = (taken["median_us"] / 1e3 for taken in point["times_per_token"].values())
            ratio = f"{point['of_stock']:.2f}x stock"
            first = f"{name}, C={case['cache_size']}" if point is case["lengths"][0] else ""
            rows.append([first, f"{point['tokens_seen']}", f"{stock:.2f}", f"{ours:.2f}", ratio])
    where = f"{machine['processor']}, {machine['threads']} thread, torch {machine['torch']}"
    head = ["model", "tokens seen", "full cache", "fixed size", ""]
    return _table(head, rows) + f"\n\nMedians of both taking turns; {where}."


def demo() -> str:
    """Recall of the demonstration."""
    result = _read("demo")
    found = {(row["task"], row["rule"], row["cache_size"]): row["right"] / row["asked"] for row in result["recall"]}
    tasks, rules = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    sizes = sorted({size for _, _, size in found if size})
    rows = []
    for rule in rules:
        cells = [found[task, rule, None if rule == "full cache" else size] for task in tasks for size in sizes]
        rows.append([f"**{rule}, ours**" if rule == "fixed size" else rule, *(f"{share:.0%}" for share in cells)])
    return _table(["tokens held", *(f"{task} {size}" for task in tasks for size in sizes)], rows)


KNOBS = {  # a name of benchmarks/quality/sweep.py, and what the table calls it
    "default": "**default**: gamma = 1 - 4/C, p = .05, rho = .95",
    "gamma = 1 - 4/C, p = 0, rho = 0.95": "no prior, p = 0",
    "gamma = 1 - 4/C, p = 0.02, rho = 0.95": "p = .02",
    "gamma = 1 - 4/C, p = 0.1, rho = 0.95": "p = .1",
    "gamma = 1 - 4/C, p = 0.2, rho = 0.95": "p = .2",
    "gamma = 1 - 0/C, p = 0.05, rho = 0.95": "no decay, gamma = 1",
    "gamma = 1 - 2/C, p = 0.05, rho = 0.95": "gamma = 1 - 2/C",
    "gamma = 1 - 8/C, p = 0.05, rho = 0.95": "gamma = 1 - 8/C",
    "gamma = 1 - 4/C, p = 0.05, rho = 0": "no redundancy, rho = 0",
    "gamma = 1 - 4/C, p = 0.05, rho = 0.9": "rho = .9",
    "gamma = 1 - 4/C, p = 0.05, rho = 1": "rho = 1",
    "no value weight": "no value weight",
    "no sinks": "no sinks",
    "recent C/8": "C/8 recent",
    "recent C/2": "C/2 recent",
    "recent 3C/4": "3C/4 recent",
    "accumulated attention, recent C/2": "accumulated attention (H2O), C/2 recent",
    "last tokens": "last tokens only",
    "sinks and last tokens": "4 sinks and last tokens",
    "random, recent C/2": "random, C/2 recent",
}


def knobs() -> str:
    """Each knob of the score rule by itself, and the baselines."""
    found = {(row["rule"], row["cache_size"]): row for row in _read("score_rule")["rows"]}
    sizes = sorted({size for _, size in found})
    rows = []
    for name, shown in KNOBS.items():
        cases = [found[name, size] for size in sizes]
        recall = [" / ".join(_share(share) for share in case["recall"].values()) for case in cases]
        rows.append([shown, *(f"{case['kl']:.4f}".lstrip("0") for case in cases), *recall])
    return _table(["rule", *(f"KL, C={size}" for size in sizes), *(f"recall, C={size}" for size in sizes)], rows)


def rivals() -> str:
    """What comes close to the default, with the noise of each difference; what is within it is in brackets."""
    result, found = _read("rivals"), {}
    for row in result["rows"]:
        found.setdefault(row["rule"], []).append(row)
    default, rows = found["default"], []
    for name, own in found.items():
        share = sum(sum(row["recall"].values()) / len(row["recall"]) for row in own) / len(own)
        differences = (noise.of_recall(own, default), "points"), (noise.of_divergence(own, default), "%")
        cells = ["" if own is default else _difference(found, unit) for found, unit in differences]
        rows.append([f"**{name}**" if own is default else name, f"{share:.3f}".lstrip("0"), *cells])
    head = ["rule", "recall", "recall, to the default", "KL, to the default"]
    return _table(head, rows) + (
        f"\n\n{result['texts']} texts of each task, {result['stories']} stories, none of them those that the defaults "
        "were chosen on; means over tasks and sizes, of KL the geometric one; ± one standard error, in brackets where "
        "the difference is below two."
    )


def _difference(difference: noise.Difference, unit: str) -> str:
    shown = f"{difference.value:+.1f} ± {difference.error:.1f} {unit}"
    return shown if difference.is_real else f"({shown})"


def _share(share: float) -> str:
    return "1." if share >= 0.995 else f"{share:.2f}".lstrip("0")


if __name__ == "__main__":
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rendered(path.read_text()))
