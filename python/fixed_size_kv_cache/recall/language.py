# SPDX-License-Identifier: Apache-2.0
"""The language of the embedded model: facts, questions about them, and filler between.

    the code of maple is 47 .   the old fox walks to the river .   what is the code of maple ? 47 .

Three tasks come from one generator. ``needle``: a few facts, then filler, then each is asked for once, long after.
``zipf``: some facts are asked for often, most seldom. ``recency``: facts keep coming, the question is about a late one.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "acacia alder apple ash aspen bamboo beech birch cedar cherry chestnut clover cypress daisy elder elm fern fig fir "
    "ginger hazel heather holly iris ivy jasmine juniper larch laurel lavender lemon lilac lily lime linden lotus "
    "magnolia mango maple mint moss myrtle nettle oak olive orange orchid palm peach pear pine plum poplar poppy "
    "quince rose sage spruce sumac thyme tulip violet willow yew"
)
CODES = [str(number) for number in range(10, 100)]
ADJECTIVES = _words("old young brave quiet tired happy hungry clever gentle proud small tall")
ANIMALS = _words("fox bear hare owl wolf deer goat crow frog swan horse otter")
VERBS = _words("walks runs returns comes moves hurries wanders goes turns crawls drifts leads")
PLACES = _words("river forest village mountain harbor garden bridge meadow castle market valley island")

BEGIN, UNKNOWN = "<s>", "<unk>"
WORDS = [BEGIN, UNKNOWN, *_words(". ? the code of is what to")]
WORDS += [*NAMES, *CODES, *ADJECTIVES, *ANIMALS, *VERBS, *PLACES]
IDS = {word: i for i, word in enumerate(WORDS)}

TASKS = ("needle", "zipf", "recency")
FACT, QUESTION, FILLER = 7, 9, 8  # words that each takes
FACTS = {"needle": 6, "zipf": 16, "recency": 4}
"""Facts asked about; of ``recency``, the last so many at any time."""


@dataclass
class Stream:
    """A text as its words, and where the answers stand.

    ``answers`` holds ``(index, distance)`` for each word that answers a question: its index in ``words``, and how many
    words before it the answer was last given.
    """

    words: list[str] = field(default_factory=lambda: [BEGIN])
    answers: list[tuple[int, int]] = field(default_factory=list)
    _last_given: dict[str, int] = field(default_factory=dict)

    def state(self, name: str, code: str) -> None:
        self._say(f"the code of {name} is {code} .")
        self._last_given[name] = len(self.words) - 2

    def ask(self, name: str, code: str) -> None:
        self._say(f"what is the code of {name} ? {code} .")
        at = len(self.words) - 2
        self.answers.append((at, at - self._last_given[name]))
        self._last_given[name] = at

    def fill(self, rng: random.Random, room: int | None = None) -> None:
        """A sentence of filler, of at most ``room`` words."""
        adjective, animal, verb, place = (rng.choice(words) for words in (ADJECTIVES, ANIMALS, VERBS, PLACES))
        self._say(f"the {adjective} {animal} {verb} to the {place} .", room)

    def may_fill(self, length: int) -> bool:
        """Whether filler leaves room for a question in a text of ``length`` words, or one has been asked."""
        return bool(self.answers) or len(self) + FILLER + QUESTION <= length

    def cut(self, length: int) -> "Stream":
        """The same up to ``length`` words."""
        return Stream(self.words[:length], [answer for answer in self.answers if answer[0] < length])

    def _say(self, sentence: str, room: int | None = None) -> None:
        self.words += sentence.split()[:room]

    def __len__(self) -> int:
        return len(self.words)


def stream(task: str, length: int, rng: random.Random, facts: int | None = None) -> Stream:
    """A text of ``length`` words.

    Args:
        task: ``needle``, ``zipf`` or ``recency``.
        length: words, the first, ``<s>``, included.
        rng: makes every choice, so a seed gives the same text everywhere.
        facts: how many facts there are to remember, at most 64. Default ``FACTS[task]``.

    Raises:
        ValueError: an unknown task, or facts that do not fit.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    facts = FACTS[task] if facts is None else facts
    if not 1 <= facts <= len(NAMES):
        raise ValueError(f"facts must be from 1 to {len(NAMES)}; got {facts}")
    least = 1 + FACT * (1 if task == "recency" else facts) + QUESTION * (facts if task == "needle" else 1)
    if length < least:
        raise ValueError(f"length must be at least {least} for {task} with {facts} facts; got {length}")
    return {"needle": _needle, "zipf": _zipf, "recency": _recency}[task](length, rng, facts).cut(length)


def _make_facts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    return list(zip(rng.sample(NAMES, count), rng.choices(CODES, k=count), strict=True))


def _needle(length: int, rng: random.Random, count: int) -> Stream:
    text, facts = Stream(), _make_facts(count, rng)
    for fact in facts:
        text.state(*fact)
    while (room := length - QUESTION * count - len(text)) > 0:
        text.fill(rng, room)
    for fact in rng.sample(facts, count):
        text.ask(*fact)
    return text


def _zipf(length: int, rng: random.Random, count: int) -> Stream:
    text, facts = Stream(), _make_facts(count, rng)
    popularity = [1 / (place + 1) for place in range(count)]
    for fact in rng.sample(facts, count):
        text.state(*fact)
    while len(text) < length:
        if rng.random() < 0.5 and text.may_fill(length):
            text.fill(rng)
        text.ask(*rng.choices(facts, popularity)[0])
    return text


def _recency(length: int, rng: random.Random, count: int) -> Stream:
    text, facts = Stream(), []
    names = rng.sample(NAMES, len(NAMES))
    while len(text) < length:
        if names:  # a stream so long that all names are given goes on asking for the last
            facts.append((names.pop(), rng.choice(CODES)))
            text.state(*facts[-1])
        if rng.random() < 0.5 and text.may_fill(length):
            text.fill(rng)
        text.ask(*rng.choice(facts[-count:]))
    return text


def encode(words: Iterable[str]) -> list[int]:
    """The ids of words that the language has. Raises KeyError for any other."""
    return [IDS[word] for word in words]
