# SPDX-License-Identifier: Apache-2.0
"""The rules that are tried on a real model, and how many slots each of its KV heads has."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from simulator import Held, Vote, cut

from fixed_size_kv_cache.head_budgets import head_budgets
from fixed_size_kv_cache.settings import FixedSizeCacheConfig

PYRAMID = 20  # PyramidKV's beta: the last layer has a 20th of the average


@dataclass(frozen=True)
class Rule:
    """One way to choose the tokens of a head and the sizes of heads.

    Attributes:
        name: as the tables have it.
        forgetting: a in gamma = 1 - a / C; 0 never forgets.
        score: what attention a token is judged by: its decayed ``sum``, the ``mean`` over the queries that saw it, or
            the decayed ``max``.
        recent: the share of a head's slots for its last tokens.
        heads: ``equal``, or ``unequal`` by the profile; ``layers``: equal in a layer, by the profile's mean of it;
            ``pyramid``: equal in a layer, fewer from layer to layer.
        floor: of unequal heads, the share of the average that each has at least.
        profile: the name of the profile that says how unequal.
        knobs: of :class:`FixedSizeCacheConfig`.
    """

    name: str
    forgetting: float = 4.0
    score: str = "sum"
    recent: float = 0.25
    heads: str = "equal"
    floor: float = 0.25
    profile: str = "usual"
    knobs: dict = field(default_factory=dict)

    def vote(self, C: int) -> Vote:
        """What a reading must add up for this rule."""
        return Vote("max" if self.score == "max" else "sum", 1.0 if self.score == "mean" else self.decay(C))

    def decay(self, C: int) -> float:
        return 1 - self.forgetting / max(C, 2 * self.forgetting)

    def settings(self, cache_size: int | Sequence[Sequence[int]], C: int) -> FixedSizeCacheConfig:
        """The product's; ``cache_size``: of all heads, or of each with the average ``C``."""
        return FixedSizeCacheConfig(
            cache_size=cache_size,
            recent_tokens=int(self.recent * C),
            score_decay=self.decay(C),
            include_skipped=False,
            free_memory=False,
            **self.knobs,
        )

    def sizes(self, errors: Sequence[Sequence[float]], C: int, tokens: int) -> list[list[int]]:
        """Slots of each head of each layer, ``C`` on average, none more than the ``tokens`` of the text."""
        if tokens <= C or self.heads == "equal":
            return [[C] * len(layer) for layer in errors]
        if self.heads == "unequal":
            return head_budgets(errors, C, self.floor, tokens)
        if self.heads == "layers":
            return head_budgets([[sum(layer) / len(layer)] * len(layer) for layer in errors], C, self.floor, tokens)
        last = max(1, len(errors) - 1)
        falling = [[1 - at / last] * len(layer) for at, layer in enumerate(errors)]
        return head_budgets(falling, C, 1 / PYRAMID, tokens)

    def apply(self, layers: Sequence[Held], sizes: Sequence[Sequence[int]], C: int, group: int) -> list[Held]:
        """What stays of the layers of a model."""
        vote, settings, kept = self.vote(C), self.settings(sizes, C), []
        for i, held in enumerate(layers):
            scores = held.votes[vote]
            if self.score == "mean":
                scores = scores / (held.seen - held.positions).clamp(min=1)
            kept.append(cut(held, scores, settings.of_layer(i), group))
        return kept

    def as_row(self) -> dict:
        """What the results say of it."""
        said = asdict(self)
        return said | said.pop("knobs")


def ours(forgetting: float, prior: float, rho: float) -> Rule:
    """Our rule, named by its three numbers."""
    name = f"gamma = 1 - {forgetting:g}/C, p = {prior:g}, rho = {rho:g}"
    return Rule(name, forgetting, knobs=dict(score_prior=prior, redundancy=rho))


def unequal(rule: Rule, floor: float = 0.25, **changes) -> Rule:
    """A rule of which heads have sizes of their own."""
    name = f"unequal, floor C/{1 / floor:g}: {rule.name}"
    return replace(rule, **{"name": name, "heads": "unequal", "floor": floor, **changes})


NEITHER = dict(score_prior=0.0, redundancy=0.0)
MEAN = Rule("mean over the queries that saw it", 0.0, "mean", knobs=NEITHER)
PLAIN = ours(2, 0, 0)
DEFAULT = ours(4, 0.02, 0.95)
LARGER_PRIOR = ours(4, 0.05, 0.95)  # what the toy models like
BASELINES = [
    Rule("accumulated attention (H2O)", 0.0, recent=0.5, knobs=dict(NEITHER, value_weight=False)),
    Rule("4 sinks and last tokens", knobs=dict(policy="streaming", sink_tokens=4)),
    Rule("random", recent=0.5, knobs=dict(policy="random")),
]
MAIN = [  # at every size
    DEFAULT,
    LARGER_PRIOR,
    ours(4, 0.02, 0.5),
    PLAIN,
    MEAN,
    *BASELINES,
    unequal(DEFAULT),
    unequal(DEFAULT, 0.125),
    unequal(PLAIN),
]
FEW = [DEFAULT, LARGER_PRIOR, PLAIN, *BASELINES[:2], unequal(DEFAULT), unequal(PLAIN)]  # of the other measures
MORE = [  # at the middle sizes, after a prompt
    ours(4, 0, 0.95),
    ours(4, 0, 0),
    ours(4, 0.02, 0),
    ours(4, 0.02, 0.9),
    ours(4, 0.05, 0),
    ours(2, 0.02, 0.95),
    ours(2, 0.02, 0.5),
    ours(2, 0.05, 0.95),
    ours(1, 0, 0),
    Rule("max(gamma s, p), gamma = 1 - 2/C", 2.0, "max", knobs=NEITHER),
    Rule("no value weight, gamma = 1 - 2/C", 2.0, knobs=dict(NEITHER, value_weight=False)),
    unequal(DEFAULT, 0.5),
    unequal(LARGER_PRIOR),
    unequal(MEAN),
]
SHARES = [  # how much of it is due to layers, and how much to which text the profile has read; at one size
    replace(DEFAULT, name="equal in a layer, layers by the profile", heads="layers"),
    replace(DEFAULT, name="equal in a layer, layers as PyramidKV guesses", heads="pyramid"),
    *(
        unequal(DEFAULT, name=f"unequal, floor C/4, profile of {profile}", profile=profile)
        for profile in ("the first text", "the second text", "half as many tokens", "random ids", "other random ids")
    ),
]
