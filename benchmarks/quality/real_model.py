#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Judges rules of eviction on a real pretrained model: divergence from the full cache, and facts that are asked for.

    pip install gguf accelerate  # they read the weights of the default model
    python benchmarks/quality/real_model.py --texts FOLDER --json benchmarks/results/real_model.json
    python benchmarks/quality/real_model.py --texts FOLDER --model path/or/hub-id --measures prompt --count 4

The model is SmolLM2-135M-Instruct (see small_llama.py), or any decoder whose layers all see the whole text. Texts are
the files ``*.txt`` of a folder. Four measures, each at an average of C tokens for each layer and KV head:

* ``prompt``: a text with facts is read in one piece and cut to C. KL of the next tokens, and the facts asked for in the
  next turn: right if every digit is the likeliest token.
* ``long``: the same of longer texts.
* ``dialogue``: facts told in the first turn and asked for in the fifth, with texts between; cut after each turn.
* ``stream``: a text is read 16 tokens at a time and cut after each; KL from the 512th on.

Rules are simulated (simulator.py), so one reading serves them all, and read the same texts, so differences are paired:
the results keep the figures of each text. They are written as they come, and what the file has already is not measured
again. An hour of one core; ``--count`` scales it.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from real_results import FULL, Results
from real_rules import FEW, MAIN, MORE, PLAIN, SHARES, Rule
from real_texts import BEGIN, CONTINUATION, FACTS, TOKENS, Passage, Texts, passages
from rich.progress import Progress
from simulator import Held, read, simulated
from small_llama import load
from torch import Tensor

from fixed_size_kv_cache import profile_heads
from fixed_size_kv_cache.huggingface.profile_texts import TEXTS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks/python"))

PART, FIRST = 16, 512
Cell = tuple[Rule, int]  # a rule and the average size of its heads


def cells(rules: Iterable[Rule], sizes: Sequence[int]) -> list[Cell]:
    return [(rule, C) for rule in rules for C in sizes]


TRIED = {
    "prompt": cells(MAIN, (64, 128, 256, 512)) + cells(MORE, (128, 256)) + cells(SHARES, (256,)),
    "long": cells(FEW, (256, 512)),
    "dialogue": cells(FEW, (256,)),
    "stream": cells([rule for rule in MAIN if rule.name != "random"], (128,)),
}
COUNTS = {"prompt": 20, "long": 10, "dialogue": 20, "stream": 5}  # texts


class Reader:
    """A model on simulated caches."""

    def __init__(self, model: Any, errors: dict[str, list[list[float]]]) -> None:
        self.model, self.errors = model, errors
        config = model.config.get_text_config(decoder=True)
        self.group = config.num_attention_heads // config.num_key_value_heads

    def sizes(self, cell: Cell, tokens: int) -> list[list[int]]:
        return cell[0].sizes(self.errors[cell[0].profile], cell[1], tokens)

    def cut(self, layers: list[Held], cell: Cell, sizes: list[list[int]]) -> list[Held]:
        return cell[0].apply(layers, sizes, cell[1], self.group)

    def ask(self, layers: list[Held], passage: Passage) -> tuple[Tensor, int, float]:
        """What follows on what is held: log probabilities of the continuation ``[K, vocabulary]``, how many questions
        are answered right, and the mean log probability of a right digit. All are read at once and do not see each
        other."""
        K, start = len(passage.continuation), layers[0].seen
        questions = [question.ids for question in passage.questions]
        common = _common(questions)
        lengths = [K, common, *(len(ids) - common for ids in questions)]
        ids = torch.cat([passage.continuation, questions[0][:common], *(ids[common:] for ids in questions)])
        sees = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()
        sees[K + common :, K : K + common] = True  # each question sees what all begin with
        after = [0, 0, *[common] * len(questions)]
        positions = torch.cat([torch.arange(at, at + length) for at, length in zip(after, lengths, strict=True)])
        ends = list(itertools.accumulate(lengths))[2:]
        wanted = [
            torch.arange(end - asked.digits - 1, end - 1) for end, asked in zip(ends, passage.questions, strict=True)
        ]
        asked = torch.cat([torch.arange(K), *wanted])
        logits, _ = read(self.model, ids[None], layers, sees=sees.tril(), position_ids=start + positions, logits=asked)
        found = logits[0].float().log_softmax(-1)
        right, said = 0, []
        for question, digits in zip(passage.questions, found[K:].split([len(x) for x in wanted]), strict=True):
            answer = question.ids[-question.digits :]
            right += bool((digits.argmax(-1) == answer).all())
            said.append(digits.gather(1, answer[:, None]).mean().item())
        return found[:K], right, sum(said) / len(said)


def _common(rows: list[Tensor]) -> int:
    """How many tokens all rows begin with."""
    columns = zip(*(row.tolist() for row in rows), strict=False)  # up to the shortest
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def divergence(full: Tensor, capped: Tensor) -> float:
    """Mean KL of the next token, of log probabilities ``[..., vocabulary]``."""
    return (full.exp() * (full - capped)).sum(-1).mean().item()


def average(sizes: list[list[int]]) -> float:
    return sum(map(sum, sizes)) / sum(map(len, sizes))


def after_a_prompt(reader: Reader, passage: Passage, tried: list[Cell | None], add: Callable) -> None:
    """Read in one piece, cut for each cell; ``None`` is the full cache."""
    votes = list(dict.fromkeys(rule.vote(C) for rule, C in filter(None, tried))) or [PLAIN.vote(1)]
    _, layers = read(reader.model, passage.turns[0][None], votes=votes)
    full, right, said = reader.ask(layers, passage)
    asked, tokens = len(passage.questions), layers[0].seen
    for cell in tried:
        if cell is None:
            add(None, tokens, tokens=tokens, kl=0.0, right=right, asked=asked, digits=round(said, 4))
            continue
        sizes = reader.sizes(cell, tokens)
        capped, right, said = reader.ask(reader.cut(layers, cell, sizes), passage)
        kl = round(divergence(full, capped), 6)
        add(cell, average(sizes), tokens=tokens, kl=kl, right=right, asked=asked, digits=round(said, 4))


def in_a_dialogue(reader: Reader, passage: Passage, tried: list[Cell | None], add: Callable) -> None:
    """Cut after each turn, for each cell by itself."""
    asked, tokens = len(passage.questions), sum(map(len, passage.turns))
    for cell in tried:
        sizes = reader.sizes(cell, tokens) if cell else None
        vote = cell[0].vote(cell[1]) if cell else PLAIN.vote(tokens)
        layers: list[Held] = []
        for turn in passage.turns:
            _, layers = read(reader.model, turn[None], layers, [vote], redundancy=needs_redundancy(cell))
            layers = reader.cut(layers, cell, sizes) if cell else layers
        _, right, said = reader.ask(layers, passage)
        slots = average(sizes) if cell else tokens
        add(cell, slots, tokens=tokens, right=right, asked=asked, digits=round(said, 4))


def in_a_stream(reader: Reader, rows: Tensor, cell: Cell, full: Tensor) -> list[float]:
    """KL of each text ``[B, S]``, read in small parts; ``full``: log probabilities ``[B, S - FIRST, vocabulary]``."""
    S, layers = rows.shape[1], []
    sizes, vote = reader.sizes(cell, S), cell[0].vote(cell[1])
    total = torch.zeros(len(rows))
    for start in range(0, S, PART):
        part = rows[:, start : start + PART]
        logits, layers = read(
            reader.model, part, layers, [vote], redundancy=needs_redundancy(cell), logits=part.shape[1]
        )
        if start >= FIRST:
            expected = full[:, start - FIRST : start - FIRST + part.shape[1]]
            total += (expected.exp() * (expected - logits.float().log_softmax(-1))).sum((1, 2))
        layers = reader.cut(layers, cell, sizes)
    return [round(x, 6) for x in (total / (S - FIRST)).tolist()]


def needs_redundancy(cell: Cell | None) -> bool:
    return cell is not None and cell[0].knobs.get("redundancy", 0) > 0


def profiles(model: Any, tokenizer: Any, names: set[str]) -> dict[str, list[list[float]]]:
    """The profile that is used, and others that show how much it depends on what is read."""
    ways = {
        "usual": dict(tokenizer_or_ids=tokenizer),
        "the first text": dict(tokenizer_or_ids=tokenizer, texts=TEXTS[:1]),
        "the second text": dict(tokenizer_or_ids=tokenizer, texts=TEXTS[1:]),
        "half as many tokens": dict(tokenizer_or_ids=tokenizer, length=300),
        "random ids": {},
        "other random ids": dict(tokenizer_or_ids=random_ids(model)),
    }
    return {name: list(map(list, profile_heads(model, **ways[name]).output_error)) for name in ways if name in names}


def random_ids(model: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(model.config.get_text_config(decoder=True).vocab_size, (600,), generator=generator)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="a folder of files *.txt")
    parser.add_argument("--model", help="a folder or a name on the Hub; else SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--measures", nargs="+", choices=list(TRIED), default=list(TRIED))
    parser.add_argument("--count", type=int, help="texts of each measure; else " + str(COUNTS))
    parser.add_argument("--sizes", type=int, nargs="+", help="only these cache sizes")
    parser.add_argument("--rules", nargs="+", help="only rules of these names")
    arguments = parser.parse_args()
    from harness import machine

    model, tokenizer = load(arguments.model)
    tried = {
        name: [
            (rule, C)
            for rule, C in TRIED[name]
            if (arguments.sizes is None or C in arguments.sizes)
            and (arguments.rules is None or rule.name in arguments.rules)
        ]
        for name in arguments.measures
    }
    made = profiles(model, tokenizer, {rule.profile for each in tried.values() for rule, _ in each})
    head = {
        "machine": machine(),
        "model": arguments.model or "SmolLM2-135M-Instruct",
        "facts": FACTS,
        "continuation": CONTINUATION,
        "part": PART,
        "first": FIRST,
        "profiles": {name: [[round(x, 6) for x in layer] for layer in errors] for name, errors in made.items()},
    }
    reader = Reader(model, made)
    results = Results(arguments.json, head)
    with simulated(model), torch.inference_mode(), Progress() as bar:
        for measure in arguments.measures:
            count, texts = arguments.count or COUNTS[measure], Texts(arguments.texts, tokenizer, BEGIN[measure])

            def missing(text: int, measure: str = measure) -> list[Cell | None]:
                """What has not been measured on a text yet."""
                every = [None, *tried[measure]] if measure != "stream" else tried[measure]
                return [cell for cell in every if results.count(measure, *said_of(cell)) <= text]

            def add(cell: Cell | None, slots: float, measure: str = measure, **figures: Any) -> None:
                results.add(measure, *said_of(cell), slots, **figures)

            if measure == "stream":
                rows = torch.stack([texts.slice(TOKENS[measure]) for _ in range(count)])
                if missing(count - 1):
                    full = full_stream(model, rows)
                for cell in bar.track(missing(count - 1), description=measure):
                    done = results.count(measure, *said_of(cell))
                    for kl in in_a_stream(reader, rows[done:], cell, full[done:]):
                        add(cell, average(reader.sizes(cell, rows.shape[1])), tokens=rows.shape[1], kl=kl)
                    results.write()
                continue
            measured = in_a_dialogue if measure == "dialogue" else after_a_prompt
            for text, passage in bar.track(
                enumerate(passages(texts, measure, count)), total=count, description=measure
            ):
                if missing(text):
                    measured(reader, passage, missing(text), add)
                    results.write()


def said_of(cell: Cell | None) -> tuple[dict, int | None]:
    """What the results call it; ``None``: the full cache."""
    return (FULL, None) if cell is None else (cell[0].as_row(), cell[1])


def full_stream(model: Any, rows: Tensor) -> Tensor:
    """Log probabilities with the full cache, ``[B, S - FIRST, vocabulary]``."""
    count = rows.shape[1] - FIRST
    return torch.cat([read(model, row[None], logits=count)[0].float().log_softmax(-1) for row in rows])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
