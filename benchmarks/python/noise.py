# SPDX-License-Identifier: Apache-2.0
"""How much of what a rule of eviction does better or worse than the default is noise.

All rules read the same texts, and hard texts are hard for all: a difference is judged by its own spread over texts, not
by that of the figures. It counts as real from two standard errors on.
"""

from math import exp, hypot, log, sqrt
from statistics import fmean, stdev
from typing import NamedTuple


class Difference(NamedTuple):
    """From the default, and its standard error."""

    value: float
    error: float

    @property
    def is_real(self) -> bool:
        return abs(self.value) > 2 * self.error


def of_recall(rows: list[dict], default: list[dict]) -> Difference:
    """The share of questions answered right, in points: the mean over tasks and sizes; a row of each per size."""
    parts = []
    for task in default[0]["answers"]:
        asked = [text[1] for text in default[0]["answers"][task]]
        more = [0.0] * len(asked)  # right answers of each text, the mean over sizes
        for row, usual in zip(rows, default, strict=True):
            pairs = zip(row["answers"][task], usual["answers"][task], strict=True)
            more = [x + (ours[0] - theirs[0]) / len(rows) for x, (ours, theirs) in zip(more, pairs, strict=True)]
        share = sum(more) / sum(asked)
        rest = [x - share * count for x, count in zip(more, asked, strict=True)]  # texts have few questions or many
        parts.append((share, _error_of_mean(rest) / fmean(asked)))
    return Difference(100 * fmean(x for x, _ in parts), 100 * hypot(*(error for _, error in parts)) / len(parts))


def of_divergence(rows: list[dict], default: list[dict], figures: str = "kl_of_stories") -> Difference:
    """The divergence, in percent of the default's: the geometric mean over sizes, since it falls with the size."""
    ratio, rest = 0.0, [0.0] * len(default[0][figures])
    for row, usual in zip(rows, default, strict=True):
        ours, theirs = row[figures], usual[figures]
        mean, usual_mean = fmean(ours), fmean(theirs)
        ratio += log(mean / usual_mean) / len(rows)
        rest = [z + (x / mean - y / usual_mean) / len(rows) for z, x, y in zip(rest, ours, theirs, strict=True)]
    return Difference(100 * (exp(ratio) - 1), 100 * exp(ratio) * _error_of_mean(rest))


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, of figures that are all different."""
    n = len(one)
    ranks = [sorted(range(n), key=lambda at: figures[at]) for figures in (one, other)]
    first, second = ({at: rank for rank, at in enumerate(order)} for order in ranks)
    return 1 - 6 * sum((first[at] - second[at]) ** 2 for at in range(n)) / (n * (n * n - 1))


def _error_of_mean(values: list[float]) -> float:
    return stdev(values) / sqrt(len(values))
