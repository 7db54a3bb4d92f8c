# SPDX-License-Identifier: Apache-2.0
"""truncate on a GPU against compositions of torch operators, side by side in one process, with a cold cache.

python benchmarks/python/bench_truncate_cuda.py [--json FILE]

`graph`: calls captured in one graph, over copies of the data that together exceed the L2 three times, so no launch is
waited for. `eager`: one call after the L2 was overwritten, launches and allocation included. Without a GPU it exits
with 3.
"""

import argparse
import statistics
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from harness import write

import fixed_size_kv_cache  # noqa: F401  (loads the operators)

D, ELEMENT_BYTES = 128, 2  # bf16
SHAPES = [  # rows, S, C
    (8, 4096, 1024),
    (8, 32768, 1024),
    (8, 32768, 4096),
    (8, 131072, 4096),
    (64, 32768, 1024),
    (256, 32768, 1024),
    (2048, 4096, 1024),
]
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def bytes_moved(rows: int, S: int, C: int) -> int:
    return rows * (4 * S + 2 * C * 2 * D * ELEMENT_BYTES + 8 * C)


def contenders(rows: int, S: int, C: int) -> dict[str, Call]:
    first_rows = torch.arange(rows, device="cuda").view(1, rows, 1) * S

    def best(scores):
        return scores.topk(C, dim=-1, sorted=False).indices.sort(dim=-1).values

    def ours(keys, values, scores):
        return torch.ops.fsdc.truncate(keys, values, scores, C)

    def index_select(keys, values, scores):
        indices = best(scores)
        flat = (indices + first_rows).flatten()
        return *(x.view(-1, D).index_select(0, flat).view(1, rows, C, D) for x in (keys, values)), indices

    def gather(keys, values, scores):
        indices = best(scores)
        expanded = indices[..., None].expand(1, rows, C, D)
        return keys.gather(2, expanded), values.gather(2, expanded), indices

    return {
        "fsdc.truncate": ours,
        "topk + sort + index_select": index_select,
        "topk + sort + gather": gather,
        "torch.compile of index_select": torch.compile(index_select, dynamic=False),
        "torch.compile of gather": torch.compile(gather, dynamic=False),
    }


def summary(times: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10)
    return {"median_us": statistics.median(times), "p10_us": tenths[0], "p90_us": tenths[-1]}


def microseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graph_of(call: Call, data: list) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of whole turns over `data`, and how many calls it holds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*data[0])
    torch.cuda.current_stream().wait_stream(side)
    calls = max(16 // len(data), 1) * len(data)
    graph = torch.cuda.CUDAGraph()
    # As many as there are inputs: or the next call would write where the L2 is still hot.
    outputs: deque[object] = deque(maxlen=len(data))
    with torch.cuda.graph(graph):
        for turn in range(calls):
            outputs.append(call(*data[turn % len(data)]))
    return graph, calls


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.randint(-100, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = [microseconds(lambda: target.copy_(source)) for _ in range(21)]
    return 2 * source.numel() / (statistics.median(times) * 1e-6)


def measure(rows: int, S: int, C: int, rounds: int, copy: float) -> dict[str, object]:
    moved = bytes_moved(rows, S, C)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    copies = min(3 * l2 // moved + 1, 64)
    generator = torch.Generator("cuda").manual_seed(0)
    data = []
    for _ in range(copies):
        shape = (1, rows, S, D)
        keys, values = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator) for _ in "kv"
        )
        ranks = torch.rand(1, rows, S, device="cuda", generator=generator).argsort(-1)
        data.append((keys, values, torch.exp(12 * ranks / S - 6)))  # no two alike: topk has no rule for ties
    flushed = torch.empty(3 * l2, dtype=torch.int8, device="cuda")

    calls = contenders(rows, S, C)
    wanted = calls["fsdc.truncate"](*data[0])
    eager: dict[str, list[float]] = {name: [] for name in calls}
    graphed: dict[str, list[float]] = {name: [] for name in calls}
    graphs = {}
    for name, call in calls.items():
        assert all(torch.equal(x, y) for x, y in zip(call(*data[0]), wanted, strict=True)), f"{name} differs"
        graphs[name] = graph_of(call, data)
    for _ in range(rounds):  # in turns, so that what changes on the machine changes for all
        for name, call in calls.items():
            graph, count = graphs[name]
            graphed[name].append(microseconds(graph.replay) / count)
            flushed.fill_(1)
            torch.cuda.synchronize()  # or launches would hide behind the flush
            eager[name].append(microseconds(lambda call=call: call(*data[0])))
    times = {name: {"graph": summary(graphed[name]), "eager": summary(eager[name])} for name in calls}
    ours = times["fsdc.truncate"]
    return {
        "bytes": moved,
        "floor_us": moved / copy * 1e6,
        "share_of_copy_bandwidth": moved / copy * 1e6 / ours["graph"]["median_us"],
        "times": times,
        "times_faster_than": {
            name: {way: taken[way]["median_us"] / ours[way]["median_us"] for way in ("graph", "eager")}
            for name, taken in times.items()
            if name != "fsdc.truncate"
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_truncate_cuda: there is no GPU", file=sys.stderr)
        return 3
    cases = {}
    with torch.inference_mode():
        copy = copy_bandwidth()
        print(f"{torch.cuda.get_device_name()}: copies {copy / 1e12:.2f} TB/s, read and written")
        for rows, S, C in SHAPES:
            name = f"{rows} rows, S={S}, C={C}, D={D}, bfloat16"
            case = cases[name] = measure(rows, S, C, arguments.rounds, copy)
            print(f"{name}: floor {case['floor_us']:.1f} us, {case['share_of_copy_bandwidth']:.0%} of copy bandwidth")
            for contender, taken in case["times"].items():
                print(f"  {contender:30} graph {taken['graph']['median_us']:8.1f} us", end="")
                print(f"  eager {taken['eager']['median_us']:8.1f} us")
            torch.cuda.empty_cache()
            if arguments.json:  # after each, so that a time limit cuts only what comes later
                gpu = torch.cuda.get_device_name()
                write(arguments.json, {"gpu": gpu, "copy_bytes_per_second": copy, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
