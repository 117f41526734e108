"""From logits to tokens for a whole step at once, by NumPy, in float32 (float64 for float64 logits).

Order: raw log-probabilities, the logits processors (`processors/`: bias, repetition penalty, a request's own),
`allowed`, temperature, top-k, top-p, min-p, then the Gumbel-max draw. The noise of a token id is a hash of (key, id),
with the key a hash of (seed, choice, path, index of the token in its thread): it does not depend on other requests, nor
on the device. Greedy rows take the largest logit after `allowed`; so do rows whose temperature is so near 0 that scaled
logits are not finite. Of equal logits the smaller id comes first. Each row is sampled by itself: what it gets does not
depend on the others.

For logits that are tensors, see `transformers/sampling.py`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import Path, TokenSet
from pastalm.core.params import SamplingParams
from pastalm.engines.processors.base import Ints as Ints
from pastalm.engines.processors.base import LogitRow as LogitRow
from pastalm.engines.processors.base import Visible
from pastalm.engines.processors.chain import NOTHING, Chain, processed
from pastalm.errors import EngineError, PastaError

CANDIDATES = 256
"""The likeliest ids that top-p sorts first: nearly always enough."""
ROUNDING = 1e-5
"""Beyond what is lost, as a share, in a sum of exponentials of float32 differences."""
FIRST = 256
"""Ids whose noise is drawn first where any may be drawn: the likeliest."""
MOST_NOISE = 36.737
"""No noise is above this: -log(-log(1 - 2**-53)) = 36.7368."""
MASKS = 64
"""Sets of allowed ids kept as arrays: those seen last."""

NOTHING_ALLOWED = "a thread is allowed no token of the vocabulary"

Winners: TypeAlias = Callable[[Sequence[LogitRow], Sequence[float], Sequence[int]], list[int]]
"""Of rows, their temperatures and their keys: the id with the largest logit by temperature + noise in each."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


_to_infinity = np.errstate(over="ignore", divide="ignore", invalid="ignore")
"""Inside, too large values become infinite without a warning."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row of logits is sampled.

    key: key of the noise, from `noise_key`.
    processors: those of its thread, in order. visible: what they are told that it sees.
    """

    params: SamplingParams
    key: int = 0
    processors: Chain = ()
    allowed: TokenSet | None = None
    visible: Visible = NOTHING


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one row, with raw log-probabilities if the request wants them. lost: why there is none (`token`
    means nothing then): a processor failed, or nothing is allowed."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    lost: str = ""


class Sampler(Protocol):
    """Samples the rows of one kind of array, NumPy's or torch's."""

    def __call__(self, logits: Any, draws: Sequence[Draw]) -> list[Sampled]:
        """A token for each row of logits [rows, vocabulary]; also takes what `stack` gives. A row that fails is lost,
        and no other."""

    def stack(self, rows: Sequence[Any]) -> Any:
        """Rows that lie apart, as logits that are sampled together."""

    def copy(self, row: Any) -> Any:
        """A row that stays as it is when its memory is written anew."""


def noise_key(seed: int, choice: int, path: Path, index: int) -> int:
    """A stable signed 64-bit key for token `index` of thread `path`."""
    text = f"{seed}/{choice}/{'.'.join(map(str, path))}/{index}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def uniform(key: int, ids: Ints) -> NDArray[np.float64]:
    """A number in (0, 1) for each id: the upper 52 bits of splitmix64 of (key, id)."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(key & (1 << 64) - 1)
    for shift, mixer in zip((30, 27), _MIXERS, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * mixer
    x = (x ^ (x >> np.uint64(31))) >> np.uint64(12)
    return (x.astype(np.float64) + 0.5) * 2.0**-52


def gumbel(key: int, ids: Ints) -> NDArray[np.float64]:
    """Gumbel noise of each id: -log(-log(u))."""
    return -np.log(-np.log(uniform(key, ids)))


class ArraySampler:
    """Samples rows of NumPy arrays over `vocabulary_size` ids.

    Rows from which any id may be drawn are drawn all in one call of the native library, where there is
    one, else by NumPy; the tokens are the same. native=False: by NumPy in any case.
    """

    def __init__(self, vocabulary_size: int, *, native: bool = True) -> None:
        from pastalm.engines.native import draw  # that package's engine needs this module

        self._size = vocabulary_size
        self._winners = (draw.load() if native else None) or winners
        self._sets: OrderedDict[TokenSet, Ints] = OrderedDict()

    def stack(self, rows: Sequence[LogitRow]) -> Sequence[LogitRow]:
        return rows  # rows are looked at one by one: they need not lie together

    def copy(self, row: LogitRow) -> LogitRow:
        return row.copy()

    def __call__(self, logits: Sequence[LogitRow], draws: Sequence[Draw]) -> list[Sampled]:
        sampled: dict[int, Sampled] = {}
        free: dict[int, LogitRow] = {}
        for i, draw in enumerate(draws):
            params, allowed = draw.params, draw.allowed
            try:
                row = shaped(logits[i], draw)
                if params.greedy or truncates(params) or allowed is not None and not allowed.inverted:
                    sampled[i] = _measured(logits[i], self._token(row, draw), draw)
                else:
                    free[i] = row
            except PastaError as error:
                sampled[i] = Sampled(-1, lost=str(error))
        if free:
            temperatures, keys = [draws[i].params.temperature for i in free], [draws[i].key for i in free]
            for i, token in zip(free, self._winners(list(free.values()), temperatures, keys), strict=True):
                try:
                    sampled[i] = _measured(logits[i], self._allowed(token, free[i], draws[i]), draws[i])
                except PastaError as error:
                    sampled[i] = Sampled(-1, lost=str(error))
        return [sampled[i] for i in range(len(draws))]

    def _allowed(self, token: int, row: LogitRow, draw: Draw) -> int:
        """What a row gives of which `token` wins among all ids. It is nearly always allowed, and then it wins among the
        allowed ones too: only where it is not, the others are hidden."""
        if draw.allowed is None or token in draw.allowed:
            return token
        row, _ = self._within(row, draw.allowed)
        (token,) = self._winners([row], [draw.params.temperature], [draw.key])
        return admitted(token, draw.allowed)

    def _token(self, row: LogitRow, draw: Draw) -> int:
        if draw.params.greedy:
            token = int(row.argmax())
            if draw.allowed is None or token in draw.allowed:
                return token
        values, ids = self._within(row, draw.allowed)
        chosen = int(values.argmax()) if draw.params.greedy else _drawn(values, ids, draw)
        return admitted(chosen, draw.allowed) if ids is None else int(ids[chosen])

    def _within(self, row: LogitRow, allowed: TokenSet | None) -> tuple[LogitRow, Ints | None]:
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
                raise EngineError(NOTHING_ALLOWED)
            self._sets[allowed] = ids
            if len(self._sets) > MASKS:
                self._sets.popitem(last=False)
        self._sets.move_to_end(allowed)
        return ids


def admitted(token: int, allowed: TokenSet | None) -> int:
    """The token, if it is allowed; else, since the logits of all allowed ones are -inf, the first of those."""
    if allowed is None or token in allowed:
        return token
    return next(i for i in count() if i in allowed)


def shaped(row: LogitRow, draw: Draw) -> LogitRow:
    """The row as the processors leave it; itself if there are none."""
    return processed(draw.processors, draw.visible, row.copy()) if draw.processors else row


def winners(rows: Sequence[LogitRow], temperatures: Sequence[float], keys: Sequence[int]) -> list[int]:
    """The id of the largest logit by temperature + noise in each row."""
    return [_winner(*of) for of in zip(rows, temperatures, keys, strict=True)]


@_to_infinity
def _winner(row: LogitRow, temperature: float, key: int) -> int:
    scaled = _scaled(row, temperature)
    if scaled is None:
        return int(row.argmax())
    likeliest = _descending(scaled, FIRST)
    best = float((scaled[likeliest] + gumbel(key, likeliest)).max())
    # another id can win only if its noise, at most -log(1 - u), reaches what it lacks; `slack`: beyond rounding
    slack = 1e-3 + 1e-6 * abs(best)
    ids = np.flatnonzero(scaled >= scaled.dtype.type(best - MOST_NOISE - slack))
    ids = ids[1 - uniform(key, ids) <= np.exp(scaled[ids] - scaled.dtype.type(best - slack))]
    return int(ids[(scaled[ids] + gumbel(key, ids)).argmax()])


@_to_infinity
def _drawn(values: LogitRow, ids: Ints | None, draw: Draw) -> int:
    """An index into `values`, drawn by Gumbel-max from the truncated distribution. ids: what the values belong to
    (None: each to its index)."""
    scaled = _scaled(values, draw.params.temperature)
    if scaled is None:
        return int(values.argmax())
    kept = _truncated(scaled, draw.params)
    noise = gumbel(draw.key, kept if ids is None else ids[kept])
    return int(kept[(scaled[kept] + noise).argmax()])


def _scaled(values: LogitRow, temperature: float) -> LogitRow | None:
    """Logits by temperature; None where it is so small that the largest is not finite."""
    if temperature != 1:
        values = values / values.dtype.type(min(temperature, float(np.finfo(values.dtype).max)))
    return values if np.isfinite(values.max()) else None


def truncates(params: SamplingParams) -> bool:
    """Whether not all ids can be drawn."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _truncated(scaled: LogitRow, params: SamplingParams) -> Ints:
    """Indices that top-k, then top-p, then min-p leave."""
    largest = float(scaled.max())
    least = largest + math.log(params.min_p) if params.min_p > 0 else -math.inf
    if 0 < params.top_k < len(scaled):
        kept = _descending(scaled, params.top_k)
        if params.top_p < 1:
            reached = np.cumsum(np.exp(scaled[kept].astype(np.float64) - largest))
            kept = kept[: int(np.searchsorted(reached, params.top_p * reached[-1])) + 1]
    elif params.top_p < 1:
        kept = _nucleus(scaled, largest, params.top_p)
    else:  # rounded down, so that none is lost
        kept = np.flatnonzero(scaled >= np.nextafter(scaled.dtype.type(least), -np.inf))
    return kept[scaled[kept].astype(np.float64) >= least]


def _nucleus(scaled: LogitRow, largest: float, share: float) -> Ints:
    """Indices of the largest values that together have `share` of the probability, the last one whole."""
    goal = share * float(np.exp(scaled - scaled.dtype.type(largest)).sum(dtype=np.float64))
    width = 0
    reached = np.zeros(1)
    while reached[-1] < goal * (1 + ROUNDING) and width < len(scaled):
        width = min(len(scaled), 8 * width or CANDIDATES)
        likeliest = _descending(scaled, width)
        reached = np.cumsum(np.exp(scaled[likeliest].astype(np.float64) - largest))
    last, other = np.searchsorted(reached, [goal * (1 - ROUNDING), goal * (1 + ROUNDING)])
    if last != other:  # rounding decides: once more, in float64
        goal = share * float(np.exp(scaled.astype(np.float64) - largest).sum())
        last = np.searchsorted(reached, goal)
    return likeliest[: int(last) + 1]


def _descending(values: LogitRow, n: int) -> Ints:
    """Indices of the n largest, the largest first; of equal values the first first."""
    if n >= len(values):
        candidates = np.arange(len(values))
    else:
        # the n-th largest of the maxima of some groups is reached by at least n values, and by few more
        depth = max(1, min(64, len(values) // (2 * n)))
        width = len(values) // depth
        maxima = values[: depth * width].reshape(depth, width).max(0)
        candidates = np.flatnonzero(values >= np.partition(maxima, width - n)[width - n])
    return candidates[np.argsort(-values[candidates], kind="stable")[:n]]


@_to_infinity
def _measured(row: LogitRow, token: int, draw: Draw) -> Sampled:
    """The token with the raw log-probabilities that the request wants."""
    if (n := draw.params.logprobs) is None:
        return Sampled(token)
    largest = row.max()
    total = float(largest) + float(np.log(np.exp(row - largest).sum(dtype=np.float64)))
    pairs = tuple((int(i), float(row[i]) - total) for i in _descending(row, n)) if n else ()
    return Sampled(token, float(row[token]) - total, pairs)
