#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Judges the knobs of the score rule: recall of the embedded model and divergence on stories260K.

    python benchmarks/quality/sweep.py --json benchmarks/results/score_rule.json
    python benchmarks/quality/sweep.py --rivals --texts 64 --stories 64 --seed 2 --json benchmarks/results/rivals.json

Every combination reads the same texts at every size. Recall: the share of questions answered right, per task.
Divergence: mean KL of the next token from the full cache's, where the model is at hand (see tests/python/stories.py).
Decay, prior and redundancy are tried together, the other knobs one at a time. Twenty minutes on two cores.

``--rivals`` tries only the default and what came close to it, on texts that no default was chosen on, and keeps the
figures of each text: how much of a difference is noise follows from them (benchmarks/python/noise.py). Seven minutes of
one core.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import fmean

import torch
import transformers

from fixed_size_kv_cache.recall import contest, language
from fixed_size_kv_cache.settings import FixedSizeCacheConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/python"), str(ROOT / "benchmarks/python")]

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
        ("sinks and last tokens", dict(policy="streaming", sink_tokens=4)),
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


def rivals(C: int) -> list[tuple[str, dict]]:
    """(name, settings) of what the full sweep shows close to the default, or better on one of the measures."""
    return [
        ("default", {}),
        ("C/8 recent", dict(recent_tokens=C // 8)),
        ("C/2 recent", dict(recent_tokens=C // 2)),
        ("p = .01", dict(score_prior=0.01)),
        ("p = .05", dict(score_prior=0.05)),
        ("gamma = 1 - 2/C", dict(score_decay=1 - 2 / C)),
        ("gamma = 1 - 2/C, p = .05", dict(score_decay=1 - 2 / C, score_prior=0.05)),
        ("gamma = 1 - 8/C", dict(score_decay=1 - 8 / C)),
        ("rho = .9", dict(redundancy=0.9)),
        ("rho = 1", dict(redundancy=1.0)),
        ("no value weight", dict(value_weight=False)),
        ("4 sinks", dict(sink_tokens=4)),
        ("1 sink", dict(sink_tokens=1)),
        ("no sinks", dict(sink_tokens=0)),
    ]


class Recall:
    """Texts of all three tasks, read at once."""

    def __init__(self, length: int, texts: int, seed: int) -> None:
        made = [contest.make_texts(task, length, texts, seed) for task in language.TASKS]
        self.texts, self.ids = [texts for texts, _ in made], torch.cat([ids for _, ids in made])

    def judge(self, cache_size: int, settings: dict) -> dict[str, list[tuple[int, int]]]:
        """For each text of each task: questions answered right, and all."""
        reader = contest.Contender.make("fixed size", cache_size, **settings)
        guesses = torch.stack(list(reader.read(self.ids)), dim=1).split([len(texts) for texts in self.texts])
        ids = self.ids.split([len(texts) for texts in self.texts])
        return {
            task: [
                contest.count_right([text], ids[None], guess[None]) for text, ids, guess in zip(*of_task, strict=True)
            ]
            for task, *of_task in zip(language.TASKS, self.texts, ids, guesses, strict=True)
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--length", type=int, default=512, help="words of a text")
    parser.add_argument("--texts", type=int, default=24, help="texts of each task")
    parser.add_argument("--stories", type=int, default=16, help="stories that the divergence is measured on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rules", nargs="+", help="only rules of these names; the others of the file stay")
    parser.add_argument("--rivals", action="store_true", help="only what comes close to the default, text by text")
    arguments = parser.parse_args()
    from harness import machine

    recall = Recall(arguments.length, arguments.texts, arguments.seed)
    divergence = story_divergence(arguments.stories, arguments.seed - 1)  # seed 1 tells the stories of the tests
    asked = {name: getattr(arguments, name) for name in ("length", "texts", "stories", "seed")}
    found, began = {}, time.time()
    if arguments.rules and arguments.json and arguments.json.exists():
        found = {(row["rule"], row["cache_size"]): row for row in json.loads(arguments.json.read_text())["rows"]}
    for cache_size in arguments.sizes:
        for name, settings in (rivals if arguments.rivals else combinations)(cache_size):
            if arguments.rules and name not in arguments.rules:
                continue
            full = FixedSizeCacheConfig(cache_size=cache_size, **settings)
            knobs = {knob: getattr(full, knob) for knob in KNOBS} if full.policy == "attention" else {}
            answers, kl = recall.judge(cache_size, settings), divergence(cache_size, settings) if divergence else None
            shares = {task: _share(pairs) for task, pairs in answers.items()}
            row = dict(cache_size=cache_size, rule=name, **knobs, recall=shares, kl=kl and round(fmean(kl), 5))
            if arguments.rivals:
                row |= dict(answers=answers, kl_of_stories=kl and [round(x, 6) for x in kl])
            found[name, cache_size] = row
            print(f"{time.time() - began:5.0f} s  C={cache_size}  {name}  {shares}  KL {row['kl']}", flush=True)
            if arguments.json:
                rows = ",\n".join(json.dumps(row) for row in found.values())
                head = json.dumps({"machine": machine(), **asked, "rows": []})
                arguments.json.write_text(head.replace("[]", f"[\n{rows}\n]") + "\n")


def _share(pairs: list[tuple[int, int]]) -> float:
    return round(sum(right for right, _ in pairs) / sum(asked for _, asked in pairs), 4)


def story_divergence(stories: int, seed: int):
    """What measures the divergence on stories260K, one figure per story; None where the model is missing."""
    from stories import FOLDER

    if not FOLDER.exists():
        print(f"no divergence: the model stories260K is not at {FOLDER}")
        return None
    import test_quality

    told = test_quality.tell(stories, seed)
    return lambda cache_size, settings: test_quality.divergences(told, cache_size, **settings).tolist()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
