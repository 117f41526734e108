"""The batched sampler against plain computations over one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pastalm.engine import SamplingParams
from pastalm.engines import sampling
from pastalm.engines.sampling import Bias, Draw, noise_key
from pastalm.engines.sampling_torch import TensorSampler as Sampler
from pastalm.engines.sampling_torch import _truncated, gumbel
from pastalm.errors import EngineError
from pastalm.events import TokenSet

SIZE = 40


def logits(rows: int, seed: int = 0, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, size, dtype=torch.float64, generator=generator)


def kept(row: Tensor, params: SamplingParams) -> set[int]:
    """The ids that top-k, then top-p, then min-p leave, one after the other and sorted in full."""
    probabilities = (row / params.temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(float(probabilities[i]) for i in order)
    if params.top_p < 1:
        reached, nucleus = 0.0, []
        for i in order:
            if reached >= params.top_p:
                break
            nucleus.append(i)
            reached += float(probabilities[i]) / total
        order = nucleus
    best = float(probabilities.max())
    return {i for i in order if float(probabilities[i]) >= params.min_p * best}


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 100]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.7]),
)


def drawn_ids(row: Tensor, each: SamplingParams, draws: int = 400) -> set[int]:
    """Every id that ever comes out of many draws from one row."""
    many = [Draw(each, key=noise_key(1, 0, (), i)) for i in range(draws)]
    return {s.token for s in Sampler(len(row))(row.expand(draws, -1), many)}


@given(each=params, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_truncation_leaves_what_it_should(each: SamplingParams, seed: int) -> None:
    row = logits(1, seed)[0]
    values, ids = _truncated(row[None] / each.temperature, [Draw(each)])
    left = {int(i) for i, v in zip(ids[0], values[0], strict=True) if v > -torch.inf}
    assert left == kept(row, each)


@pytest.mark.parametrize("candidates", [1, 3, 8])
@given(mixed=st.lists(params, min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_looking_at_few_candidates_first_changes_nothing(
    candidates: int, mixed: list[SamplingParams], seed: int
) -> None:
    rows = logits(len(mixed), seed)
    draws = [Draw(p, key=noise_key(seed, 0, (), i)) for i, p in enumerate(mixed)]
    want = Sampler(SIZE)(rows, draws)
    before = sampling.CANDIDATES
    sampling.CANDIDATES = candidates
    try:
        assert Sampler(SIZE)(rows, draws) == want
    finally:
        sampling.CANDIDATES = before


@given(mixed=st.lists(params, min_size=2, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_row_samples_the_same_alone_and_in_a_batch(
    mixed: list[SamplingParams], seed: int
) -> None:
    rows = logits(len(mixed), seed)
    draws = [Draw(p, key=noise_key(seed, 0, (i,), 3)) for i, p in enumerate(mixed)]
    draws[0] = Draw(SamplingParams(temperature=0))
    together = Sampler(SIZE)(rows, draws)
    alone = [Sampler(SIZE)(rows[i : i + 1], draws[i : i + 1])[0] for i in range(len(draws))]
    assert together == alone


def test_draws_follow_the_distribution() -> None:
    row, n = logits(1, 5, size=6)[0], 20_000
    draws = [Draw(SamplingParams(temperature=1.0), key=noise_key(3, 0, (), i)) for i in range(n)]
    tokens = [s.token for s in Sampler(6)(row.expand(n, -1), draws)]
    got = np.bincount(tokens, minlength=6) / n
    np.testing.assert_allclose(got, row.softmax(-1).numpy(), atol=0.015)


def test_noise_is_independent_of_neighbours_and_differs_by_key_and_id() -> None:
    keys = torch.tensor([noise_key(0, c, p, i) for c in (0, 1) for p in ((), (0,)) for i in (0, 1)])
    noise = gumbel(keys, torch.arange(50)[None])
    assert len(set(noise.flatten().tolist())) == noise.numel()
    assert torch.equal(gumbel(keys[3:4], torch.tensor([[7]]))[0, 0], noise[3, 7])
    assert bool(noise.isfinite().all())
    assert noise_key(1, 2, (3,), 4) == noise_key(1, 2, (3,), 4)
    assert len({noise_key(1, 1, (), 1), noise_key(1, 1, (1,), 1), noise_key(11, 1, (), 1)}) == 3


def test_temperature_zero_takes_the_largest() -> None:
    rows = logits(3)
    sampled = Sampler(SIZE)(rows, [Draw(SamplingParams(temperature=0))] * 3)
    assert [s.token for s in sampled] == rows.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_allowed_is_never_left(temperature: float) -> None:
    row = logits(1)[0]
    some = SamplingParams(temperature=temperature)
    best = int(row.argmax())
    sets = [TokenSet.of(3, 9, SIZE + 5), TokenSet.all_but(best), None]
    draws = [Draw(some, key=i, allowed=sets[i % 3]) for i in range(300)]
    for i, sampled in enumerate(Sampler(SIZE)(row.expand(300, -1), draws)):
        allowed = sets[i % 3]
        assert allowed is None or sampled.token in allowed
    assert Sampler(SIZE)(row[None], [Draw(SamplingParams(temperature=0))])[0].token == best


def test_nothing_allowed_is_an_error() -> None:
    for nothing in (TokenSet.of(), TokenSet.of(SIZE), TokenSet.all_but(*range(SIZE))):
        with pytest.raises(EngineError):
            Sampler(SIZE)(logits(1), [Draw(SamplingParams(), allowed=nothing)])


def test_masks_kept_are_bounded() -> None:
    sampler = Sampler(200)
    for i in range(3 * sampling.MASKS):
        draw = Draw(SamplingParams(temperature=0), allowed=TokenSet.of(i))
        assert sampler(logits(1, size=200), [draw])[0].token == i
    assert len(sampler._arrays._sets) <= sampling.MASKS


def greedy(row: Tensor, **how: Any) -> int:
    """The greedy token, with a row that asks for nothing beside it."""
    fields = {k: how.pop(k) for k in ("bias", "seen") if k in how}
    draws = [
        Draw(SamplingParams(temperature=0)),
        Draw(SamplingParams(temperature=0, **how), **fields),
    ]
    plain, sampled = Sampler(len(row))(torch.stack([row, row]), draws)
    assert plain.token == int(row.argmax())
    return sampled.token


def test_logit_bias_is_added() -> None:
    row = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    assert greedy(row, bias=Bias.of({0: 2.1})) == 0
    assert greedy(row, bias=Bias.of({0: 1.9})) == 2
    assert greedy(row, bias=Bias.of({2: -5.0, 1: -5.0})) == 0


def test_repetition_penalty_shrinks_what_was_seen() -> None:
    row = torch.tensor([3.0, 2.0, -1.0, -1.5], dtype=torch.float64)
    assert greedy(row, repetition_penalty=1.4, seen=np.array([0])) == 0
    assert greedy(row, repetition_penalty=1.6, seen=np.array([0])) == 1
    negative = torch.tensor([-1.0, -1.5], dtype=torch.float64)
    assert greedy(negative, repetition_penalty=1.6, seen=np.array([0])) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logprobs_are_raw(dtype: torch.dtype) -> None:
    rows = logits(3).to(dtype)
    hot = SamplingParams(temperature=0.5, top_k=3, logprobs=4, repetition_penalty=2.0)
    few = SamplingParams(temperature=0, logprobs=0)
    draws = [
        Draw(hot, key=5, bias=Bias.of({1: 9.0}), allowed=TokenSet.all_but(0), seen=np.array([2])),
        Draw(SamplingParams(temperature=0)),
        Draw(few),
    ]
    first, second, third = Sampler(SIZE)(rows, draws)
    want = rows.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
    assert first.logprob == pytest.approx(float(want[0, first.token]), abs=1e-6)
    top = want[0].topk(4)
    assert [i for i, _ in first.top_logprobs] == top.indices.tolist()
    assert [v for _, v in first.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-6)
    assert second.logprob is None and second.top_logprobs == ()
    assert third.logprob == pytest.approx(float(want[2].max()), abs=1e-6)
    assert third.top_logprobs == ()


def test_all_that_is_kept_can_be_drawn() -> None:
    each = SamplingParams(temperature=1.5, top_k=4)
    row = logits(1, 9)[0]
    assert drawn_ids(row, each) == kept(row, each)
