# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU beside compositions of torch operators, side by side in one process, with a cold cache.

python benchmarks/python/bench_cuda.py [truncate | decode | chunk ...] [--peers] [--json FILE]

`graph`: calls captured in one graph, over copies of the data that together exceed the L2 three times, so no launch is
waited for. `eager`: one call after the L2 was overwritten, launches and allocation included. With --peers what
torch.compile makes of the others too, which takes its time to compile. Without a GPU it exits with 3.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_chunk
import torch
from bench_decode import Step
from cuda_timing import NO_GPU, Call, copies_beyond_l2, copy_bandwidth, time_in_turns
from harness import write

D, ELEMENT_BYTES = 128, 2  # bf16
HEADS, GROUP = 8, 4  # of a decode step and a chunk: those of an 8B LLaMA
Contenders = dict[str, tuple[Call, list[tuple]]]
Case = tuple[str, int, Contenders]  # name, bytes that must be moved, who does it: ours first


def with_compiled(contenders: Contenders, chosen: bool) -> Contenders:
    """The others once more as torch.compile makes them, after all that need no compiler."""
    others = list(contenders.items())[1:] if chosen else []
    compiled = {f"torch.compile of {name}": (torch.compile(call, dynamic=False), data) for name, (call, data) in others}
    return {**contenders, **compiled}


# ---- truncate -------------------------------------------------------------------------------------------------------


def truncate_case(rows: int, S: int, C: int) -> Case:
    first_rows = torch.arange(rows).view(1, rows, 1) * S

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

    moved = rows * (4 * S + 2 * C * 2 * D * ELEMENT_BYTES + 8 * C)
    data = []
    for _ in range(copies_beyond_l2(moved)):
        keys, values = (torch.randn(1, rows, S, D, dtype=torch.bfloat16) for _ in range(2))
        ranks = torch.rand(1, rows, S).argsort(-1)
        data.append((keys, values, torch.exp(12 * ranks / S - 6)))  # no two alike: topk has no rule for ties
    contenders = {
        "fsdc.truncate": (ours, data),
        "topk + sort + index_select": (index_select, data),
        "topk + sort + gather": (gather, data),
    }
    wanted = ours(*data[0])
    for name, (call, _) in contenders.items():
        assert all(torch.equal(x, y) for x, y in zip(call(*data[0]), wanted, strict=True)), f"{name} differs"
    return f"truncate: {rows} rows, S={S}, C={C}, D={D}, bfloat16", moved, contenders


def truncate_cases() -> Iterator[Callable[[], Case]]:
    shapes = [(8, 4096, 1024), (8, 32768, 1024), (8, 32768, 4096), (8, 131072, 4096)]
    for shape in [*shapes, (64, 32768, 1024), (256, 32768, 1024), (2048, 4096, 1024)]:
        yield lambda shape=shape: truncate_case(*shape)


# ---- decode_attention_ ----------------------------------------------------------------------------------------------


def decode_case(B: int, C: int) -> Case:
    moved = B * HEADS * C * (2 * D * ELEMENT_BYTES + 20)  # keys, values, four facts and the position of each slot
    steps = [Step(B, HEADS, GROUP, D, C, torch.bfloat16) for _ in range(copies_beyond_l2(moved))]
    with_held = [(step, *step.held()) for step in steps]
    torch.testing.assert_close(
        steps[0].ours(), steps[0].attend(*steps[0].with_new(*with_held[0][1:])), rtol=0.02, atol=0.02
    )
    contenders = {
        "fsdc.decode_attention_": (Step.ours, [(step,) for step in steps]),
        "static slots + sdpa, no scores": (Step.static, with_held),
        "DynamicCache + sdpa, no scores": (Step.dynamic, with_held),
        "original step in Python": (Step.original, with_held),
    }
    return f"decode: B={B} H={HEADS} G={GROUP} D={D} C={C}, bfloat16", moved, contenders


def decode_cases() -> Iterator[Callable[[], Case]]:
    for B in (1, 8, 64):
        for C in (1024, 4096):
            yield lambda B=B, C=C: decode_case(B, C)


# ---- chunk_attention_ -----------------------------------------------------------------------------------------------


def chunk_case(T: int, Q: int) -> Case:
    moved = (HEADS * 2 * (T + Q) + 2 * HEADS * GROUP * Q) * D * ELEMENT_BYTES
    calls = bench_chunk.contenders(HEADS, GROUP, D, T, Q, torch.bfloat16)
    ours_first = sorted(calls.items(), key=lambda item: item[0] != bench_chunk.OURS)
    name = f"chunk: H={HEADS} G={GROUP} D={D} T={T} Q={Q}, bfloat16"
    return name, moved, {name: (call, [()]) for name, call in ours_first}


def chunk_cases() -> Iterator[Callable[[], Case]]:
    for T in (0, 1024):
        for Q in (128, 1024):
            yield lambda T=T, Q=Q: chunk_case(T, Q)


# ---------------------------------------------------------------------------------------------------------------------

CASES = {"truncate": truncate_cases, "decode": decode_cases, "chunk": chunk_cases}


def measure(case: Case, rounds: int, peers: bool, copy: float) -> dict[str, object]:
    _, moved, contenders = case
    times, failed = time_in_turns(with_compiled(contenders, peers), rounds)
    ours = times[next(iter(contenders))]
    return {
        "bytes": moved,
        "floor_us": moved / copy * 1e6,
        "share_of_copy_bandwidth": moved / copy * 1e6 / ours["graph"]["median_us"],
        "times": times,
        "failed": failed,
        "times_faster_than": {
            name: {way: taken[way]["median_us"] / ours[way]["median_us"] for way in ("graph", "eager")}
            for name, taken in list(times.items())[1:]
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--peers", action="store_true", help="what torch.compile makes of the others, too")
    parser.add_argument("--json", type=Path, help="write the result there, after each case")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.operators if name not in CASES]:
        parser.error(f"OPERATOR must be one of {', '.join(CASES)}; got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("bench_cuda: there is no GPU", file=sys.stderr)
        return NO_GPU
    torch.manual_seed(0)
    found = {}
    with torch.inference_mode(), torch.device("cuda"):
        copy = copy_bandwidth()
        print(f"{torch.cuda.get_device_name()}: copies {copy / 1e12:.2f} TB/s, read and written")
        for operator in arguments.operators or CASES:
            for make in CASES[operator]():
                case = make()
                entry = found[case[0]] = measure(case, arguments.rounds, arguments.peers, copy)
                share = entry["share_of_copy_bandwidth"]
                print(f"{case[0]}: floor {entry['floor_us']:.1f} us, {share:.0%} of copy bandwidth")
                for name, taken in entry["times"].items():
                    print(f"  {name:44} graph {taken['graph']['median_us']:8.1f} us", end="")
                    print(f"  eager {taken['eager']['median_us']:8.1f} us")
                for name, why in entry["failed"].items():
                    print(f"  {name:44} failed: {why}")
                del case
                torch.cuda.empty_cache()
                if arguments.json:  # after each, so that a time limit cuts only what comes later
                    gpu = torch.cuda.get_device_name()
                    write(arguments.json, {"gpu": gpu, "copy_bytes_per_second": copy, "cases": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
