"""CAAD: what ten true answers do to answers in similar contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastalm.core.events import Forked
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.processors.base import Visible
from pastalm.engines.processors.caad import CANDIDATES, WINDOW, Caad, Store, bag
from pastalm.errors import RequestError
from tests.engines import test_batching
from tests.engines.test_batching import HashingEngine
from tests.laws.tiny import SIZE

ANNOTATED, TRUE, FALSE = 5, 20, 40
"""A word that only the annotated questions have; what a topic's true and false answer add to its number."""


def question(topic: int, words: list[int]) -> list[int]:
    """Six words of a topic among others."""
    return [*words, *range(60 + 6 * topic, 66 + 6 * topic), 10 + topic]


def model(ids: list[int]) -> Any:
    """Knows the truth, but says it only where the question has a certain word; else a misconception is likelier."""
    row = 0.1 * np.random.default_rng(sorted(ids)).standard_normal(SIZE)
    topic = next((i - 10 for i in ids if 10 <= i < 20), 0)
    row[TRUE + topic], row[FALSE + topic] = (9, 7) if ANNOTATED in ids else (6, 7)
    return row.astype(np.float32)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> HashingEngine:
    monkeypatch.setattr(test_batching, "hashed", model)
    return HashingEngine()


def ten_answers(engine: HashingEngine) -> Store:
    return Store.of([(question(topic, [ANNOTATED, 3]), [TRUE + topic]) for topic in range(10)], engine.score)


def answered(engine: HashingEngine, prompt: list[int], *processors: Any) -> int:
    params = SamplingParams(temperature=0, max_tokens=1, drafts="off", processors=processors)
    engine.add(Request(id="a", prompt_token_ids=tuple(prompt), params=params))
    engine.apply("a", Forked(path=()))
    (sampled,) = engine.step()
    engine.cancel("a")
    return sampled.token


def test_ten_true_answers_make_answers_in_similar_contexts_true(engine: HashingEngine) -> None:
    """What the paper claims, on a model that is made so that it can hold: the truth is there, but not on top."""
    store = ten_answers(engine)
    rng = np.random.default_rng(0)
    others = [(topic, question(topic, rng.integers(200, 250, 4).tolist())) for topic in range(10) for _ in range(4)]
    before = sum(answered(engine, prompt) == TRUE + topic for topic, prompt in others)
    after = sum(answered(engine, prompt, Caad(store)) == TRUE + topic for topic, prompt in others)
    assert before == 0 and after >= 36


def test_other_contexts_are_left_alone(engine: HashingEngine) -> None:
    caad = Caad(ten_answers(engine))
    row = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)
    assert (caad(Visible(range(200, 240)), row.copy()) == row).all()
    assert (caad(Visible(question(3, [4])), row.copy()) != row).any()


def test_neighbours_are_weighted_by_similarity() -> None:
    """Of two contexts the nearer one counts more, by the softmax of both similarities; strength multiplies."""
    contexts = np.eye(4, dtype=np.float32)[:2]
    ids = np.tile(np.arange(CANDIDATES), (2, 1))
    gains = np.zeros((2, CANDIDATES), dtype=np.float32)
    gains[0, 1], gains[1, 2] = 3.0, 3.0
    caad = Caad(
        Store(contexts, ids, gains), embed=lambda ids: np.array([4, 3, 0, 0], dtype=np.float32), strength=2.0, least=0
    )
    added = caad(Visible([1]), np.zeros(SIZE))
    share = 1 / (1 + np.exp((0.6 - 0.8) / 0.1))
    assert added[[1, 2]] == pytest.approx([6 * share, 6 * (1 - share)], rel=1e-5)
    assert np.count_nonzero(added) == 2


def test_a_store_is_a_file(engine: HashingEngine, tmp_path: Path) -> None:
    store = ten_answers(engine)
    store.save(tmp_path / "true.npz")
    row, visible = np.zeros(SIZE, dtype=np.float32), Visible(question(3, [ANNOTATED, 3]))
    by_file = Caad(str(tmp_path / "true.npz"))(visible, row.copy())
    assert (by_file == Caad(store)(visible, row.copy())).all() and by_file.argmax() == TRUE + 3
    np.savez(tmp_path / "other.npz", contexts=store.contexts)
    with pytest.raises(RequestError, match="'caad' does not take these settings: .* it lacks gains, ids"):
        answered(engine, [1, 2], ("caad", {"store": str(tmp_path / "other.npz")}))
    with pytest.raises(RequestError, match="at least one token"):
        Store.of([([1, 2], [])], engine.score)


def test_a_bag_holds_the_last_tokens_only() -> None:
    assert bag([1, 1, 2]).sum() == 3 and bag([1]).max() == 1
    seen: list[int] = []

    def noted(ids: Any) -> Any:
        seen.append(len(ids))
        return bag(ids)

    store = Store(
        np.eye(1, 512, dtype=np.float32), np.zeros((1, 1), dtype=np.int64), np.zeros((1, 1), dtype=np.float32)
    )
    Caad(store, embed=noted)(Visible(range(100)), np.zeros(SIZE))
    assert seen == [WINDOW]
