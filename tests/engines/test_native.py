"""The native engine: exact by replay on tiny random models of every family it claims, and its pool of slots."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pastalm.core.events import Decoded, Finished, Forked
from pastalm.core.layout import Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.native import library
from pastalm.engines.native.engine import NativeEngine
from pastalm.engines.native.model import NativeModel
from pastalm.engines.native.weights import Matrix, WeightType, pack, unpack
from pastalm.errors import CapabilityError, EngineError, RequestError
from pastalm.eval.replay import load_unpacked
from pastalm.models import packed_models
from tests.laws.replayed import error, errors
from tests.laws.script import play, random_scripts
from tests.laws.test_exactness import SCHEDULES
from tests.laws.tiny import ARCHITECTURES, MORE_ARCHITECTURES, tiny_model

pytestmark = pytest.mark.skipif(bool(library.unavailable()), reason=library.unavailable())

CLOSE = 1e-4
"""In standard deviations of the logits; weights, keys and values are in float32."""
POLICIES: tuple[Policy, ...] = ("promised", "overlap")


@cache
def reference(name: str) -> PreTrainedModel:
    return tiny_model(name, dtype=torch.float32)


@cache
def packed(name: str, kind: WeightType = "F32") -> NativeModel:
    return NativeModel(*packed_models.from_model(reference(name), kind), threads=2)


@pytest.fixture
def engine() -> Iterator[Callable[..., NativeEngine]]:
    made: list[NativeEngine] = []

    def make(name: str = "llama", kind: WeightType = "F32", **options: object) -> NativeEngine:
        settings = {"max_num_seqs": 2, "max_model_len": 512, "cache_type": "F32"} | options
        made.append(NativeEngine(packed(name, kind), **settings))
        return made[-1]

    yield make
    for one in made:
        one._pool.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ARCHITECTURES + MORE_ARCHITECTURES)
def test_every_token_is_as_one_masked_forward_pass_says(
    name: str, policy: Policy, engine: Callable[..., NativeEngine]
) -> None:
    for seed in (1, 2, 3):
        (script,) = random_scripts(seed, policy, 1)
        play(engine(name, prefill_chunk=11), [script])
        assert error(reference(name), script) < CLOSE


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_many_requests_under_every_schedule(name: str, schedule: str, engine: Callable[..., NativeEngine]) -> None:
    scripts = random_scripts(5, "promised", 4) + random_scripts(6, "overlap", 2)
    for i, script in enumerate(scripts):
        script.id = str(i)
    running = engine(name, max_num_seqs=3, max_model_len=256, prefill_budget=3, schedule=SCHEDULES[schedule]())
    play(running, scripts)
    assert max(error(reference(name), script) for script in scripts) < CLOSE


def test_the_comparison_sees_threads_that_are_not_hidden(engine: Callable[..., NativeEngine]) -> None:
    (script,) = random_scripts(2, "overlap", 1)
    play(engine(), [script])
    assert error(reference("llama"), script, hiding=False) > 10 * CLOSE


PARTS = {
    "head": ("lm_head",),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "attention_out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The parts of a packed model, and what transformers calls their modules."""


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "neon", "plain"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    found = library.library()
    before = found.pastalm_kernels()
    if found.pastalm_use_kernels(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield
    assert not found.pastalm_use_kernels(before)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_kernels_compute_what_the_weights_stand_for(kind: WeightType, part: str, kernels: None) -> None:
    """One part of the model packed as `kind`, against transformers with those weights unpacked and the activations
    that it takes rounded to bytes where the engine does so. An activation that lies between two bytes may become
    either, and what follows is then a little different; all parts at once would make that often."""
    architecture, tensors = packed_models.from_model(reference("qwen2"), "F32")
    for name, held in tensors.items():
        if isinstance(held, Matrix) and name.rpartition(".")[2] in (part, "embedding" if part == "head" else part):
            tensors[name] = pack(unpack(held), kind)
    made = NativeModel(architecture, tensors, threads=2)
    (script,) = random_scripts(1, "promised", 1)
    engine = NativeEngine(made, max_model_len=512, cache_type="F32")
    play(engine, [script])
    model = tiny_model("qwen2", dtype=torch.float32)
    load_unpacked(model, made.tensors)
    if kind.startswith("Q"):
        assert error(model, script) > 10 * CLOSE, "rounding shows"
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in PARTS[part]:
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        assert float(np.median(errors(model, script))) < CLOSE
        assert error(model, script) < 0.05
    else:
        assert error(model, script) < CLOSE
    engine.close()


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as bytes stand for them, in groups of 32."""
    groups = x.unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    return ((groups * (127 / most)).round() * (most / 127)).nan_to_num().flatten(-2)


def test_a_cache_in_bfloat16_is_near(engine: Callable[..., NativeEngine], kernels: None) -> None:
    """The largest difference of any logit of a response; of five responses that in the middle."""
    differences = []
    for seed in range(3, 8):
        (script,) = random_scripts(seed, "promised", 1)
        play(engine(cache_type="BF16"), [script])
        differences.append(error(reference("llama"), script))
    assert CLOSE < sorted(differences)[2] < 0.1


# ------------------------------------------------------------------------------ requests, prompts and the pool

PARAMS = SamplingParams(temperature=0, max_tokens=24, drafts="off")
RANDOM = random.Random(7)
PROMPT = tuple(RANDOM.randrange(256) for _ in range(70))


def answer(engine: NativeEngine, prompt: tuple[int, ...], name: str = "a", count: int = 20) -> list[int]:
    """Greedy tokens of the main thread."""
    engine.add(Request(id=name, prompt_token_ids=prompt, params=PARAMS))
    engine.apply(name, Forked(path=()))
    tokens: list[int] = []
    while len(tokens) < count:
        for sampled in engine.step():
            tokens.append(sampled.token)
            engine.apply(name, Decoded(path=(), token=sampled.token))
    engine.apply(name, Finished(path=()))
    return tokens


def test_greedy_tokens_are_generates(engine: Callable[..., NativeEngine]) -> None:
    model = reference("llama")
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert answer(engine(), PROMPT) == out[0, len(PROMPT) :].tolist()


def test_a_remembered_prompt_is_not_read_again(
    engine: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(max_num_seqs=3)
    first = answer(running, PROMPT)
    fed: list[int] = []
    step = running._pool.step

    def counted(ids: np.ndarray, *rest: object) -> np.ndarray:
        fed.append(len(ids))
        return step(ids, *rest)

    monkeypatch.setattr(running._pool, "step", counted)
    assert answer(running, PROMPT) == first
    assert max(fed) == 1, "the same prompt, in the range that holds it"
    longer = (*PROMPT, 5, 6, 7)
    running.add(Request(id="busy", prompt_token_ids=PROMPT, params=PARAMS))
    running.apply("busy", Forked(path=()))
    (sampled,) = running.step()
    running.apply("busy", Decoded(path=(), token=sampled.token))
    fed.clear()
    running.add(Request(id="b", prompt_token_ids=longer, params=PARAMS))
    running.apply("b", Forked(path=()))
    ((_, _), (_, copied)) = sorted((s.request_id, s.token) for s in running.step())[::-1]
    assert max(fed) == 3, "what it shares with one that runs is copied"
    running.cancel("busy")
    running.cancel("b")
    running.forget()
    fed.clear()
    assert answer(running, longer, "c", 1) == [copied]
    assert max(fed) == len(longer)


def test_a_full_pool_waits_and_a_cancelled_request_leaves_at_once(engine: Callable[..., NativeEngine]) -> None:
    running = engine(max_num_seqs=1)
    alone = answer(running, PROMPT)
    running.forget()
    for name in ("a", "b"):
        running.add(Request(id=name, prompt_token_ids=PROMPT, params=PARAMS))
        running.apply(name, Forked(path=()))
    assert {s.request_id for s in running.step()} == {"a"}
    running.apply("a", Decoded(path=(), token=alone[0]))
    assert {s.request_id for s in running.step()} == {"a"}
    running.cancel("a")
    assert [s.request_id for s in running.step()] == ["b"]
    running.cancel("b")
    assert not running.has_unfinished()
    assert answer(running, PROMPT) == alone


@pytest.mark.parametrize("seed", range(6))
def test_a_request_may_be_cancelled_in_every_state(seed: int, engine: Callable[..., NativeEngine]) -> None:
    """While it waits, is read, decodes, has forked, is blocked: the others, and those that come into its place, are
    exact."""
    rng = random.Random(seed)
    running = engine(max_num_seqs=2, max_model_len=256, prefill_budget=3)
    scripts = random_scripts(seed, "promised", 3) + random_scripts(seed + 100, "overlap", 3)
    for i, script in enumerate(scripts):
        script.id = str(i)
    states = play(running, scripts, drop=lambda script: script.id in "024" and rng.random() < 0.1).dropped
    assert states and not running.has_unfinished() and running._free == {0, 1}
    kept = [script for script in scripts if script.id not in states]
    assert max(error(reference("llama"), script) for script in kept) < CLOSE


def test_a_closed_engine_says_so(engine: Callable[..., NativeEngine]) -> None:
    running = engine()
    running.add(Request(id="a", prompt_token_ids=PROMPT, params=PARAMS))
    running.apply("a", Forked(path=()))
    running._pool.close()
    with pytest.raises(EngineError, match="closed"):
        running.step()


def test_what_cannot_be_is_one_line(engine: Callable[..., NativeEngine]) -> None:
    running = engine(max_model_len=64)
    with pytest.raises(RequestError, match="max_model_len"):
        running.add(Request(id="a", prompt_token_ids=(1,) * 50, params=PARAMS))
    with pytest.raises(RequestError, match="vocabulary"):
        running.add(Request(id="a", prompt_token_ids=(300,), params=PARAMS))
    with pytest.raises(RequestError, match="empty"):
        running.add(Request(id="a", prompt_token_ids=(), params=PARAMS))
    with pytest.raises(CapabilityError, match="positions"):
        running.add(Request(id="a", prompt_token_ids=(1,), params=PARAMS, positions="serial"))
    with pytest.raises(CapabilityError, match="cache_type"):
        engine(cache_type="Q8_0")


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_a_row_is_the_same_to_the_last_bit_whatever_other_rows_a_pass_has(
    kind: WeightType, kernels: None, engine: Callable[..., NativeEngine]
) -> None:
    """So neither drafts nor other requests change what is rounded."""
    running = engine(kind=kind, max_model_len=512, cache_type="F32" if kind == "F32" else "BF16")
    tokens = np.random.default_rng(3).integers(1, running._size, 400 + 40).tolist()

    def logits(rows: int) -> np.ndarray:
        params = SamplingParams(temperature=0, max_tokens=50, drafts="off")
        running.add(Request(id="one", prompt_token_ids=tuple(tokens[:400]), params=params))
        running.apply("one", Forked(path=()))
        while not running.step():
            pass
        state = running._running["one"]
        running.apply("one", Decoded(path=(), token=tokens[400], forced=tuple(tokens[401:])))
        due = state.pending
        parts = [due[i : i + rows] for i in range(0, len(due), rows)]
        out = [running._forward([(state, part)], list(range(len(part)))).copy() for part in parts]
        running.cancel("one")
        return np.concatenate(out)

    alone = logits(1)
    for rows in (2, 3, 5, 8, 13, 40):
        assert np.array_equal(logits(rows), alone), rows


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_a_prompt_gives_the_same_to_the_last_bit_however_it_is_read(
    kind: WeightType, kernels: None, engine: Callable[..., NativeEngine]
) -> None:
    """In passes of any length, behind any part of it that is remembered, with its last tokens as given ones; alone or
    with another that is read at the same time."""
    chance = np.random.default_rng(4)
    tokens = tuple(chance.integers(1, 256, 150).tolist())

    def logits(running: NativeEngine, given: int, *others: tuple[int, ...]) -> list[np.ndarray]:
        rows: list[np.ndarray] = []
        running.on_logits = lambda name, path, row: rows.append(row.copy()) if name == "a" else None
        prompts = {"a": tokens[: len(tokens) - given]} | dict(zip("bc", others, strict=False))
        for name, prompt in prompts.items():
            running.add(Request(id=name, prompt_token_ids=prompt, params=PARAMS))
            running.apply(name, Forked(path=(), forced=tokens[len(prompt) :] if name == "a" else ()))
        while len(rows) < 4:
            for sampled in running.step():
                running.apply(sampled.request_id, Decoded(path=(), token=sampled.token))
        for name in prompts:
            running.cancel(name)
        return rows

    cache_type = "F32" if kind == "F32" else "BF16"
    alone = logits(engine(kind=kind, cache_type=cache_type), 0)
    for chunk in (1, 7, 40, 512):
        running = engine(kind=kind, cache_type=cache_type, prefill_chunk=chunk, prefill_budget=min(chunk, 16))
        for _ in range(6):
            others = [tokens[: chance.integers(1, 150)], (*tokens[: chance.integers(1, 150)], 9, 9)]
            given = int(chance.choice([0, 1, 20]))
            assert np.array_equal(logits(running, given, *others[: chance.integers(0, 2)]), alone), (chunk, given)


def test_answers_to_one_prompt_that_begin_with_given_tokens_read_it_once(
    engine: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(max_num_seqs=3)
    fed: list[int] = []
    step = running._pool.step
    monkeypatch.setattr(running._pool, "step", lambda ids, *rest: fed.append(len(ids)) or step(ids, *rest))
    for name in "ab":
        running.add(Request(id=name, prompt_token_ids=PROMPT, params=PARAMS))
        running.apply(name, Forked(path=(), forced=(5, 6)))
    running.step()
    assert fed == [len(PROMPT), 4]
    for name in "ab":
        running.cancel(name)
    running.add(Request(id="c", prompt_token_ids=(*PROMPT, 5), params=PARAMS))
    running.apply("c", Forked(path=(), forced=(6,)))
    running.step()
    assert fed == [len(PROMPT), 4, 2], "what is left of its prompt goes with what is given"


def test_the_likeliest_ids_are_the_first_of_the_largest_logits(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each row of a pass, whichever thread of the team computed it; a greedy token then needs no look at the logits.
    Here every logit is there twice."""
    model = copy.deepcopy(reference("llama"))
    half = model.config.vocab_size // 2
    with torch.no_grad():
        model.lm_head.weight[half:] = model.lm_head.weight[:half]
    native = NativeModel(*packed_models.from_model(model, "F32"), threads=3)
    running = NativeEngine(native, max_num_seqs=3, max_model_len=128)
    rows: list[np.ndarray] = []
    monkeypatch.setattr(running, "_sampler", None)
    running.on_logits = lambda name, path, row: rows.append(row.copy())
    for name in "abc":
        running.add(Request(id=name, prompt_token_ids=PROMPT, params=PARAMS))
        running.apply(name, Forked(path=()))
        running.apply(name, Decoded(path=(), token=ord(name)))
    for _ in range(5):
        rows.clear()
        sampled = running.step()
        assert [token.token for token in sampled] == [int(row.argmax()) for row in rows] and len(rows) == 3
        assert all(row[half:].tolist() == row[:half].tolist() for row in rows)
        for token in sampled:
            running.apply(token.request_id, Decoded(path=(), token=token.token))
    running.close()
