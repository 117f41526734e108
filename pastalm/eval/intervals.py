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
