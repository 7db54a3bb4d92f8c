# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of README.md and docs/ from the committed results, so that they cannot drift apart.

    python benchmarks/python/tables.py

A block between ``<!-- figures NAME: ... -->`` and ``<!-- end of figures -->`` is written by the function ``NAME``.
"""

import json
import re
from collections.abc import Container
from math import prod
from pathlib import Path
from statistics import fmean, median

import noise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = ("README.md", "docs/eviction.md", "docs/performance.md", "docs/vllm.md")
BLOCK = re.compile(r"(<!-- figures (\w+): .*? -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def rendered(document: str) -> str:
    return BLOCK.sub(lambda block: block[1] + globals()[block[2]]() + "\n" + block[3], document)


def _read(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


def _where(machine: dict[str, object], *more: str) -> str:
    """The machine of some figures."""
    return ", ".join([machine["processor"], f"{machine['threads']} thread", *more, f"torch {machine['torch']}"])


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
    where = _where(machine)
    head = ["model", "tokens seen", "full cache", "fixed size", ""]
    return _table(head, rows) + f"\n\nMedians of both taking turns; {where}."


NOISE = "± one standard error, in brackets where the difference is below two"
DEFAULT = "gamma = 1 - 4/C, p = 0.02, rho = 0.95"  # names of benchmarks/quality/real_rules.py
PLAIN = "gamma = 1 - 2/C, p = 0, rho = 0"
LARGER_PRIOR = "gamma = 1 - 4/C, p = 0.05, rho = 0.95"
MEAN = "mean over the queries that saw it"
UNEQUAL = "unequal, floor C/4: "
REAL = {  # and what the tables call them
    "full cache": "full cache",
    DEFAULT: f"**default**: {DEFAULT}",
    "accumulated attention (H2O)": "accumulated attention (H2O), C/2 recent",
    "4 sinks and last tokens": "4 sinks and last tokens",
    "random": "random, C/2 recent",
}
BY_PROFILE = {
    DEFAULT: "heads of one size",
    "equal in a layer, layers as PyramidKV guesses": "layers as PyramidKV guesses",
    "equal in a layer, layers by the profile": "layers by the profile, heads of a layer equal",
    "unequal, floor C/2: " + DEFAULT: "heads by the profile, at least C/2",
    UNEQUAL + DEFAULT: "**heads by the profile, at least C/4**",
    "unequal, floor C/8: " + DEFAULT: "heads by the profile, at least C/8",
    UNEQUAL + LARGER_PRIOR: "C/4, within a head p = 0.05",
    UNEQUAL + PLAIN: f"C/4, within a head {PLAIN}",
    UNEQUAL + MEAN: "C/4, within a head the mean over the queries that saw a token",
    **{
        f"unequal, floor C/4, profile of {what}": f"C/4, profile of {what}"
        for what in ("the first text", "the second text", "half as many tokens", "random ids", "other random ids")
    },
}


def _real(measure: str, only: Container[str] = (), sizes: Container[int] = ()) -> dict[tuple[str, int | None], dict]:
    """Rows of a measure by rule and size, of those rules and sizes, with figures of the texts that all have read."""
    rows = {
        (row["rule"]["name"], row["cache_size"]): row
        for row in _read("real_model")["rows"]
        if row["measure"] == measure
        and (not only or row["rule"]["name"] in only)
        and (not sizes or row["cache_size"] in (None, *sizes))
    }
    texts = min(len(row["tokens"]) for row in rows.values())
    return {key: _first(row, texts) for key, row in rows.items()}


def _kl(row: dict | None) -> str:
    return "" if row is None or row["cache_size"] is None else f"{fmean(row['kl']):.3f}".lstrip("0")


def _facts(row: dict | None) -> str:
    return "" if row is None else f"{sum(row['right'])}"


def _answered(row: dict) -> dict:
    """A row as ``noise`` takes it."""
    return row | {"answers": {"facts": list(zip(row["right"], row["asked"], strict=True))}}


def _told(found: dict) -> str:
    row = found["full cache", None]
    return f"{len(row['right'])} texts with {row['asked'][0]} facts each, {fmean(row['tokens']):.0f} tokens"


def real_model() -> str:
    """What a real model keeps of its texts, with heads of one size and of sizes by the profile."""
    sizes = (128, 256)
    shown = {
        "full cache": "full cache",
        UNEQUAL + DEFAULT: "**ours, heads of different size by the profile**",
        **REAL,
        DEFAULT: "**ours, heads of one size**",
    }
    found, rows = _real("prompt", shown, sizes), []
    for name in shown:
        cases = [found["full cache", None] if name == "full cache" else found[name, C] for C in sizes]
        rows.append([shown[name], *map(_facts, cases), *map(_kl, cases)])
    unequal, equal = ([_answered(found[name, C]) for C in sizes] for name in (UNEQUAL + DEFAULT, DEFAULT))
    more, nearer = noise.of_recall(unequal, equal), noise.of_divergence(unequal, equal, "kl")
    asked = sum(found["full cache", None]["asked"])
    head = [f"of {asked} facts", *(f"right, C={C}" for C in sizes), *(f"KL, C={C}" for C in sizes)]
    return _table(head, rows) + (
        f"\n\n{_told(found)}. Heads of different size, text by text: {_difference(more, 'points')} of facts, "
        f"{_difference(nearer, '%')} of KL, ± one standard error."
    )


def presses() -> str:
    """The best three of kvpress's rules beside ours, on the texts that they have read."""
    sizes, result = (128, 256), _read("presses")
    theirs = {(row["rule"]["name"], row["cache_size"]): row for row in result["rows"]}
    texts = len(theirs["full cache", None]["kl"])
    whole = {name for name, C in theirs if C and all(len(theirs[name, each]["kl"]) == texts for each in sizes)}
    best = sorted(whole, key=lambda name: prod(fmean(theirs[name, C]["kl"]) for C in sizes))[:3]
    shown = {UNEQUAL + DEFAULT: "**ours, heads of different size**", DEFAULT: "**ours, heads of one size**"}
    found = _real("prompt", shown, sizes)
    rows, ours = [], [_first(found[DEFAULT, C], texts) for C in sizes]
    for name in (*shown, *best):
        cases = [_first(found[name, C], texts) if name in shown else theirs[name, C] for C in sizes]
        difference = "" if name == DEFAULT else _difference(noise.of_divergence(cases, ours, "kl"), "%")
        rows.append([shown.get(name, f"{name}, kvpress"), *map(_facts, cases), *map(_kl, cases), difference])
    full = theirs["full cache", None]
    head = [f"of {sum(full['asked'])} facts", *(f"right, C={C}" for C in sizes), *(f"KL, C={C}" for C in sizes)]
    return _table([*head, "to heads of one size"], rows) + (
        f"\n\nThe first {texts} of these texts, of which the full cache answers {sum(full['right'])}; kvpress "
        f"{result['kvpress']}, {NOISE}."
    )


def _first(row: dict, texts: int) -> dict:
    """A row of figures of the first texts only."""
    return {name: found[:texts] if isinstance(found, list) else found for name, found in row.items()}


def real_rules() -> str:
    """Rules with heads of one size, each against the default, text by text."""
    found = _real("prompt")
    names = {name for (name, C), row in found.items() if C and row["rule"]["heads"] == "equal"}
    ordered = [*REAL, *sorted(names - REAL.keys())]
    default, rows = [found[DEFAULT, C] for C in (128, 256)], []
    for name in ordered:
        if name == "full cache":
            continue
        difference = noise.of_divergence([found[name, C] for C in (128, 256)], default, "kl")
        compared = "" if name == DEFAULT else _difference(difference, "%")
        cases = [found.get((name, C)) for C in (64, 128, 256, 512)]
        rows.append([REAL.get(name, name), *map(_kl, cases), compared, *map(_facts, cases)])
    full = found["full cache", None]
    head = [
        "rule",
        *(f"KL, C={C}" for C in (64, 128, 256, 512)),
        "to the default",
        *(f"facts, C={C}" for C in (64, 128, 256, 512)),
    ]
    return _table(head, rows) + (
        f"\n\n{_told(found)}; the full cache answers {sum(full['right'])} of {sum(full['asked'])}. To the default: at "
        f"C=128 and 256, {NOISE}."
    )


def real_heads() -> str:
    """Heads of different size."""
    found, rows = _real("prompt"), []
    for name, shown in BY_PROFILE.items():
        difference = noise.of_divergence([found[name, 256]], [found[DEFAULT, 256]], "kl")
        compared = "" if name == DEFAULT else _difference(difference, "%")
        cases = [found.get((name, C)) for C in (64, 128, 256, 512)]
        rows.append([shown, *map(_kl, cases), compared, *map(_facts, cases)])
    head = [
        "sizes of heads",
        *(f"KL, C={C}" for C in (64, 128, 256, 512)),
        "to one size, C=256",
        *(f"facts, C={C}" for C in (64, 128, 256, 512)),
    ]
    profiles = {
        name: [error for layer in layers for error in layer] for name, layers in _read("real_model")["profiles"].items()
    }
    alike = ", ".join(
        f"of {name} {noise.rank_correlation(profiles['usual'], other):.2f}"
        for name, other in profiles.items()
        if name != "usual"
    )
    full = found["full cache", None]
    return _table(head, rows) + (
        f"\n\nWithin a head the default, where nothing else is said. {_told(found)}; full cache: "
        f"{sum(full['right'])} of {sum(full['asked'])}. "
        f"Rank correlation of the profile of two texts with that {alike}."
    )


def real_measures() -> str:
    """The other measures: a stream, longer texts, a dialogue."""
    stream, long, talk = _real("stream"), _real("long"), _real("dialogue")
    rows, shown = [], {**REAL, UNEQUAL + DEFAULT: "**default, heads by the profile**"}
    equal = DEFAULT, LARGER_PRIOR, PLAIN, MEAN, "accumulated attention (H2O)", "4 sinks and last tokens"
    for name in ("full cache", *equal, UNEQUAL + DEFAULT):
        sized = [(name, None if name == "full cache" else C) for C in (128, 256, 512)]
        cells = [_kl(stream.get(sized[0])), "", _kl(long.get(sized[1])), _kl(long.get(sized[2]))]
        if name != DEFAULT and sized[0] in stream:
            cells[1] = _difference(noise.of_divergence([stream[sized[0]]], [stream[DEFAULT, 128]], "kl"), "%")
        cells += [_facts(long.get(sized[1])), _facts(long.get(sized[2])), _facts(talk.get(sized[1]))]
        rows.append([shown.get(name, name), *cells])
    asked = [sum(each["full cache", None]["asked"]) for each in (long, talk)]
    head = [
        "rule",
        "KL, stream, C=128",
        "to the default",
        "KL, long, C=256",
        "C=512",
        f"of {asked[0]} facts, long, C=256",
        "C=512",
        f"of {asked[1]} facts, dialogue, C=256",
    ]
    said = f"Stream: {len(stream[PLAIN, 128]['kl'])} texts. Long: {_told(long)}. Dialogue: {_told(talk)}."
    return _table(head, rows) + f"\n\n{said} Empty: not measured. To the default: {NOISE}."


def prompt() -> str:
    """Time to read a prompt, ours of stock's, and the memory that it takes."""
    result = _read("prompt_cpu")
    machine, rows = result["machine"], []
    for name, points in result["cases"].items():
        for point in points:
            stock, *ours = point["times"]
            peaks = point.get("peak_bytes", {})
            rows.append([name if point is points[0] else "", f"{point['tokens']}"])
            rows[-1].append(f"{point['times'][stock]['median_us'] / 1e3:.0f} ms")
            rows[-1] += [f"{point['of_stock'][size]:.2f}x" for size in ours]
            rows[-1].append(" / ".join(f"{most / 2**20:.0f}" for most in peaks.values()) + " MiB" if peaks else "")
    where = _where(machine, machine["cpu_isa"])
    head = [
        "6 layers of 512, stories260K",
        "tokens",
        "full cache",
        *(f"{size}, of that time" for size in ours),
        "memory of the three",
    ]
    return _table(head, rows) + (
        "\n\n`generate(max_new_tokens=1)`; medians of contenders taking turns; the most memory beyond the model's, "
        f"each in a process of its own. {where}."
    )


def decode_attention() -> str:
    """decode_attention_ and its contenders."""
    result = _read("decode_attention_cpu")
    machine, rows = result["machine"], []
    contenders = ["original step in Python", "DynamicCache + sdpa", "static slots + sdpa"]
    for name, case in result["cases"].items():
        if "share_of_read_floor" not in case:
            continue
        faster = [f"{case['times_faster_than'][other]:.1f}x" for other in contenders]
        ours = case["times"]["fsdc.decode_attention_"]["median_us"]
        rows.append([name, f"{ours:.0f} us", f"{case['share_of_read_floor']:.0%}", *faster])
    head = ["a decode step", "decode_attention_", "share of the read floor", *(f"faster than {x}" for x in contenders)]
    where = f"{machine['processor']}, {machine['cpu_isa']}, torch {machine['torch']}"
    return (
        _table(head, rows) + f"\n\nMedians of contenders taking turns, each with keys and values of its own; {where}."
    )


def chunk_attention() -> str:
    """chunk_attention_ of attention without votes."""
    result = _read("chunk_attention_cpu")
    machine, rows = result["machine"], []
    sdpa, ours, with_redundancy = next(iter(result["cases"].values()))["times"]
    for name, case in result["cases"].items():
        of_sdpa = [f"{case['times_of_sdpa'][who]:.2f}x" for who in (ours, with_redundancy)]
        rows.append([name, f"{case['times'][sdpa]['median_us'] / 1e3:.2f} ms", *of_sdpa])
    where = _where(machine, machine["cpu_isa"])
    head = ["a chunk", sdpa, f"{ours}, of that time", "with redundancy"]
    return _table(head, rows) + f"\n\nMedians of contenders taking turns; {where}."


def serving() -> str:
    """vLLM with the plugin and without."""
    result = _read("vllm_cpu")
    machine, rows = result["machine"], []
    for case in result["cases"]:
        context, requests, engines = case["context"], case["requests"], case["engines"].values()
        reads, steps = ([median(x[what]) for x in engines] for what in ("prefill_seconds", "step_seconds"))
        rows.append([f"{context}", f"{requests}", *(f"{requests * context / x:.0f}" for x in reads)])
        rows[-1] += [f"{1e3 * x:.0f} ms" for x in steps]
    names, rounds = result["requests_that_fit"], min(len(x["step_seconds"]) for x in engines)
    head = ["tokens of a prompt", "requests"]
    head += [f"{what}, {name}" for what in ("prefill, tokens per second", "decode, a step") for name in names]
    fit = " and ".join(f"{int(count)} ({name})" for name, count in names.items())
    where = f"{_where(machine)}, vLLM {result['vllm']}"
    return _table(head, rows) + (
        f"\n\n12 layers of 512, float32, C={result['cache_size']}; both engines taking turns, medians of {rounds}; "
        f"{where}. By vLLM's log {result['memory_bytes'] / 2**30:.0f} GiB has room for {fit} requests of "
        f"{result['longest_context']} tokens at once."
    )


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
    "default": "**default**: gamma = 1 - 4/C, p = .02, rho = .95",
    "gamma = 1 - 4/C, p = 0, rho = 0.95": "no prior, p = 0",
    "gamma = 1 - 4/C, p = 0.05, rho = 0.95": "p = .05",
    "gamma = 1 - 4/C, p = 0.1, rho = 0.95": "p = .1",
    "gamma = 1 - 4/C, p = 0.2, rho = 0.95": "p = .2",
    "gamma = 1 - 0/C, p = 0.02, rho = 0.95": "no decay, gamma = 1",
    "gamma = 1 - 2/C, p = 0.02, rho = 0.95": "gamma = 1 - 2/C",
    "gamma = 1 - 8/C, p = 0.02, rho = 0.95": "gamma = 1 - 8/C",
    "gamma = 1 - 4/C, p = 0.02, rho = 0": "no redundancy, rho = 0",
    "gamma = 1 - 4/C, p = 0.02, rho = 0.9": "rho = .9",
    "gamma = 1 - 4/C, p = 0.02, rho = 1": "rho = 1",
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
        f"were chosen on; means over tasks and sizes, of KL the geometric one; {NOISE}."
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
