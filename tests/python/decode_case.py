# SPDX-License-Identifier: Apache-2.0
"""One step of decode_attention_, with everything that it can be given, and how its outcome is compared."""

import math
from dataclasses import dataclass, field, replace

import torch
from inputs import assert_same_bits
from torch import Tensor

from fixed_size_kv_cache import reference

decode_attention_ = torch.ops.fsdc.decode_attention_
SCORES, VALUE_WEIGHTS, REDUNDANCY, KEY_SCALES = range(4)
STATE = ("keys", "values", "facts", "positions", "seen")
ENTRY = ("skipped_keys", "skipped_values", "skipped_count", "lost")
WRITTEN = (*STATE, *ENTRY)
DEFAULTS = dict(decay=0.9, prior=0.05, redundancy=0.95, value_weight=True, sink_tokens=1, recent_tokens=2)
TIE = 1e-5  # relative: kernels may choose either of two tokens whose eviction scores lie so close


@dataclass
class Case:
    """Arguments of one step by name; tensors are never shared with another case."""

    arguments: dict = field(default_factory=dict)

    def clone(self) -> "Case":
        return Case({name: x.clone() if isinstance(x, Tensor) else x for name, x in self.arguments.items()})

    def map(self, change) -> "Case":
        return Case({name: change(name, x) if isinstance(x, Tensor) else x for name, x in self.arguments.items()})

    def with_(self, **changed) -> "Case":
        return replace(self, arguments={**self.arguments, **changed})

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "arguments":
            raise AttributeError(name)
        return self.arguments[name]

    def run(self, operator=decode_attention_) -> Tensor:
        return operator(**self.arguments)

    @property
    def written(self) -> list[str]:
        return [name for name in WRITTEN if self.arguments.get(name) is not None]

    def heads(self) -> list[tuple[int, int]]:
        """Where the slots of each KV head lie: the first row of its batch row's, and their number ``N``."""
        if self.arguments.get("head_layout") is not None:
            return [(first, slots) for first, slots, _, _ in self.head_layout.tolist()]
        H, rows = self.keys.shape[1:3]
        return [(h * rows, rows - 1) for h in range(H)]


def random_case(
    B: int = 2,
    H: int = 2,
    G: int = 2,
    N: int = 12,
    D: int = 8,
    Dv: int | None = None,
    *,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    holes: float = 0.0,
    slots: list[int] | None = None,
    entry: str | None = None,
    **more,
) -> Case:
    """A step at ``length`` tokens seen (default: full), with a share of ``holes`` among the slots in use, an ``entry``
    of the evicted in either mode, and, with ``slots``, that many of each KV head."""
    Dv = D if Dv is None else Dv
    length = N + 3 if length is None else length
    N_of = [N] * H if slots is None else slots
    most = max(N_of, default=N)
    tokens = torch.randn(B, H, most + 1, D + Dv, dtype=torch.float64)
    facts = torch.zeros(4, B, H, most + 1)
    facts[SCORES] = -math.inf
    positions = torch.full((B, H, most + 1), -1, dtype=torch.int32)
    is_hole = torch.rand(B, length) < holes
    seen = (~is_hole).sum(1, dtype=torch.int32)
    tokens = tokens.to(dtype)
    keys, values = tokens[..., :D].contiguous(), tokens[..., D:].contiguous()
    for b in range(B):
        for h in range(H):
            T = min(length, N_of[h])
            real = torch.cat([torch.randperm(int(seen[b])), torch.full((length,), -1)])  # slots are unordered
            real = real[torch.randperm(T)] if holes else real[:T]
            positions[b, h, :T] = real[:T].int()
    held = positions >= 0
    facts[SCORES][held] = torch.rand(int(held.sum())) * 3
    facts[VALUE_WEIGHTS] = values.float().norm(dim=-1)
    facts[REDUNDANCY] = torch.rand(held.shape).clamp(max=0.9)
    facts[KEY_SCALES] = 1 / keys.float().norm(dim=-1).clamp(min=1e-12)
    arguments = dict(
        query=torch.randn(B, H * G, 1, D).to(dtype),
        new_keys=torch.randn(B, H, 1, D).to(dtype),
        new_values=torch.randn(B, H, 1, Dv).to(dtype),
        keys=keys,
        values=values,
        facts=facts,
        positions=positions,
        seen=seen,
        length=length,
        scaling=D**-0.5 if D else 1.0,
        **DEFAULTS,
    )
    if slots is not None:
        arguments |= flat(arguments, slots)
    if entry is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        arguments |= dict(
            skipped_keys=torch.randn(B, H, D, dtype=wide),
            skipped_values=torch.randn(B, H, Dv, dtype=wide),
            skipped_count=torch.randint(0, 5, (B, H), dtype=torch.int32),
            lost=torch.rand(B, H),
            skipped_mean=entry == "mean",
        )
        none = arguments["skipped_count"] == 0
        arguments["skipped_keys"][none], arguments["skipped_values"][none] = 0, 0
    return Case({**arguments, **more}).map(lambda _, x: x.to(device))


def flat(arguments: dict, slots: list[int]) -> dict:
    """The same slots with those of all heads in one row, ``slots[h] + 1`` of head ``h``."""

    def rows(x: Tensor, dim: int) -> Tensor:
        return torch.cat([x.select(dim, h).narrow(dim, 0, N + 1) for h, N in enumerate(slots)], dim)

    starts = [sum(slots[:h]) + h for h in range(len(slots))]
    protection = [arguments["sink_tokens"], arguments["recent_tokens"]]
    layout = [[start, N, *protection] for start, N in zip(starts, slots, strict=True)]
    return {
        **{name: rows(arguments[name], 1) for name in ("keys", "values", "positions")},
        "facts": rows(arguments["facts"], 2),
        "head_layout": torch.tensor(layout, dtype=torch.int32),
    }


def in_rows(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys ``[B, rows, D]``, values, facts ``[4, B, rows]`` and positions ``[B, rows]`` of all KV heads."""
    slots = case.keys, case.values, case.facts, case.positions
    if case.arguments.get("head_layout") is not None:
        return slots
    return tuple(x.flatten(2, 3) if x is case.facts else x.flatten(1, 2) for x in slots)


def strided(name: str, x: Tensor) -> Tensor:
    """The same numbers in other memory: every dimension in another place, with gaps. For Case.map."""
    if name in ("skipped_keys", "skipped_values", "skipped_count", "lost", "head_layout", "sinks"):
        return x.clone()  # must be contiguous
    order = list(range(x.dim() - 1))[::-1]
    gap = 2 if name in ("seen", "valid", "protected") else 1
    memory = torch.zeros([*(x.shape[i] for i in order), gap * (x.shape[-1] + 3)], dtype=x.dtype, device=x.device)
    view = memory[..., 1 : 1 + gap * x.shape[-1] : gap].permute(*order, x.dim() - 1)  # its own inverse
    view.copy_(x)
    return view


def assert_same_step(actual: Case, expected: Case) -> None:
    """That two steps have left the same tokens: copies the same bits, numbers the same within float32's rounding.

    Where two eviction scores lie within 1e-5 of each other either token may have gone.
    """
    assert_same_bits(actual.seen.cpu(), expected.seen.cpu())
    agree = torch.ones(actual.new_keys.shape[:2], dtype=torch.bool)
    keys, values, facts, positions = (x.cpu() for x in in_rows(actual))
    other_keys, other_values, other_facts, other_positions = (x.cpu() for x in in_rows(expected))
    for b in range(positions.shape[0]):
        for h, (first, N) in enumerate(actual.heads()):
            here = slice(first, first + N)
            at, other_at = positions[b, here].tolist(), other_positions[b, here].tolist()
            same = positions[b, here] == other_positions[b, here]
            if not same.all():
                agree[b, h] = False
                assert_tie(expected, (b, h), facts[:, b, here], at, other_facts[:, b, here], other_at)
            held = same & (positions[b, here] >= 0)
            for x, y in ((keys, other_keys), (values, other_values)):
                assert_same_bits(x[b, here][held], y[b, here][held])
            torch.testing.assert_close(
                facts[:, b, here][:, held], other_facts[:, b, here][:, held], rtol=TIE / 2, atol=2e-6, equal_nan=True
            )
            assert (facts[SCORES, b, here][same & ~held] == -math.inf).all()
    if actual.arguments.get("valid") is not None:
        agree &= actual.valid.cpu()[:, None]
    for name in ENTRY if actual.arguments.get("skipped_keys") is not None else ():
        x, y = (getattr(case, name).cpu()[agree] for case in (actual, expected))
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


def assert_nothing_else_written(case: Case, before: Case) -> None:
    """That a slot whose position is as it was holds the bits that it held, but for score and redundancy."""
    positions, old_positions = in_rows(case)[3], in_rows(before)[3]
    untouched = positions == old_positions
    for x, y in ((in_rows(case)[i], in_rows(before)[i]) for i in (0, 1)):
        assert_same_bits(x[untouched], y[untouched])
    for plane in (VALUE_WEIGHTS, KEY_SCALES):
        assert_same_bits(in_rows(case)[2][plane][untouched], in_rows(before)[2][plane][untouched])
    for name in case.arguments.keys() - set(WRITTEN):
        if isinstance(case.arguments[name], Tensor):
            assert_same_bits(getattr(case, name), getattr(before, name))


def assert_tie(rule: Case, where, facts: Tensor, at: list[int], other_facts: Tensor, other_at: list[int]) -> None:
    """That the tokens which only one of two states holds have eviction scores within ``TIE`` of each other."""
    one, other = set(at) - set(other_at), set(other_at) - set(at)
    assert len(one) == len(other) == 1, (where, at, other_at)
    group = rule.query.shape[1] // rule.new_keys.shape[1]

    def score(facts: Tensor, slot: int) -> float:
        s, w, r, _ = facts[:, slot].tolist()
        return (s + rule.prior * group) * (w if rule.value_weight else 1) * (1 - rule.redundancy * r)

    mine, theirs = score(facts, at.index(one.pop())), score(other_facts, other_at.index(other.pop()))
    assert abs(mine - theirs) <= TIE * max(abs(mine), abs(theirs)), (where, mine, theirs)


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def check(case: Case) -> Case:
    """Runs a step on the operator, and on the CPU on the specification, and compares; returns the state it left."""
    before, expected = case.clone(), case.map(lambda _, x: x.cpu().clone())
    wanted = expected.run(reference.decode_attention_)
    output = case.run()
    assert output.is_contiguous()
    held = torch.cat([x.double().flatten() for x in (case.values, case.new_values, torch.ones(1))])
    scale = held[held.isfinite()].abs().max().item()
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(output.cpu(), wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    assert_same_step(case, expected)
    assert_nothing_else_written(case, before)
    return case
