# SPDX-License-Identifier: Apache-2.0
"""How ``fsdc demo`` looks."""

from rich.console import ConsoleDimensions, Group
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..recall import language
from ..recall.contest import NAMES, Race

LINES, WIDTH = 5, 96  # of the text that scrolls by, at most
EXPLAINS = 96  # characters a line from which on there is room to explain the contenders
ANSWERS = 5
ABOUT = {
    "needle": "a few facts at the start, filler, and each is asked for once, long after",
    "zipf": "some facts are asked for often, most seldom",
    "recency": "facts keep coming, and questions are about a late one",
}
EXPLAINED = {
    "full cache": "keeps all",
    "fixed size": "ours",
    "last tokens": "sliding window",
    "random": "evicts any",
}


def introduction(task: str, cache_size: int, length: int) -> str:
    return (
        f"A small LLaMA reads {length} words and answers from memory. Task [bold]{task}[/]: {ABOUT[task]}.\n"
        f"The full cache keeps every token; the others keep {cache_size} per layer and KV head.\n"
    )


def fits(size: ConsoleDimensions) -> bool:
    """Whether a terminal has room for the picture."""
    return size.width >= 80 and size.height >= LINES + 7


def picture(state: Race, width: int) -> Group:
    """The text that scrolls by and a line for each contender."""
    table, explains = Table(box=None, pad_edge=False), width >= EXPLAINS
    for name in ("", *[""] * explains, f"last {ANSWERS} answers"):
        table.add_column(name, no_wrap=True)
    for name in ("right", "tokens held", "of seen", "cache", "tokens/s"):
        table.add_column(name, justify="right")
    answers = [state.text.words[at] for at, _ in state.text.answers]
    for lane in state.lanes:
        who = lane.contender
        last = list(zip(lane.guesses, answers, strict=False))[-ANSWERS:]
        given = Text(" ").join(Text(guess, "green" if guess == answer else "red strike") for guess, answer in last)
        table.add_row(
            Text(who.name, "bold"),
            *[Text(EXPLAINED[who.name], "dim")] * explains,
            given,
            f"{lane.right} of {state.asked}",
            str(who.held),
            str(who.seen),
            decimal(who.bytes, precision=0),
            f"{state.read / who.seconds:.0f}",
        )
    return Group(Padding(_scroll(state, min(WIDTH, width - 2)), (0, 0, 1, 2)), table)


def _scroll(state: Race, width: int) -> Text:
    """The last lines of what was read; answers stand out."""
    answers = {at for at, _ in state.text.answers}
    lines, line = [], Text()
    for at, word in enumerate(state.text.words[: state.read]):
        if len(line) + len(word) + 1 > width:
            lines.append(line)
            line = Text()
        line.append(word, "bold cyan" if at in answers else "").append(" ")
    shown = [*lines, line][-LINES:]
    return Text("\n").join([*shown, *[Text()] * (LINES - len(shown))])


def line(state: Race) -> str:
    """One question and everybody's answer, in plain text."""
    at, distance = state.text.answers[state.asked - 1]
    name, answer = state.text.words[at - 2], state.text.words[at]
    given = "  ".join(
        f"{lane.contender.name}: {lane.guesses[-1]} {'yes' if lane.guesses[-1] == answer else 'no':3}"
        for lane in state.lanes
    )
    return f"word {state.read}: what is the code of {name} ? {answer} ({distance} words ago)  {given}"


def title(length: int) -> str:
    """Of the table, which is narrower and would wrap it."""
    return f"Questions answered right in texts of {length} words, by tokens held"


def table(rows: list[dict], sizes: list[int]) -> Table:
    """Recall of every rule, by task and size; the best of the capped ones in bold."""
    found = {(row["task"], row["rule"], row["cache_size"]): row["right"] / row["asked"] for row in rows}
    made = Table()
    made.add_column("task")
    made.add_column("rule")
    for size in sizes:
        made.add_column(str(size), justify="right")
    capped = NAMES[1:]
    for task in language.TASKS:
        best = {size: max(found[task, name, size] for name in capped) for size in sizes}
        made.add_row(task, "full cache", *[f"{found[task, 'full cache', None]:.0%}"] * len(sizes))
        for name in capped:
            shares = {size: found[task, name, size] for size in sizes}
            made.add_row(
                "", name, *(f"[bold]{x:.0%}[/]" if x == best[size] else f"{x:.0%}" for size, x in shares.items())
            )
        made.add_section()
    return made
