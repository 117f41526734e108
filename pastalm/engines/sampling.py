"""From logits to tokens for a whole step at once, by NumPy, in float32 (float64 for float64 logits).

Order: raw log-probabilities, `logit_bias`, repetition penalty, `allowed`, temperature, top-k, top-p,
min-p, then the Gumbel-max draw. The noise of a token id is a hash of (key, id), with the key a hash
of (seed, choice, path, index of the token in its thread): it does not depend on who else is in the
batch, nor on the device. Greedy rows take the largest logit after `allowed`; so do rows whose
temperature is so near 0 that scaled logits are not finite. Of equal logits the smaller id comes first.
Each row is sampled by itself: what it gets does not depend on the others.

torch stands in `sampling_torch.py`, for engines whose logits are tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pastalm.engine import SamplingParams
from pastalm.errors import EngineError
from pastalm.events import Path, TokenSet

CANDIDATES = 1024
"""Ids looked at first where top-p truncates: nearly always enough, and sorts far fewer."""
MASKS = 64
"""Sets of allowed ids kept as arrays: those seen last."""

Ints: TypeAlias = NDArray[np.int64]
Row: TypeAlias = NDArray[Any]
"""Logits [vocabulary], float32 or float64."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_NO_IDS: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to some logits. ids: int64; added: float64, one for each."""

    ids: Ints
    added: NDArray[np.float64]

    @classmethod
    def of(cls, logit_bias: Mapping[int, float]) -> Bias | None:
        """None if nothing is added."""
        if not logit_bias:
            return None
        ids = np.fromiter(logit_bias.keys(), np.int64, len(logit_bias))
        return cls(ids, np.fromiter(logit_bias.values(), np.float64, len(logit_bias)))


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is to be sampled with. key: from `noise_key`. seen: distinct ids that the
    repetition penalty counts (only looked at if there is one)."""

    params: SamplingParams
    key: int = 0
    bias: Bias | None = None
    allowed: TokenSet | None = None
    seen: Ints | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's token, with raw log-probabilities if they were asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler(Protocol):
    """Samples the rows of one kind of array, NumPy's or torch's."""

    def __call__(self, logits: Any, draws: Sequence[Draw]) -> list[Sampled]:
        """A token for each row of logits [rows, vocabulary]; also takes what `stack` gives. Raises
        EngineError if a row's `allowed` admits no id."""

    def stack(self, rows: Sequence[Any]) -> Any:
        """Rows that lie apart, as logits that are sampled together."""

    def copy(self, row: Any) -> Any:
        """A row that stays as it is when its memory is written anew."""


def noise_key(seed: int, choice: int, path: Path, index: int) -> int:
    """A stable signed 64-bit key for token `index` of thread `path`."""
    text = f"{seed}/{choice}/{'.'.join(map(str, path))}/{index}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def gumbel(key: int, ids: Ints) -> NDArray[np.float64]:
    """Gumbel noise of each id: -log(-log(u)), with u the upper 52 bits of splitmix64 of (key, id)."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(key & (1 << 64) - 1)
    for shift, mixer in zip((30, 27), _MIXERS, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * mixer
    uniform = ((x ^ (x >> np.uint64(31))) >> np.uint64(12)).astype(np.float64)
    return -np.log(-np.log((uniform + 0.5) * 2.0**-52))


class ArraySampler:
    """Samples rows of NumPy arrays over `vocabulary_size` ids."""

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        self._sets: OrderedDict[TokenSet, Ints] = OrderedDict()

    def stack(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows  # rows are looked at one by one: they need not lie together

    def copy(self, row: Row) -> Row:
        return row.copy()

    def __call__(self, logits: Sequence[Row] | NDArray[Any], draws: Sequence[Draw]) -> list[Sampled]:
        return [
            _measured(row, self._token(shaped(row, draw), draw), draw)
            for row, draw in zip(logits, draws, strict=True)
        ]

    def _token(self, row: Row, draw: Draw) -> int:
        if draw.params.greedy:
            # the largest logit is nearly always allowed: only where it is not, the others are hidden
            token = int(row.argmax())
            if draw.allowed is None or token in draw.allowed:
                return token
        values, ids = self._within(row, draw.allowed)
        chosen = int(values.argmax()) if draw.params.greedy else _drawn(values, ids, draw)
        return chosen if ids is None else int(ids[chosen])

    def _within(self, row: Row, allowed: TokenSet | None) -> tuple[Row, Ints | None]:
        """The logits of the allowed ids, and which those are (None: each at its own index, the others -inf)."""
        if allowed is None:
            return row, None
        ids = self._ids(allowed)
        if not allowed.inverted:
            return row[ids], ids
        row = row.copy()
        row[ids] = -np.inf
        return row, None

    def _ids(self, allowed: TokenSet) -> Ints:
        """The set's ids (inverted: those it leaves out) within the vocabulary, ascending."""
        ids = self._sets.get(allowed)
        if ids is None:
            ids = np.array(sorted(i for i in allowed.ids if 0 <= i < self._size), dtype=np.int64)
            if len(ids) == (self._size if allowed.inverted else 0):
                raise EngineError("a thread is allowed no token of the vocabulary")
            self._sets[allowed] = ids
            if len(self._sets) > MASKS:
                self._sets.popitem(last=False)
        self._sets.move_to_end(allowed)
        return ids


def shaped(row: Row, draw: Draw) -> Row:
    """The row with bias and repetition penalty; itself if there are none. Seen ids' logits are divided (if
    positive) or multiplied by the penalty."""
    penalty, seen = row.dtype.type(draw.params.repetition_penalty), draw.seen
    penalised = seen is not None and penalty != 1
    if draw.bias is None and not penalised:
        return row
    row = row.copy()
    if draw.bias is not None:
        row[draw.bias.ids] += draw.bias.added.astype(row.dtype)
    if penalised:
        before = row[seen]
        row[seen] = np.where(before > 0, before / penalty, before * penalty)
    return row


def _drawn(values: Row, ids: Ints | None, draw: Draw) -> int:
    """An index into `values`, drawn by Gumbel-max from the truncated distribution."""
    scaled = _scaled(values, draw.params.temperature)
    if scaled is None:
        return int(values.argmax())
    kept = _truncated(scaled, draw.params)
    if kept is not None:
        scaled = scaled[kept]
        ids = kept if ids is None else ids[kept]
    noise = gumbel(draw.key, np.arange(len(values)) if ids is None else ids)
    best = int((scaled + noise).argmax())
    return best if kept is None else int(kept[best])


def _scaled(values: Row, temperature: float) -> Row | None:
    """Logits by temperature; None where it is so small that the largest is not finite."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled: Row = values / values.dtype.type(temperature)
    return scaled if np.isfinite(scaled.max()) else None


def _truncated(scaled: Row, params: SamplingParams) -> Ints | None:
    """Indices that top-k, then top-p, then min-p leave; None if all."""
    kept: Ints | None = None
    if 0 < params.top_k < len(scaled):
        kept = _largest(scaled, params.top_k)
    if params.top_p < 1:
        inner = _nucleus(scaled if kept is None else scaled[kept], params.top_p)
        kept = inner if kept is None else kept[inner]
    if params.min_p > 0:
        values = (scaled if kept is None else scaled[kept]).astype(np.float64)
        inner = np.flatnonzero(values - values.max() >= np.log(params.min_p))
        kept = inner if kept is None else kept[inner]
    return kept


def _largest(values: Row, n: int) -> Ints:
    """Indices of the n largest, ascending; of equal values the first."""
    if n >= len(values):
        return np.arange(len(values))
    least = np.partition(values, len(values) - n)[len(values) - n]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: n - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(scaled: Row, share: float) -> Ints:
    """Indices of the largest values that together have `share` of the probability, the last one whole."""
    weights = np.exp((scaled - scaled.max()).astype(np.float64))
    goal = share * weights.sum()
    for width in (CANDIDATES, len(scaled)):
        found = _largest(scaled, width)
        found = found[np.argsort(-scaled[found], kind="stable")]
        reached = np.cumsum(weights[found])
        if reached[-1] >= goal:
            break
    return np.sort(found[: int(np.searchsorted(reached, goal)) + 1])


def _measured(row: Row, token: int, draw: Draw) -> Sampled:
    """The token with the raw log-probabilities that were asked for."""
    n = draw.params.logprobs
    if n is None:
        return Sampled(token)
    largest = row.max()
    total = float(largest) + float(np.log(np.exp(row - largest).sum(dtype=np.float64)))
    top = _largest(row, n) if n else _NO_IDS
    top = top[np.argsort(-row[top], kind="stable")]
    pairs = tuple((int(i), float(row[i]) - total) for i in top)
    return Sampled(token, float(row[token]) - total, pairs)
