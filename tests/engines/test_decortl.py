"""DecoRTL: a temperature by the class of the last token, and candidates ranked by their embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastalm.core.params import Request, SamplingParams
from pastalm.engines.processors.base import ThreadProcessor, Visible
from pastalm.engines.processors.decortl import DecoRtl
from pastalm.engines.sampling import ArraySampler, Draw
from pastalm.engines.scripted import byte_vocabulary
from pastalm.errors import RequestError
from tests.laws.tiny import SIZE

VOCABULARY = replace(byte_vocabulary(), size=SIZE)
ROW = np.linspace(0, 4, SIZE)


def thread(temperature: float = 1.0, **settings: Any) -> ThreadProcessor:
    params = SamplingParams(temperature=temperature)
    return DecoRtl(**settings).begin(Request(id="a", prompt_token_ids=(1,), params=params, vocabulary=VOCABULARY))


def after(text: str) -> Visible:
    return Visible(text.encode())


@pytest.mark.parametrize(("text", "temperature"), [("a;", 0.9), ("a +", 1.1), ("word", 1.0), ("(", 0.9), ("~", 1.1)])
def test_the_temperature_hangs_on_the_class_of_the_last_token(text: str, temperature: float) -> None:
    """The logits are such that dividing them by the request's temperature gives those at this one."""
    for base in (1.0, 0.5):
        got = thread(base)(after(text), ROW.copy()) / base
        np.testing.assert_allclose(got, ROW / (base + temperature - 1), rtol=1e-12)


def test_structure_is_said_surely_and_the_rest_is_as_diverse_as_before() -> None:
    """What the paper claims: fewer wrong tokens where the syntax leaves one, diversity elsewhere."""
    row = np.zeros(SIZE)
    row[7] = 7.0  # the only valid token after a structural one: 3.6 of 4 draws at temperature 1
    draws = 2000
    rng_keys = np.random.default_rng(0).integers(2**62, size=draws)

    def drawn(text: str, *processors: ThreadProcessor) -> list[int]:
        made = [
            Draw(SamplingParams(temperature=1.0), key=int(key), processors=processors, visible=after(text))
            for key in rng_keys
        ]
        return [s.token for s in ArraySampler(SIZE)([row] * draws, made)]

    def wrong(tokens: list[int]) -> int:
        return sum(token != 7 for token in tokens)

    steered = thread(structural=-0.3, operator=0.3)
    assert wrong(drawn("begin(")) > 2 * wrong(drawn("begin(", steered))
    assert drawn("word", steered) == drawn("word")
    assert len(set(drawn("a +", steered))) > len(set(drawn("a +")))


def test_candidates_that_resemble_the_others_lose() -> None:
    """Of candidates that are nearly as likely the one that lies apart wins; it is no candidate, it gains nothing."""
    embeddings = np.zeros((SIZE, 4))
    embeddings[:, 0] = 1.0
    embeddings[11] = [0, 1, 0, 0]
    row = np.zeros(SIZE)
    row[[10, 11, 12]] = [3.2, 3.1, 3.0]
    ranked = thread(0.0, embeddings=embeddings, candidates=3, penalty=0.5)
    assert int(ranked(after("a"), row.copy()).argmax()) == 11
    assert int(thread(0.0, embeddings=embeddings, candidates=3, penalty=0.05)(after("a"), row.copy()).argmax()) == 10
    row[11] = 1.0
    assert int(ranked(after("a"), row.copy()).argmax()) == 10
    few = thread(1.0, embeddings=embeddings, candidates=1)(after("a"), row.copy())
    np.testing.assert_allclose(few, row)
    mean = (2 * np.array([1, 0, 0, 0]) + np.array([0, 1, 0, 0])) / 3
    row[11] = 3.1
    got = thread(1.0, embeddings=embeddings, candidates=3)(after("a"), row.copy())
    np.testing.assert_allclose(got[[10, 11]] - row[[10, 11]], [0.5 * (1 - mean[0]), 0.5 * (1 - mean[1])])
    assert (np.delete(got, [10, 11, 12]) == 0).all()


def test_embeddings_are_the_models(tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros((3, 4)))
    with pytest.raises(RequestError, match="of 3 tokens, the model has 300"):
        thread(embeddings=str(tmp_path / "few.npy"))
    with pytest.raises(RequestError, match="needs the model's vocabulary"):
        DecoRtl().begin(Request(id="a", prompt_token_ids=(1,), params=SamplingParams()))
    with pytest.raises(ValueError, match="candidates"):
        DecoRtl(candidates=0)
