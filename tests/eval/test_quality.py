"""Scores: likelihoods are the model's own, penalties rise with what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pastalm import models
from pastalm.errors import RequestError
from pastalm.eval.quality import (
    Candidate,
    PmiScorer,
    log_likelihoods,
    penalty,
    repetition,
    sameness,
    win_probabilities,
)
from tests.laws.tiny import tiny_model


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_likelihoods_are_those_of_each_row_alone(name: str, batch_tokens: int) -> None:
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(0)
    rows = [
        tuple(torch.randint(3, 250, (n,), generator=generator).tolist() for n in sizes)
        for sizes in ((5, 9), (3, 1), (8, 0), (2, 17), (5, 9))
    ]
    sums = log_likelihoods(model, rows, batch_tokens=batch_tokens)
    for (prompt, answer), total in zip(rows, sums, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        own = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        # Gemma 2's own attention computes its softmax in float32
        assert math.isclose(total, own, rel_tol=1e-9 if name == "llama" else 1e-6, abs_tol=1e-9)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20))
def test_win_probabilities_rise_with_the_score_and_are_even_for_equals(scores: list[float]) -> None:
    won = win_probabilities(scores, [0.0] * len(scores), sigma=7.0)
    for (a, p), (b, q) in zip(
        zip(scores, won, strict=True), list(zip(scores, won, strict=True))[1:], strict=False
    ):
        assert (p <= q) if a <= b else (p >= q)
    assert win_probabilities(scores, scores) == [0.5] * len(scores)
    with pytest.raises(RequestError, match="cannot be held against"):
        win_probabilities(scores, [])


def test_penalties_are_for_repetition_for_likeness_and_for_length() -> None:
    plain = Candidate(
        "p", "one two three four five six seven eight", ("a b c d e", "f g h i j"), "x" * 39
    )
    assert penalty(plain) == 0
    assert (
        repetition("say it once more " * 9)
        > 0.8
        > 0
        == repetition("each word here comes only once")
    )
    assert sameness(["a b c d e", "a b c d e", "v w x y z"]) == 1
    assert sameness(["a b c d e f", "a b c d x y"]) == pytest.approx(1 / 5)
    costs = [penalty(Candidate("p", "x" * n, (), "x" * 100)) for n in (400, 200, 100, 50, 25)]
    assert costs[0] > costs[1] >= costs[2] == 0 and costs[4] > costs[3] >= 0


def test_an_answer_belongs_to_its_own_prompt_more_than_to_anothers() -> None:
    scorer = PmiScorer(models.load(adapter=None, dtype="float32"))
    pairs = [
        (
            "How do I keep bees?",
            "Bees need a hive, flowers near by and a keeper who checks the combs.",
        ),
        (
            "What is a prime number?",
            "A prime number has no divisors but 1 and itself, like 7 or 13.",
        ),
        (
            "Name a way to sleep better.",
            "Go to bed at the same hour and keep the bedroom dark and cool.",
        ),
    ]
    crossed = [(p, answer) for p, _ in pairs for _, answer in pairs]
    found = scorer.information(crossed)
    for i in range(3):
        row = found[3 * i : 3 * i + 3]
        assert max(range(3), key=lambda j: row[j]) == i
    assert scorer.score([Candidate("p", "")]) == [0.0]
