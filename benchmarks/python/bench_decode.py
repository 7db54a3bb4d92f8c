# SPDX-License-Identifier: Apache-2.0
"""decode_attention_ on the CPU, a step of a full cache, beside what does the same and what does less.

python benchmarks/python/bench_decode.py [--json FILE] [--only TEXT] [--seconds S] [--flex]

Contenders take turns, each with keys and values of its own, so that none finds in a cache what another has read: so it
is with the layers of a model. Only the original's step gives scores and evicts, as decode_attention_ does; the others
just attend. "read floor" is a sum over the bytes of keys and values. Exits with 1 where a goal is missed: at least 60 %
of the speed of the read floor at C=4096, and never slower than attention alone, without scores, on static slots.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import keep_freed_memory, time_in_turns, write
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

OURS, FLOOR = "fsdc.decode_attention_", "read floor"
ORIGINAL, DYNAMIC, STATIC, FLEX = (
    "original step in Python",
    "DynamicCache + sdpa",
    "static slots + sdpa",
    "flex attention",
)
RULE = dict(decay=0.99, prior=0.02, redundancy=0.95, value_weight=True, sink_tokens=4)
SHAPES = {"H=8 G=4 D=128": (8, 4, 128), "H=3 G=3 D=64": (3, 3, 64)}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = "1 thread, B=1 H=4 G=2 D=8 C=256, fp32"

# Of B=1 and the first shape on two threads, by C and type: times faster than a contender, and share of the floor.
# Attention alone is 2 to 5 times as slow as the floor, so nothing that reads all keys and values can be much faster.
GOALS = {
    **{(1024, kind): {ORIGINAL: 6.0, STATIC: 1.0} for kind in TYPES},
    **{(4096, kind): {ORIGINAL: 6.0, STATIC: 1.0, FLOOR: 0.6} for kind in TYPES},
}


GOAL_OF_SMALL = {STATIC: 1.0}

compiled_flex = torch.compile(flex_attention, dynamic=False)


class Step:
    """One decode step of a full cache of ``C`` tokens, as each contender does it, in memory of its own."""

    def __init__(self, B: int, H: int, G: int, D: int, C: int, dtype: torch.dtype) -> None:
        self.G, self.C, self.scaling = G, C, D**-0.5
        self.query, self.new_keys, self.new_values = (torch.randn(B, h, 1, D).to(dtype) for h in (H * G, H, H))
        keys, values = (torch.randn(B, H, C + 1, D).to(dtype) for _ in range(2))
        facts, positions = torch.rand(4, B, H, C + 1), torch.arange(C + 1, dtype=torch.int32).repeat(B, H, 1)
        facts[0, :, :, C], positions[:, :, C] = -math.inf, -1
        facts[1], facts[3] = values.float().norm(dim=-1), 1 / keys.float().norm(dim=-1)
        self.state = keys, values, facts, positions, torch.full((B,), C, dtype=torch.int32)
        self.slot = torch.tensor([C // 2])

    def held(self) -> list[Tensor]:
        """Keys and values of the tokens that are held, anew."""
        return [x[:, :, : self.C].clone() for x in self.state[:2]]

    def ours(self) -> Tensor:
        return torch.ops.fsdc.decode_attention_.default(
            *(self.query, self.new_keys, self.new_values, *self.state, self.C),
            **dict(scaling=self.scaling, recent_tokens=self.C // 4, **RULE),
        )

    def original(self, *held: Tensor) -> tuple[Tensor, ...]:
        keys, values = self.with_new(*held)
        of_all_heads = [x.repeat_interleave(self.G, dim=1) for x in (keys, values)]
        logits = self.query @ of_all_heads[0].mT * self.scaling
        weights = logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
        output = weights @ of_all_heads[1]
        scores = weights.unflatten(1, (-1, self.G)).sum((2, 3))
        kept = scores.topk(self.C, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[-1])
        return output, keys.gather(2, kept), values.gather(2, kept)

    def dynamic(self, *held: Tensor) -> tuple[Tensor, ...]:
        keys, values = self.with_new(*held)
        return self.attend(keys, values), keys, values

    def static(self, *held: Tensor) -> Tensor:
        for x, new in zip(held, (self.new_keys, self.new_values), strict=True):
            x.index_copy_(2, self.slot, new)
        return self.attend(*held)

    def flex(self, *held: Tensor) -> Tensor:
        return compiled_flex(self.query, *held, scale=self.scaling, enable_gqa=True)

    def attend(self, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(self.query, keys, values, scale=self.scaling, enable_gqa=True)

    def with_new(self, *held: Tensor) -> list[Tensor]:
        pairs = zip(held, (self.new_keys, self.new_values), strict=True)
        return [torch.cat([x, new], dim=2) for x, new in pairs]


def read(*held: Tensor) -> list[Tensor]:
    """A sum over the bytes: two 16-bit numbers as one of 32 bits, which is as fast as they can be read."""
    return [x.view(torch.float32).sum() for x in held]


def contenders(step: Step, with_flex: bool) -> dict[str, Callable[[], object]]:
    keys, values = step.with_new(*step.held())
    torch.testing.assert_close(step.ours(), step.attend(keys, values), rtol=0.02, atol=0.02)
    others = {ORIGINAL: step.original, DYNAMIC: step.dynamic, STATIC: step.static, FLOOR: read}
    if with_flex:
        try:
            torch.testing.assert_close(step.flex(keys, values), step.attend(keys, values), rtol=0.02, atol=0.02)
            others[FLEX] = step.flex
        except Exception as error:  # it depends on compilers and types
            print(f"  flex attention does not compile: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
    return {OURS: step.ours, **{name: functools.partial(other, *step.held()) for name, other in others.items()}}


def measure(step: Step, seconds: float, with_flex: bool) -> dict[str, object]:
    chosen = contenders(step, with_flex)
    one_round = sum(x["median_us"] for x in time_in_turns(chosen, 3).values()) / 1e6
    times = time_in_turns(chosen, max(20, min(2000, int(seconds / one_round))))
    ours = times[OURS]["median_us"]
    others = {name: taken["median_us"] / ours for name, taken in times.items() if name not in (OURS, FLOOR)}
    return {"times": times, "times_faster_than": others, "share_of_read_floor": times[FLOOR]["median_us"] / ours}


def measure_small() -> dict[str, object]:
    """Where the call itself is what costs, beside the cheapest calls that take as many tensors."""
    step = Step(1, 4, 2, 8, 256, torch.float32)
    tiny = [torch.zeros(1) for _ in range(3 + len(step.state))]
    calls = {"torch.cat of as many tensors": lambda: torch.cat(tiny)}
    others = {name: x for name, x in contenders(step, False).items() if name in (OURS, STATIC, DYNAMIC)}
    times = time_in_turns({**others, **calls}, 3000, warm_up=2)
    ours = times[OURS]["median_us"]
    return {"times": times, "times_faster_than": {name: x["median_us"] / ours for name, x in times.items()}}


def show(name: str, case: dict[str, object], goals: dict[str, float]) -> None:
    print(name)
    for contender, taken in case["times"].items():
        faster = case.get("times_faster_than", {}).get(contender)
        goal = f" (goal {goals[contender]:g}x)" if contender in goals and contender != FLOOR else ""
        print(f"  {contender:28} {taken['median_us']:9.1f} us" + (f"  {faster:.1f}x ours{goal}" if faster else ""))
    if "share_of_read_floor" in case:
        goal = f" (goal {goals[FLOOR]:.0%})" if FLOOR in goals else ""
        print(f"  ours has {case['share_of_read_floor']:.0%} of the speed of the read floor{goal}")


def missed(case: dict[str, object], goals: dict[str, float]) -> list[str]:
    reached = {**case["times_faster_than"], FLOOR: case.get("share_of_read_floor")}
    return [goal for goal, least in goals.items() if reached[goal] < least]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--flex", action="store_true", help="flex attention too, which is compiled for each case")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    cases, failed = {}, []
    with torch.inference_mode():  # below autograd, as the cache calls it
        for threads in (1, 2):
            torch.set_num_threads(threads)
            if threads == 1 and arguments.only in SMALL:
                cases[SMALL] = measure_small()
                show(SMALL, cases[SMALL], GOAL_OF_SMALL)
                failed += [f"{SMALL}: {goal}" for goal in missed(cases[SMALL], GOAL_OF_SMALL)]
            for shape, (H, G, D) in SHAPES.items():
                for B in (1, 8):
                    for C in (256, 1024, 4096):
                        for kind, dtype in TYPES.items():
                            name = f"{threads} thread{'s' * (threads > 1)}, B={B} {shape} C={C}, {kind}"
                            if arguments.only not in name:
                                continue
                            has_goal = threads == 2 and B == 1 and D == 128
                            goals = GOALS.get((C, kind), {}) if has_goal else {}
                            cases[name] = measure(Step(B, H, G, D, C, dtype), arguments.seconds, arguments.flex)
                            show(name, cases[name], goals)
                            failed += [f"{name}: {goal}" for goal in missed(cases[name], goals)]
    shares = [case["share_of_read_floor"] for case in cases.values() if "share_of_read_floor" in case]
    if shares:
        print(f"share of the read floor: median {statistics.median(shares):.0%}, least {min(shares):.0%}")
    for goal in failed:
        print(f"missed: {goal}")
    if arguments.json:
        write(arguments.json, {"cases": cases})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
