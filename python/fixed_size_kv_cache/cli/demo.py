# SPDX-License-Identifier: Apache-2.0
"""``fsdc demo``: caches of the same size answer questions side by side, live, then in a table over tasks and sizes."""

import json
import time

from rich.console import Console
from rich.live import Live
from rich.progress import track

from ..recall import one_thread
from ..recall.contest import NAMES, TEXTS, compare, race
from . import demo_view


@one_thread()
def show(task: str, cache_size: int, length: int, seed: int, as_json: bool) -> None:
    """The whole demonstration. In a terminal live, else as plain lines; with ``as_json`` one JSON object."""
    began = time.process_time()
    sizes = sorted({max(1, cache_size // 2), cache_size, 2 * cache_size})
    console = Console(stderr=as_json)
    is_live = console.is_terminal and not as_json and demo_view.fits(console.size)
    if is_live:
        console.print(demo_view.introduction(task, cache_size, length), highlight=False)
        with Live(console=console, refresh_per_second=12) as live:
            for state in race(task, cache_size, length, seed):
                live.update(demo_view.picture(state, console.width))
    else:
        asked = 0
        for state in race(task, cache_size, length, seed):
            if state.asked > asked and not as_json:
                print(demo_view.line(state), flush=True)
            asked = state.asked
    rows = [
        row
        for rows in track(
            compare(sizes, length, seed),
            total=1 + (len(NAMES) - 1) * len(sizes),
            description=f"{3 * TEXTS} texts, {len(sizes)} sizes",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for row in rows
    ]
    if as_json:
        seconds = round(time.process_time() - began, 1)  # of one thread
        found = {"length": length, "seed": seed, "cpu_seconds": seconds, "live": state.figures(), "recall": rows}
        print(json.dumps(found, indent=2))
        return
    if not is_live:
        for lane in state.figures()["contenders"]:
            print(", ".join(f"{name} {value}" for name, value in lane.items()))
    console.print(demo_view.title(length), highlight=False)
    console.print(demo_view.table(rows, sizes))
