"""Means over prompts with their 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["arithmetic", "geometric", "harmonic"]
_AS: dict[Kind, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "arithmetic": (lambda x: x, lambda x: x),
    "geometric": (np.log, np.exp),
    "harmonic": (lambda x: 1 / x, lambda x: 1 / x),
}


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its interval.

    mean: of the values.
    low, high: ends of the interval; both are the mean if all values are equal.
    n: number of values.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def mean(values: Sequence[float], kind: Kind = "arithmetic") -> Mean:
    """The mean of values, with its interval. The bootstrap has a fixed seed.

    values: at least one; above 0 for a geometric or harmonic mean.
    kind: of the mean.
    """
    from scipy.stats import bootstrap

    transform, back = _AS[kind]
    inner = transform(np.asarray(values, dtype=np.float64))
    middle = float(back(inner.mean()))
    if len(inner) < 2 or np.ptp(inner) == 0:
        return Mean(middle, middle, middle, len(inner))
    rng = np.random.default_rng(0)
    interval = bootstrap((inner,), np.mean, method="percentile", rng=rng).confidence_interval
    low, high = sorted((float(back(interval.low)), float(back(interval.high))))
    return Mean(middle, low, high, len(inner))


RESAMPLES = 999
"""Bootstrap samples of a rank correlation."""


def rank_correlation(groups: Sequence[Sequence[tuple[float, float]]]) -> Mean:
    """Spearman's rank correlation of some pairs of numbers; 0 where all firsts or all seconds are equal.

    groups: the pairs, those of one prompt together, one pair at least. The bootstrap draws groups.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    rng = np.random.default_rng(0)
    drawn = [_spearman([arrays[i] for i in rng.integers(len(arrays), size=len(arrays))]) for _ in range(RESAMPLES)]
    middle = _spearman(arrays)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Mean(middle, min(float(low), middle), max(float(high), middle), sum(map(len, arrays)))


def _spearman(arrays: Sequence[Any]) -> float:
    from scipy.stats import rankdata

    first, second = (rankdata(column) for column in np.concatenate(arrays).T)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
