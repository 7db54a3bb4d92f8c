# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU by its own events, with a cold cache.

`graph`: calls captured in one graph, over copies of the data that together exceed the L2 three times, so that no launch
is waited for. `eager`: one call after the L2 was overwritten, launches and allocation included.
"""

import statistics
from collections import deque
from collections.abc import Callable, Sequence

import torch
from harness import summary

NO_GPU = 3  # exit code

Call = Callable[..., object]


def microseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def copies_beyond_l2(bytes_per_call: int) -> int:
    """How many copies of the data exceed the L2 three times."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(3 * l2 // bytes_per_call + 1, 64)


def flush() -> None:
    """Overwrites the L2, and waits: or launches would hide behind it."""
    torch.empty(3 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda").fill_(1)
    torch.cuda.synchronize()


def graph_of(call: Call, data: Sequence[tuple]) -> tuple[torch.cuda.CUDAGraph, int]:
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


def time_in_turns(
    contenders: dict[str, tuple[Call, Sequence[tuple]]], rounds: int
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """Of each contender, a call and its inputs, the times by `graph` and `eager`; and why one could not be captured.

    They take turns, so that what changes on the machine changes for all. One that fails costs only itself.
    """
    graphs, failed = {}, {}
    for name, (call, data) in contenders.items():
        try:
            graphs[name] = graph_of(call, data)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            torch.cuda.synchronize()
    times: dict[str, dict[str, list[float]]] = {name: {"graph": [], "eager": []} for name in graphs}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            call, data = contenders[name]
            times[name]["graph"].append(microseconds(graph.replay) / count)
            flush()
            times[name]["eager"].append(microseconds(lambda call=call, data=data: call(*data[0])))
    return {name: {way: summary(of_way) for way, of_way in taken.items()} for name, taken in times.items()}, failed


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB: what a perfect kernel is held to."""
    source = torch.randint(-100, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = [microseconds(lambda: target.copy_(source)) for _ in range(21)]
    return 2 * source.numel() / (statistics.median(times) * 1e-6)
