# SPDX-License-Identifier: Apache-2.0
"""Texts with facts in them, as a chat model reads them, and questions about the facts."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = [
    "Alice",
    "Bruno",
    "Clara",
    "David",
    "Edith",
    "Felix",
    "Grace",
    "Henry",
    "Irene",
    "James",
    "Karen",
    "Louis",
    "Maria",
    "Nancy",
    "Oscar",
    "Paula",
    "Quentin",
    "Robert",
    "Sarah",
    "Thomas",
    "Ursula",
    "Victor",
    "Wendy",
    "Xavier",
]
FACT, ANSWER = "The secret code of {} is {}.", "The secret code of {} is"
QUESTION = "What is the secret code of {}?"
READ, TOLD = "Read this text.\n\n{}", "Remember these facts. {}"
DONE = "I have read it."

TOKENS = {"prompt": 1280, "long": 4000, "dialogue": 1280, "stream": 1280}  # of a text of each measure
BEGIN = {"prompt": 0, "long": 0.5, "dialogue": 0.4, "stream": 0.75}  # where in the files: not all read the same
FACTS = {"prompt": 4, "long": 6, "dialogue": 6}
CONTINUATION = 64


@dataclass(frozen=True)
class Question:
    """One fact that is asked for, with the beginning of the answer, whose digits are to follow."""

    ids: Tensor  # [Q], all after the text: the end of its turn, the question, the answer
    digits: int  # the last tokens of these


@dataclass(frozen=True)
class Passage:
    """A text with facts in it."""

    turns: list[Tensor]  # ids [S] each, read one after another
    continuation: Tensor  # ids [K] that follow in the text; none after a dialogue
    questions: list[Question]


class Texts:
    """Slices of the texts of a folder, one file after another, none twice, from a share ``begin`` of each file on."""

    def __init__(self, folder: Path, tokenizer: Any, begin: float) -> None:
        files = [path for path in sorted(folder.glob("*.txt"))]
        if not files:
            raise SystemExit(f"{folder} must have files *.txt; got none")
        self.tokenizer = tokenizer
        self.files = [self.encode(path.read_text(encoding="utf-8", errors="replace")) for path in files]
        self.starts = [int(begin * len(ids)) for ids in self.files]
        self.next = 0

    def encode(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        return torch.tensor(ids)

    def slice(self, tokens: int) -> Tensor:
        """The next ``tokens`` of a text that has as many left, the files in turn."""
        for _ in self.files:
            at, self.next = self.next, (self.next + 1) % len(self.files)
            start = self.starts[at]
            if start + tokens <= len(self.files[at]):
                self.starts[at] += tokens
                return self.files[at][start : start + tokens]
        raise SystemExit(f"the texts must have {tokens} more tokens in one of the files; use fewer or shorter texts")

    def passage(self, tokens: int, facts: int, continuation: int, seed: int) -> Passage:
        """A text of about so many tokens with facts spread over it, asked for in the next turn."""
        told = _facts(facts, seed)
        ids = self.slice(tokens + continuation)
        prose = _insert(self.tokenizer.decode(ids[:tokens]), [FACT.format(*fact) for fact in told])
        begun, rest = self._split([("user", READ.format(prose))], prose)
        questions = [self._question([("user", READ.format(prose)), ("assistant", DONE)], fact, rest) for fact in told]
        return Passage([self.encode(begun)], ids[tokens:], questions)

    def dialogue(self, tokens: int, facts: int, seed: int, turns: int = 5) -> Passage:
        """Facts told in the first turn and asked for in the last, with texts between, of so many tokens in all."""
        told = _facts(facts, seed)
        said = [("user", TOLD.format(" ".join(FACT.format(*fact) for fact in told))), ("assistant", DONE)]
        for _ in range(turns - 2):
            text = self.tokenizer.decode(self.slice(tokens // (turns - 2)))
            said += [("user", READ.format(text)), ("assistant", DONE)]
        parts, before = [], ""
        for turn in range(2, len(said) + 1, 2):
            now = self._render(said[:turn])
            parts.append(now[len(before) :])
            before = now
        return Passage(
            [self.encode(part) for part in parts],
            torch.empty(0, dtype=torch.long),
            [self._question(said, fact, None) for fact in told],
        )

    def _render(self, messages: list[tuple[str, str]], ask: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            parts = [f"{'Question' if role == 'user' else 'Answer'}: {text}\n\n" for role, text in messages]
            return "".join(parts) + ("Answer:" if ask else "")
        said = [{"role": role, "content": text} for role, text in messages]
        return self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=ask)

    def _split(self, messages: list[tuple[str, str]], text: str) -> tuple[str, str]:
        """A rendered conversation up to the end of a text, and what follows."""
        rendered = self._render(messages)
        end = rendered.index(text) + len(text)
        return rendered[:end], rendered[end:]

    def _question(self, said: list[tuple[str, str]], fact: tuple[str, str], rest: str | None) -> Question:
        """``rest``: the end of the turn that has begun; None where ``said`` is complete."""
        name, code = fact
        asked = self._render([*said, ("user", QUESTION.format(name))], ask=True)
        before = self._render(said) if rest is None else self._render(said[:1])
        follows = asked[len(before) :] if rest is None else rest + asked[len(before) :]
        gap = "" if follows.endswith(("\n", " ")) else " "
        begun, digits = self.encode(follows + gap + ANSWER.format(name)), self.encode(f" {code}")
        shown = [self.tokenizer.decode([token]).strip() for token in digits]
        return Question(torch.cat([begun, digits]), sum(map(bool, shown)))  # a blank may be a token of its own


def passages(texts: Texts, measure: str, count: int) -> Iterator[Passage]:
    """The texts of a measure; the first ones are the same however many there are."""
    for seed in range(count):
        if measure == "dialogue":
            yield texts.dialogue(TOKENS[measure], FACTS[measure], seed)
        else:
            yield texts.passage(TOKENS[measure], FACTS[measure], CONTINUATION, seed)


def _facts(count: int, seed: int) -> list[tuple[str, str]]:
    chosen = random.Random(seed)
    return [(name, str(chosen.randrange(10000, 100000))) for name in chosen.sample(NAMES, count)]


def _insert(prose: str, sentences: list[str]) -> str:
    """Sentences between those of a text, at equal distances."""
    parts, start = [], 0
    for at, sentence in enumerate(sentences):
        target = int((at + 0.5) * len(prose) / len(sentences))
        end = prose.find(". ", target)
        end = target if end < 0 else end + 2
        parts += [prose[start:end], sentence + " "]
        start = end
    return "".join([*parts, prose[start:]]).strip()
