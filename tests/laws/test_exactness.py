"""Law 1: every decoded token's logits equal one masked forward pass over the linear form, in float64.

The engine is driven by events alone, by random scripts; who sees whom comes from the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pastalm.core.events import Decoded, Forked, Path
from pastalm.core.layout import Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.base import Schedule
from pastalm.engines.transformers.engine import TransformersEngine
from tests.laws.oracle import Fork, Linear
from tests.laws.reference import EXACT, reference_logits
from tests.laws.script import Script, play, random_scripts
from tests.laws.tiny import tiny_model

EXACTLY = 1e-9
POLICIES: tuple[Policy, ...] = ("promised", "overlap")


def error(model: PreTrainedModel, script: Script, *, hiding: bool = True) -> float:
    """Largest difference between the engine's logits and the reference's over a response."""
    linear = Linear(script.prompt, script.record, script.policy)
    n = len(linear.entries)
    visible = linear.visible if hiding else np.tril(np.ones((n, n), dtype=np.bool_))
    want = reference_logits(model, linear.tokens, linear.positions, visible)
    assert len(script.logits) > 10
    return max(
        float((logits.cpu() - want[linear.place[path, index]]).abs().max())
        for (path, index), logits in script.logits.items()
    )


def worst(engine: TransformersEngine, model: PreTrainedModel, *, overlapping: int) -> float:
    """Largest error over three `promised` responses and some `overlap` ones, decoded together."""
    scripts = random_scripts(11, "promised", 3) + random_scripts(12, "overlap", overlapping)
    for i, script in enumerate(scripts):
        script.id = str(i)
    play(engine, scripts)
    return max(error(model, script) for script in scripts)


def uneven(seed: int) -> Schedule:
    """Any threads at each step, sometimes none."""
    rng = random.Random(seed)

    def choose(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
        return [thread for thread in live if rng.random() < 0.4]

    return choose


def last_alone(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
    """One thread at a time, the deepest of the last request."""
    return live[-1:]


def first_alone(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
    """One thread at a time: main threads run ahead of their children."""
    return live[:1]


SCHEDULES: dict[str, Callable[[], Schedule | None]] = {
    "all": lambda: None,
    "uneven": lambda: uneven(3),
    "first": lambda: first_alone,
    "last": lambda: last_alone,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("graphs", [False, True], ids=["", "fixed shapes"])
def test_one_response(model: PreTrainedModel, policy: Policy, schedule: str, graphs: bool) -> None:
    chosen = SCHEDULES[schedule]()
    for seed in (1, 2, 3):
        engine = TransformersEngine(
            model, max_num_seqs=1, max_model_len=256, schedule=chosen, prefill_chunk=11, graphs=graphs
        )
        (script,) = random_scripts(seed, policy, 1)
        play(engine, [script])
        assert error(model, script) < EXACTLY


@pytest.mark.parametrize("schedule", ["all", "uneven"])
@pytest.mark.parametrize("call", [0, 30, 10**6], ids=["rows apart", "some", "one call"])
def test_many_responses(model: PreTrainedModel, schedule: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pastalm.engines.transformers.masks.CALL_COST", call)
    chosen = SCHEDULES[schedule]()
    engine = TransformersEngine(model, max_num_seqs=3, max_model_len=256, schedule=chosen, prefill_budget=3)
    assert worst(engine, model, overlapping=2) < EXACTLY


@pytest.mark.parametrize("schedule", ["all", "uneven"])
def test_many_responses_in_fixed_shapes(model: PreTrainedModel, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs are fed, on any device: rows that are full, short or empty, and steps too large for a shape."""
    monkeypatch.setattr("pastalm.engines.transformers.cuda_graphs.MIN_WIDTH", 32)
    engine = TransformersEngine(model, max_num_seqs=4, max_model_len=256, schedule=SCHEDULES[schedule](), graphs=True)
    assert worst(engine, model, overlapping=3) < EXACTLY
    assert engine._graphs is not None and len(engine._graphs) > 2


def test_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for up to 4 threads and one for up to 16, whichever row of the pool a response is in."""
    kept = {"freezing": True}  # the kernels are chosen without trying all: the test is shorter
    monkeypatch.setattr("pastalm.engines.transformers.compiled.FREEZING", kept)
    model = tiny_model("qwen2-sliding", layers=2)
    engine = TransformersEngine(model, max_num_seqs=2, max_model_len=256, compiled=True)
    made = engine._compiled
    assert made is not None
    sizes: list[int] = []

    def counted(**inputs: object) -> object:
        sizes.append(inputs["input_ids"].shape[1])  # type: ignore[attr-defined]
        return made(**inputs)

    monkeypatch.setattr(engine, "_compiled", counted)
    torch._dynamo.utils.counters.clear()
    scripts = [random_scripts(seed, "promised", 1)[0] for seed in (1, 2, 3, 4)]
    for turn, script in enumerate(scripts):
        engine._free = {turn % 2}
        play(engine, [script])
        assert error(model, script) < 1e-4  # norms are in float32, rounded in another order
    assert set(sizes) == {4, 16}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_without_hiding_it_would_differ(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, max_model_len=256)
    (script,) = random_scripts(1, "overlap", 1)
    play(engine, [script])
    forks = [item for items in script.record.threads.values() for item in items]
    assert any(isinstance(item, Fork) for item in forks)
    assert error(model, script, hiding=False) > 1e-3


def test_sequential_greedy_is_generate(model: PreTrainedModel) -> None:
    prompt = tuple(random.Random(4).randrange(256) for _ in range(20))
    model.set_attn_implementation(EXACT)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    engine = TransformersEngine(model, max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=40)
    engine.add(Request(id="a", prompt_token_ids=prompt, params=params))
    engine.apply("a", Forked(path=()))
    tokens = []
    for _ in range(40):
        (sampled,) = engine.step()
        tokens.append(sampled.token)
        engine.apply("a", Decoded(path=(), token=sampled.token))
    assert tokens == out[0, len(prompt) :].tolist()
