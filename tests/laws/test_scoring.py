"""Log-probabilities of given tokens are those of one forward pass of plain transformers over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pastalm.core.events import Forked
from pastalm.core.params import Request, SamplingParams
from pastalm.engines import batching
from pastalm.engines.batching import BatchingEngine
from pastalm.engines.native.engine import NativeEngine
from pastalm.engines.native.model import NativeModel
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.models.packed_models import from_model
from tests.laws.tiny import SIZE, tiny_model

LENGTH = 41


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "SCORED", 7)


def given() -> list[int]:
    return torch.randint(0, SIZE, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()


def holds(engine: BatchingEngine, model: Any, tolerance: float) -> None:
    tokens = given()
    with torch.no_grad():
        right = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    scored = engine.score(tokens, 3)
    assert scored is not None and [s.token for s in scored] == tokens[1:]
    for i, each in enumerate(scored):
        assert each.logprob == pytest.approx(right[i, each.token].item(), abs=tolerance)
        likeliest = right[i].topk(3)
        assert [logprob for _, logprob in each.top_logprobs] == pytest.approx(likeliest.values.tolist(), abs=tolerance)
    assert engine.score(tokens[:1], 0) == [] and engine.score(tokens[:2], 0) is not None
    assert not engine.has_unfinished()


def test_transformers_scores_what_a_forward_pass_gives(model: Any) -> None:
    # transformers computes parts of Gemma in float32 whatever the type is
    tolerance = 1e-5 if "gemma" in model.config.model_type else 1e-9
    holds(TransformersEngine(model, max_model_len=LENGTH), model, tolerance)


def test_the_native_engine_scores_what_a_forward_pass_gives() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    holds(NativeEngine(NativeModel(*from_model(model, "F32")), max_model_len=LENGTH, cache_type="F32"), model, 2e-4)


def test_scoring_waits_for_room_and_disturbs_nobody() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    engine = TransformersEngine(model, max_num_seqs=1, max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=8, parallelism=0)

    def first() -> int:
        engine.add(Request(id="a", prompt_token_ids=tuple(given()[:20]), params=params))
        engine.apply("a", Forked(path=()))
        (sampled,) = engine.step()
        return sampled.token

    alone = first()
    assert engine.score(given(), 0) is None
    engine.cancel("a")
    assert engine.score(given(), 0) is not None
    assert first() == alone
