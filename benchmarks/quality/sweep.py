#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Judges the knobs of the score rule: recall of the embedded model and divergence on stories260K.

    python benchmarks/quality/sweep.py --json benchmarks/results/score_rule.json

Every combination reads the same texts at every size. Recall: the share of questions answered right, per task.
Divergence: mean KL of the next token from the full cache's, where the model is at hand (see tests/python/stories.py).
Decay, prior and redundancy are tried together, the other knobs one at a time. Twenty minutes on two cores.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import transformers

from fixed_size_kv_cache.recall import contest, language
from fixed_size_kv_cache.settings import FixedSizeCacheConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python"))

SIZES = (24, 48, 96)
FORGETTING = (0.0, 1.0, 2.0, 4.0, 8.0)  # a in gamma = 1 - a / C
PRIOR = (0.0, 0.02, 0.05, 0.1, 0.2)
REDUNDANCY = (0.0, 0.9, 0.95, 1.0)
KNOBS = ("score_decay", "score_prior", "redundancy", "value_weight", "sink_tokens", "recent_tokens")
PLAIN = dict(score_decay=1.0, score_prior=0.0, value_weight=False, redundancy=0.0)


def combinations(C: int) -> list[tuple[str, dict]]:
    """(name, settings) of all that is tried with ``C`` tokens."""
    tried = [
        ("default", {}),
        ("last tokens", contest.rule("last tokens", C)),
        ("sinks and last tokens", dict(policy="streaming")),
        ("random", dict(policy="random")),
        ("random, recent C/2", contest.rule("random", C)),
        ("accumulated attention, recent C/4", dict(PLAIN, recent_tokens=C // 4)),
        ("accumulated attention, recent C/2", dict(PLAIN, recent_tokens=C // 2)),
        ("no value weight", dict(value_weight=False)),
        ("no sinks", dict(sink_tokens=0)),
        ("recent C/8", dict(recent_tokens=C // 8)),
        ("recent C/2", dict(recent_tokens=C // 2)),
        ("recent 3C/4", dict(recent_tokens=3 * C // 4)),
    ]
    for a, prior, rho in itertools.product(FORGETTING, PRIOR, REDUNDANCY):
        knobs = dict(score_decay=1 - a / C, score_prior=prior, redundancy=rho)
        tried.append((f"gamma = 1 - {a:g}/C, p = {prior:g}, rho = {rho:g}", knobs))
    return tried


class Recall:
    """Texts of all three tasks, read at once."""

    def __init__(self, length: int, texts: int, seed: int) -> None:
        made = [contest.make_texts(task, length, texts, seed) for task in language.TASKS]
        self.texts, self.ids = [texts for texts, _ in made], torch.cat([ids for _, ids in made])

    def judge(self, cache_size: int, settings: dict) -> dict[str, float]:
        reader = contest.Contender.make("fixed size", cache_size, **settings)
        guesses = torch.stack(list(reader.read(self.ids)), dim=1)
        found, start = {}, 0
        for task, texts in zip(language.TASKS, self.texts, strict=True):
            rows = slice(start, start + len(texts))
            right, asked = contest.count_right(texts, self.ids[rows], guesses[rows])
            found[task], start = round(right / asked, 4), start + len(texts)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--length", type=int, default=512, help="words of a text")
    parser.add_argument("--texts", type=int, default=24, help="texts of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    recall = Recall(arguments.length, arguments.texts, arguments.seed)
    divergence = story_divergence()
    found, began = [], time.time()
    for cache_size in arguments.sizes:
        for name, settings in combinations(cache_size):
            full = FixedSizeCacheConfig(cache_size=cache_size, **settings)
            knobs = {knob: getattr(full, knob) for knob in KNOBS} if full.policy == "attention" else {}
            row = dict(cache_size=cache_size, rule=name, **knobs, recall=recall.judge(cache_size, settings))
            row["kl"] = divergence(cache_size, settings) if divergence else None
            found.append(row)
            print(f"{time.time() - began:5.0f} s  C={cache_size}  {name}  {row['recall']}  KL {row['kl']}", flush=True)
            if arguments.json:
                arguments.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")


def story_divergence():
    """What measures the divergence on stories260K, None where the model is missing."""
    from stories import FOLDER

    if not FOLDER.exists():
        print(f"no divergence: the model stories260K is not at {FOLDER}")
        return None
    import test_quality

    told = test_quality.tell()
    return lambda cache_size, settings: round(test_quality.divergence(told, cache_size, **settings), 5)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
