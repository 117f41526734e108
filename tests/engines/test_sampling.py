"""Every sampler against plain computations over one row, written apart from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pastalm.core.params import SamplingParams
from pastalm.engines import sampling
from pastalm.engines.native import draw as native_draw
from pastalm.engines.native import library
from pastalm.engines.processors.base import Visible
from pastalm.engines.processors.bias import Bias
from pastalm.engines.processors.chain import Function
from pastalm.engines.processors.penalty import RepetitionPenalty
from pastalm.engines.sampling import (
    ArraySampler,
    Draw,
    Sampled,
    Sampler,
    Winners,
    noise_key,
    uniform,
)
from pastalm.engines.transformers import sampling as sampling_torch
from pastalm.engines.transformers.sampling import TensorSampler
from tests.token_sets import all_but, only

Rows = NDArray[Any]
SIZE = 40


class OnDevice:
    """torch's own way, which is for other devices, on the CPU."""

    def __init__(self, size: int) -> None:
        self.inner = TensorSampler(size)

    def __call__(self, logits: Rows, draws: Sequence[Draw]) -> list[Sampled]:
        return self.inner.on_device(torch.from_numpy(np.array(logits)), draws)


class OfTensors(OnDevice):
    """Tensors on the CPU."""

    def __call__(self, logits: Rows, draws: Sequence[Draw]) -> list[Sampled]:
        return self.inner(torch.from_numpy(np.array(logits)), draws)


def array_sampler(size: int) -> ArraySampler:
    return ArraySampler(size, native=False)


needs_library = pytest.mark.skipif(library.load() is None, reason=f"no native library: {library.unavailable()}")
SAMPLERS = [
    pytest.param(array_sampler, id="numpy"),
    pytest.param(ArraySampler, id="native", marks=needs_library),
    pytest.param(OnDevice, id="torch"),
    pytest.param(OfTensors, id="tensors"),
]
every = pytest.mark.parametrize("make", SAMPLERS)


def logits(rows: int, seed: int = 0, size: int = SIZE, dtype: Any = np.float64) -> Rows:
    return (2 * np.random.default_rng(seed).standard_normal((rows, size))).astype(dtype)


# ------------------------------------------------------------------------------ the reference


def noise(key: int, token: int) -> float:
    """Gumbel noise of one id, in Python's integers."""
    bits = (1 << 64) - 1
    x = (key + (token + 1) * 0x9E3779B97F4A7C15) & bits
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
    return -math.log(-math.log((((x ^ (x >> 31)) >> 12) + 0.5) * 2.0**-52))


def kept(scaled: Rows, params: SamplingParams) -> list[int]:
    """The ids that top-k, then top-p, then min-p leave, one after the other and sorted in full."""
    below = scaled.astype(np.float64) - float(scaled.max())
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        total = math.fsum(math.exp(below[i]) for i in order)
        reached, nucleus = 0.0, []
        for i in order:
            if reached >= params.top_p * total:
                break
            nucleus.append(i)
            reached += math.exp(below[i])
        order = nucleus
    least = math.log(params.min_p) if params.min_p else -math.inf
    return [i for i in order if below[i] >= least]


def expected(row: Rows, draw: Draw) -> int:
    """The token of one row, step by step."""
    params, row = draw.params, row.copy()
    kind = row.dtype.type
    for each in draw.processors:
        if isinstance(each, Bias):
            for i, added in zip(each.ids, each.added, strict=True):
                row[i] += kind(added)
        elif isinstance(each, RepetitionPenalty):
            for i in each.ids:
                penalty = kind(each.penalty)
                row[i] = row[i] / penalty if row[i] > 0 else row[i] * penalty
        else:
            row = kind(3) * row[::-1]
    for i in range(len(row)):
        if draw.allowed is not None and i not in draw.allowed:
            row[i] = -np.inf
    with np.errstate(all="ignore"):
        scaled = row / kind(min(params.temperature, np.finfo(kind).max))
    if params.greedy or not np.isfinite(scaled.max()):
        allowed = [i for i in range(len(row)) if draw.allowed is None or i in draw.allowed]
        return max(allowed, key=lambda i: (row[i], -i))
    scores = {i: float(scaled[i]) + noise(draw.key, i) for i in kept(scaled, params)}
    return max(scores, key=lambda i: (scores[i], -i))


TEMPERATURES = [0.0, 0.3, 1.0, 1.0, 2.0, 1e-38, 1e-50, 1e-4, 1e30, 1e300]
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from(TEMPERATURES),
    top_k=st.sampled_from([0, 0, 1, 5, 100]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.7]),
)


def turned(visible: Visible, row: Rows) -> Rows:
    """A processor that returns a new array, whose values do not lie side by side."""
    made: Rows = row[::-1] * row.dtype.type(3)
    return made


chains = st.lists(
    st.sampled_from([Bias({0: 2.5, 7: -3.0}), RepetitionPenalty(1.7, [1, 5, 6]), Function(turned)]), max_size=4
)
allowing = st.sampled_from([None, None, only(3, 9, 30, SIZE + 5), all_but(*range(4, 20)), all_but(3)])


@st.composite
def drawing(draw: st.DrawFn) -> Draw:
    each = draw(params)
    return Draw(
        each,
        key=draw(st.integers(-(2**63), 2**63 - 1)),
        processors=tuple(draw(chains)),
        allowed=draw(allowing),
    )


def odd_rows(rng: np.random.Generator, rows: int, size: int, dtype: Any) -> Rows:
    """Logits of many forms: wide, narrow, rounded so that many are equal, with holes of -inf."""
    made = rng.standard_normal((rows, size)) * rng.choice([0.01, 1, 5, 30], (rows, 1))
    made *= rng.choice([1.0, 1.0, 1.0, 1e-30, 1e30], (rows, 1))
    rounded = rng.random(rows) < 0.3
    made[rounded] = np.round(made[rounded])
    made[rng.random((rows, size)) < rng.choice([0, 0.05, 0.9], (rows, 1))] = -np.inf
    made[np.arange(rows), rng.integers(size, size=rows)] = 0.0
    return made.astype(dtype)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(draws=st.lists(drawing(), min_size=1, max_size=6), seed=st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_every_row_is_as_computed_alone_step_by_step(make: Any, dtype: Any, draws: list[Draw], seed: int) -> None:
    rows = odd_rows(np.random.default_rng(seed), len(draws), SIZE, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled = make(SIZE)(rows, draws)
    assert [s.token for s in sampled] == [expected(r, d) for r, d in zip(rows, draws, strict=True)]


# ------------------------------------------------------------------------------ noise


def test_noise_is_a_hash_of_key_and_id() -> None:
    for key in (0, 1, -1, 2**63 - 1, -(2**63), noise_key(5, 0, (1,), 7)):
        ids = np.array([0, 1, 77, 49151, 2**31])
        want = [noise(key, int(i)) for i in ids]
        np.testing.assert_allclose(sampling.gumbel(key, ids), want, rtol=1e-14)
        theirs = sampling_torch.gumbel(torch.tensor([key]), torch.from_numpy(ids)[None])[0]
        np.testing.assert_allclose(theirs.numpy(), want, rtol=1e-14)
        numbers = uniform(key, np.arange(10_000))
        assert 0 < numbers.min() < 0.01 and 0.99 < numbers.max() < 1


def test_a_key_hangs_on_all_that_it_is_made_of() -> None:
    assert noise_key(1, 2, (3,), 4) == noise_key(1, 2, (3,), 4)
    others = [noise_key(1, 2, (3,), 4), noise_key(1, 2, (3,), 5), noise_key(1, 2, (3, 4), 5)]
    others += [noise_key(1, 1, (), 1), noise_key(1, 1, (1,), 1), noise_key(11, 1, (), 1)]
    assert len(set(others)) == len(others)


def test_no_noise_is_above_the_bound() -> None:
    largest = -math.log(-math.log(1 - 2.0**-53))
    assert largest < sampling.MOST_NOISE < largest + 1e-3


@every
def test_draws_follow_the_distribution(make: Any) -> None:
    row, n = logits(1, 5, size=6)[0], 20_000
    draws = [Draw(SamplingParams(temperature=1.0), key=noise_key(3, 0, (), i)) for i in range(n)]
    tokens = [s.token for s in make(6)(np.tile(row, (n, 1)), draws)]
    got = np.bincount(tokens, minlength=6) / n
    np.testing.assert_allclose(got, np.exp(row) / np.exp(row).sum(), atol=0.015)


# ------------------------------------------------------------------------------ draws from all ids


def exhaustive(row: Rows, temperature: float, key: int) -> int:
    """The winner among all ids, with the noise of every id."""
    with np.errstate(all="ignore"):
        scaled = row / row.dtype.type(min(temperature, np.finfo(row.dtype).max))
    if not np.isfinite(scaled.max()):
        return int(row.argmax())
    return int((scaled + sampling.gumbel(key, np.arange(len(row)))).argmax())


WAYS = ["numpy", *(pytest.param(way, marks=needs_library) for way in ("plain", "avx2", "avx512"))]


@pytest.fixture(params=WAYS)
def winners(request: pytest.FixtureRequest) -> Iterator[Winners]:
    """By NumPy, and by the library with each instruction set that this processor has."""
    chosen, loaded = native_draw.load(), library.load()
    if request.param == "numpy":
        yield sampling.winners
        return
    assert chosen is not None and loaded is not None
    if loaded.pastalm_draw_with(request.param.encode()):
        pytest.skip(f"no {request.param} here")
    yield chosen
    assert any(not loaded.pastalm_draw_with(best) for best in (b"avx512", b"avx2", b"plain"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_looking_at_few_ids_loses_no_winner(winners: Winners, dtype: Any) -> None:
    """Thousands of rows of many forms and lengths; the bound that spares logarithms must never be too low."""
    rng = np.random.default_rng(7)
    temperatures = [1e-300, 1e-38, 1e-3, 0.1, 0.7, 1.0, 1.0, 3.0, 100.0, 1e30, 1e300]
    for size in [1, 2, 63, 64, 65, 127, 200, 256, 257, 1000, 3001] * 6:
        rows = odd_rows(rng, 32, size, dtype)
        heat = rng.choice(temperatures, 32).tolist()
        keys = rng.integers(-(2**63), 2**63 - 1, 32).tolist()
        want = [exhaustive(*each) for each in zip(rows, heat, keys, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert winners(list(rows), heat, keys) == want


def key_of(token: int, x: int) -> int:
    """The key under which the hash of an id has the upper 52 bits x: splitmix64 backwards."""
    bits = (1 << 64) - 1

    def unshifted(y: int, by: int) -> int:
        found = y
        for _ in range(64 // by):
            found = y ^ found >> by
        return found

    y = unshifted(x << 12, 31)
    y = unshifted(y * pow(0x94D049BB133111EB, -1, 1 << 64) & bits, 27)
    y = unshifted(y * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & bits, 30)
    key = (y - (token + 1) * 0x9E3779B97F4A7C15) & bits
    return key - (1 << 64) if key >> 63 else key


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_rarest_noise_wins_from_far_below(winners: Winners, dtype: Any) -> None:
    """Up to the largest noise there is: an id as low as it can still win, and a little lower."""
    for behind in [*range(5), *(1 << i for i in range(3, 52)), *(3 << i for i in range(3, 50))]:
        token = 300 + 7 * behind.bit_length()
        key = key_of(token, (1 << 52) - 1 - behind)
        assert noise(key, token) > 36.7 or behind
        for lift in (2e-5, -2e-5):
            row = np.full(1000, -200.0, dtype=dtype)
            row[3] = 0.0
            row[token] = noise(key, 3) - noise(key, token) + lift
            assert winners([row], [1.0], [key]) == [token if lift > 0 else 3]


@needs_library
def test_rows_that_do_not_lie_in_one_piece() -> None:
    chosen = native_draw.load()
    assert chosen is not None
    rows = list(logits(600, 3, 5).T)
    assert not rows[0].flags.c_contiguous
    keys = list(range(5))
    assert chosen(rows, [1.0] * 5, keys) == sampling.winners(rows, [1.0] * 5, keys)
    with pytest.raises(ValueError, match="rows must have 600"):
        chosen([rows[0], rows[1][:-1]], [1.0] * 2, [0, 1])
    with pytest.raises(ValueError, match="temperatures"):
        chosen(rows[:1], [0.0], [0])


# ------------------------------------------------------------------------------ truncation


@every
def test_many_of_the_most_likely_then_a_share_of_them(make: Any) -> None:
    """top-p is a share of what top-k left, also where that is more than is looked at first, and whoever is beside."""
    size, draws = 4096, 300
    row = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    each = SamplingParams(top_k=1500, top_p=0.3)
    free = SamplingParams(temperature=1.0)
    left = set(kept(row, each))
    for company in ([], [Draw(free)], [Draw(SamplingParams(top_k=3000, top_p=0.99))]):
        many = [Draw(each, key=noise_key(1, 0, (), i)) for i in range(draws)] + company
        tokens = [s.token for s in make(size)(np.tile(row, (len(many), 1)), many)][:draws]
        assert tokens == [expected(row, d) for d in many[:3]] + tokens[3:]
        assert set(tokens) <= left
        scores = [sampling.gumbel(d.key, np.array(sorted(left))) + row[sorted(left)] for d in many[:draws]]
        assert tokens == [sorted(left)[int(s.argmax())] for s in scores]


@every
@pytest.mark.parametrize("candidates", [1, 3, 8])
@given(mixed=st.lists(params, min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_looking_at_few_candidates_first_changes_nothing(
    make: Any, candidates: int, mixed: list[SamplingParams], seed: int
) -> None:
    rows = odd_rows(np.random.default_rng(seed), len(mixed), SIZE, np.float32)
    draws = [Draw(p, key=noise_key(seed, 0, (), i)) for i, p in enumerate(mixed)]
    want = make(SIZE)(rows, draws)
    before = sampling.CANDIDATES, sampling_torch.CANDIDATES, sampling.FIRST
    sampling.CANDIDATES = sampling_torch.CANDIDATES = sampling.FIRST = candidates
    try:
        assert make(SIZE)(rows, draws) == want
    finally:
        sampling.CANDIDATES, sampling_torch.CANDIDATES, sampling.FIRST = before


@every
def test_all_that_is_kept_can_be_drawn(make: Any) -> None:
    each = SamplingParams(temperature=1.5, top_k=4)
    row = logits(1, 9)[0]
    many = [Draw(each, key=noise_key(1, 0, (), i)) for i in range(400)]
    drawn = {s.token for s in make(SIZE)(np.tile(row, (400, 1)), many)}
    assert drawn == set(kept(row / 1.5, each))


def test_where_rounding_in_float32_would_decide_float64_does() -> None:
    """A share that ends right at a candidate: a sum in float32 is off by more than what lies between."""
    rng = np.random.default_rng(0)
    row = (3 * rng.standard_normal(3000)).astype(np.float32)
    below = row.astype(np.float64) - float(row.max())
    order = np.argsort(-below, kind="stable")
    reached = np.cumsum(np.exp(below[order])) / np.exp(below).sum()
    for n in (1, 5, 50, 200, 400):
        for share, count in ((reached[n - 1] - 1e-13, n), (reached[n - 1] + 1e-13, n + 1)):
            left = sampling._truncated(row, SamplingParams(top_p=float(share)))
            assert sorted(left) == sorted(order[:count].tolist())


# ------------------------------------------------------------------------------ the rest


@every
@given(mixed=st.lists(drawing(), min_size=2, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_row_samples_the_same_alone_and_in_a_batch(make: Any, mixed: list[Draw], seed: int) -> None:
    rows = logits(len(mixed), seed)
    together = make(SIZE)(rows, mixed)
    assert together == [make(SIZE)(rows[i : i + 1], mixed[i : i + 1])[0] for i in range(len(mixed))]


@every
def test_temperature_zero_takes_the_largest(make: Any) -> None:
    rows = logits(3)
    sampled = make(SIZE)(rows, [Draw(SamplingParams(temperature=0))] * 3)
    assert [s.token for s in sampled] == rows.argmax(-1).tolist()


@every
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_allowed_is_never_left(make: Any, temperature: float) -> None:
    row = logits(1)[0]
    some = SamplingParams(temperature=temperature)
    best = int(row.argmax())
    sets = [only(3, 9, SIZE + 5), all_but(best), None]
    draws = [Draw(some, key=i, allowed=sets[i % 3]) for i in range(300)]
    for i, sampled in enumerate(make(SIZE)(np.tile(row, (300, 1)), draws)):
        allowed = sets[i % 3]
        assert allowed is None or sampled.token in allowed


@every
def test_a_row_that_is_allowed_nothing_is_lost(make: Any) -> None:
    for nothing in (only(), only(SIZE), all_but(*range(SIZE))):
        (sampled,) = make(SIZE)(logits(1), [Draw(SamplingParams(), allowed=nothing)])
        assert sampled.lost == "a thread is allowed no token of the vocabulary"


@pytest.mark.parametrize("make", [array_sampler, OnDevice])
def test_sets_kept_are_bounded(make: Any) -> None:
    sampler = make(200)
    for i in range(3 * sampling.MASKS):
        draw = Draw(SamplingParams(temperature=0), allowed=only(i))
        assert sampler(logits(1, size=200), [draw])[0].token == i
    held = sampler._sets if isinstance(sampler, ArraySampler) else sampler.inner._masks
    assert len(held) <= sampling.MASKS


@pytest.mark.parametrize("make", [ArraySampler, TensorSampler])
def test_rows_that_lie_apart_are_sampled_together(make: Any) -> None:
    sampler: Sampler = make(SIZE)
    rows = logits(4)
    apart: list[Any] = list(rows) if make is ArraySampler else list(torch.from_numpy(rows))
    draws = [Draw(SamplingParams(temperature=t), key=i) for i, t in enumerate((0.0, 1.0, 0.5, 0.0))]
    assert sampler(sampler.stack(apart), draws) == ArraySampler(SIZE)(rows, draws)
    copied = sampler.copy(apart[0])
    rows[0] = 0
    assert float(copied[1]) == float(logits(4)[0, 1])


def greedy(make: Any, row: Sequence[float], **fields: Any) -> int:
    """The greedy token, with a row that asks for nothing beside it."""
    draws = [
        Draw(SamplingParams(temperature=0)),
        Draw(SamplingParams(temperature=0), **fields),
    ]
    rows = np.array([row, row])
    plain, sampled = make(len(row))(rows, draws)
    assert plain.token == int(rows[0].argmax()) and rows[0].tolist() == rows[1].tolist() == list(row)
    token: int = sampled.token
    return token


@every
def test_logit_bias_is_added(make: Any) -> None:
    row = [1.0, 2.0, 3.0, 0.0]
    assert greedy(make, row, processors=(Bias({0: 2.1}),)) == 0
    assert greedy(make, row, processors=(Bias({0: 1.9}),)) == 2
    assert greedy(make, row, processors=(Bias({2: -5.0, 1: -5.0}),)) == 0


@every
def test_repetition_penalty_shrinks_what_was_seen(make: Any) -> None:
    row = [3.0, 2.0, -1.0, -1.5]
    assert greedy(make, row, processors=(RepetitionPenalty(1.4, [0]),)) == 0
    assert greedy(make, row, processors=(RepetitionPenalty(1.6, [0]),)) == 1
    assert greedy(make, [-1.0, -1.5], processors=(RepetitionPenalty(1.6, [0]),)) == 1


@every
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_logprobs_are_raw(make: Any, dtype: Any) -> None:
    rows = logits(3, dtype=dtype)
    hot = SamplingParams(temperature=0.5, top_k=3, logprobs=4)
    chain = (Bias({1: 9.0}), RepetitionPenalty(2.0, [2]), Function(turned))
    few = SamplingParams(temperature=0, logprobs=0)
    draws = [
        Draw(hot, key=5, processors=chain, allowed=all_but(0)),
        Draw(SamplingParams(temperature=0)),
        Draw(few),
    ]
    first, second, third = make(SIZE)(rows, draws)
    exact = rows.astype(np.float64)
    want = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    assert first.logprob == pytest.approx(want[0, first.token], abs=1e-6)
    top = np.argsort(-want[0])[:4]
    assert [i for i, _ in first.top_logprobs] == top.tolist()
    assert [v for _, v in first.top_logprobs] == pytest.approx(want[0, top].tolist(), abs=1e-6)
    assert second.logprob is None and second.top_logprobs == ()
    assert third.logprob == pytest.approx(want[2].max(), abs=1e-6)
    assert third.top_logprobs == ()


def test_half_precision_becomes_float32_first() -> None:
    rows = torch.from_numpy(logits(2)).bfloat16()
    draws = [Draw(SamplingParams(temperature=1.0, logprobs=2), key=i) for i in range(2)]
    assert TensorSampler(SIZE)(rows, draws) == ArraySampler(SIZE)(rows.float().numpy(), draws)
