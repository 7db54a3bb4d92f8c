# SPDX-License-Identifier: Apache-2.0
"""``fsdc demo``: what it prints, in a terminal and not, and that its figures are the committed ones."""

import functools
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console, ConsoleDimensions
from typer.testing import CliRunner

from fixed_size_kv_cache.cli import demo as cli_demo
from fixed_size_kv_cache.cli import demo_view
from fixed_size_kv_cache.recall import contest
from fsdc_command.app import app

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--length", "160", "--cache-size", "24")


@functools.cache
def table(sizes: tuple[int, ...], length: int, seed: int) -> list:
    return list(contest.compare(list(sizes), length, seed))


@pytest.fixture
def one_table(monkeypatch):
    """Computes the table once for all tests of how it is shown; it is the same every time, as another test knows."""
    monkeypatch.setattr(cli_demo, "compare", lambda sizes, length, seed: table(tuple(sizes), length, seed))


def demo(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["demo", *arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_plain_lines_where_there_is_no_terminal(one_table):
    said = demo("--task", "recency", *SHORT)
    questions = re.findall(
        r"^word (\d+): what is the code of \w+ \? (\d\d) .*full cache: (\d\d) yes", said, re.MULTILINE
    )
    assert len(questions) >= 5 and all(code == answer for _, code, answer in questions)
    assert f"right {len(questions)}, tokens_held 160, tokens_seen 160, cache_bytes 163840" in said
    assert "tokens_held 24, tokens_seen 160, cache_bytes 27624" in said
    assert "\x1b" not in said
    assert "Questions answered right in texts of 160 words, by tokens held\n" in said
    for word in ("needle", "zipf", "recency", *contest.NAMES):
        assert word in said


@pytest.mark.parametrize("task", ["needle", "zipf", "recency"])
def test_the_shortest_demonstration_asks_something(task):
    *_, state = contest.race(task, 24, 128, 0)
    assert state.asked >= 1
    rows = table((24,), 128, 0)
    assert min(row["asked"] for part in rows for row in part) >= 1


def in_a_terminal(monkeypatch, **size: str) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", **size}.items():
        monkeypatch.setenv(name, value)


def test_live_in_a_terminal(fsdc, one_table, monkeypatch):
    in_a_terminal(monkeypatch, COLUMNS="120")
    said = fsdc("demo", *SHORT)
    assert "\x1b[?25l" in said and "\x1b[?25h" in said  # the cursor goes, and comes back
    assert "A small LLaMA reads 160 words" in said and "sliding window" in said


def test_plain_lines_in_a_small_terminal(fsdc, one_table, monkeypatch):
    in_a_terminal(monkeypatch, COLUMNS="60", LINES="12")
    said = fsdc("demo", *SHORT)
    assert "A small LLaMA reads" not in said and re.search(r"^word \d+: what is", said, re.MULTILINE)
    assert "tokens_held 24, tokens_seen 160, cache_bytes 27624" in said


def test_the_picture_fits_into_the_terminal():
    """One line per contender at 80 columns, explained where there is room; else plain lines."""
    *_, state = contest.race("zipf", 24, 160, 0)
    for width, explains in ((80, False), (96, True), (200, True)):
        console = Console(width=width, height=24, file=io.StringIO())
        console.print(demo_view.picture(state, width))
        lines = console.file.getvalue().splitlines()
        assert len(lines) == demo_view.LINES + 2 + len(contest.NAMES) and max(map(len, lines)) <= width
        assert "tokens held" in lines[6] and "tokens/s" in lines[6]
        assert ("sliding window" in "".join(lines)) == explains
    assert demo_view.fits(ConsoleDimensions(80, 24))
    assert not demo_view.fits(ConsoleDimensions(60, 24)) and not demo_view.fits(ConsoleDimensions(80, 11))


def test_json_and_seeds():
    threads = torch.get_num_threads()
    first, again, other = (json.loads(demo("--json", *SHORT, "--seed", seed)) for seed in ("3", "3", "4"))
    for found in (first, again, other):
        assert found.pop("cpu_seconds") > 0
        for lane in found["live"]["contenders"]:
            assert lane.pop("tokens_per_second") > 0
    assert first == again != other
    assert torch.get_num_threads() == threads
    assert {row["cache_size"] for row in first["recall"]} == {None, 12, 24, 48}


@pytest.mark.parametrize(
    "arguments, text",
    [(("--length", "4000"), "512"), (("--cache-size", "0"), "--cache-size"), (("--task", "haystack"), "needle")],
)
def test_arguments_out_of_range(arguments, text):
    done = CliRunner().invoke(app, ["demo", *arguments])
    assert done.exit_code == 2 and text in done.stderr


def test_the_committed_figures():
    """One size of the table, on the same texts. Another machine may round otherwise."""
    committed = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    assert committed["cpu_seconds"] < 60  # of one thread, so the demo takes less than a minute
    size = committed["live"]["cache_size"]
    for rows in contest.compare([size], committed["length"], committed["seed"]):
        for row in rows:
            (same,) = (x for x in committed["recall"] if all(x[k] == row[k] for k in ("task", "rule", "cache_size")))
            assert row["asked"] == same["asked"]
            assert abs(row["right"] - same["right"]) <= 0.04 * row["asked"], row
