"""The engine over transformers: rows, waiting, cancelling, prefixes, sampling, failures.

That its logits are exact is law 1, tests/laws/test_exactness.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path, SampledToken
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.transformers import cuda_graphs
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.engines.transformers.masks import CALL_COST, grouped
from pastalm.errors import CapabilityError, EngineError, RequestError
from tests.laws.tiny import SIZE, TAGS, tiny_model
from tests.token_sets import all_but, only

GREEDY = SamplingParams(temperature=0, max_tokens=60, drafts="off")
PROMPT = tuple(range(40, 60))


@cache
def model() -> PreTrainedModel:
    return tiny_model("qwen2-sliding")


def engine(**how: Any) -> TransformersEngine:
    return TransformersEngine(model(), **{"max_model_len": 128, "max_num_seqs": 2, **how})


def request(name: str, prompt: tuple[int, ...] = PROMPT, **how: Any) -> Request:
    params = replace(GREEDY, **how.pop("params", {}))
    return Request(id=name, prompt_token_ids=prompt, params=params, **how)


def start(running: TransformersEngine, *requests: Request) -> None:
    for each in requests:
        running.add(each)
        running.apply(each.id, Forked(path=()))


def follow(running: TransformersEngine, sampled: SampledToken) -> int:
    running.apply(sampled.request_id, Decoded(path=sampled.path, token=sampled.token, logprob=sampled.logprob))
    return sampled.token


def decode(running: TransformersEngine, steps: int) -> dict[tuple[str, Path], list[int]]:
    """What each thread says in some steps that only decode, once a prompt is read."""
    said: dict[tuple[str, Path], list[int]] = {}
    for _ in range(steps):
        while not (happened := running.step()) and running.has_unfinished():
            pass
        for sampled in happened:
            token = follow(running, sampled)
            said.setdefault((sampled.request_id, sampled.path), []).append(token)
    return said


def alone(each: Request, steps: int = 8) -> list[int]:
    running = engine()
    start(running, each)
    return decode(running, steps)[each.id, ()]


def finish(running: TransformersEngine, name: str, *paths: Path) -> None:
    for path in paths or ((),):
        running.apply(name, Finished(path=path))


# ------------------------------------------------------------------------------ the pool


def test_a_request_waits_until_it_is_started() -> None:
    running = engine(max_num_seqs=1)
    running.add(request("late"))
    assert running.has_unfinished() and running.step() == []
    start(running, request("early"))
    assert [s.request_id for s in running.step()] == ["early"]


def test_a_full_pool_makes_requests_wait_in_order() -> None:
    running = engine()
    names = ["a", "b", "c", "d"]
    start(running, *(request(n, (*PROMPT, i)) for i, n in enumerate(names)))
    said = decode(running, 3)
    assert sorted(said) == [("a", ()), ("b", ())]
    finish(running, "b")
    assert [s.request_id for s in running.step()] == ["a", "c"]
    finish(running, "a")
    finish(running, "c")
    assert [s.request_id for s in running.step()] == ["d"]
    finish(running, "d")
    assert not running.has_unfinished() and running.step() == []


def test_joining_and_leaving_between_steps_changes_no_text() -> None:
    requests = {n: request(n, tuple(range(i, 12 + 9 * i))) for i, n in enumerate("abcd")}
    want = {n: alone(r, 12) for n, r in requests.items()}
    running = engine(max_num_seqs=3)
    said: dict[str, list[int]] = {n: [] for n in requests}
    start(running, requests["a"])
    for step in range(40):
        if step == 3:
            start(running, requests["b"], requests["c"], requests["d"])
        for sampled in running.step():
            said[sampled.request_id].append(follow(running, sampled))
            if len(said[sampled.request_id]) == 12:
                finish(running, sampled.request_id)
    assert said == want
    assert not running.has_unfinished()


def test_cancel_frees_at_once_whether_waiting_or_running() -> None:
    running = engine(max_num_seqs=1)
    start(running, *(request(n) for n in "abc"))
    assert [s.request_id for s in running.step()] == ["a"]
    running.cancel("b")
    running.cancel("a")
    running.cancel("never there")
    assert [s.request_id for s in running.step()] == ["c"]
    running.cancel("c")
    assert not running.has_unfinished()
    running.apply("c", Finished(path=()))  # the end of what is gone already
    start(running, request("a"))
    assert alone(request("a"), 4) == decode(running, 4)["a", ()]


def test_a_row_is_freed_when_the_last_thread_ends_even_with_tokens_to_feed() -> None:
    running = engine(max_num_seqs=1)
    start(running, request("a"), request("b"))
    (first,) = running.step()
    follow(running, first)
    running.apply("a", Forked(path=(0,), promised=10, forced=(TAGS.async_open,)))
    finish(running, "a")
    assert [s.request_id for s in running.step()] == ["a"]
    running.apply("a", Decoded(path=(0,), token=TAGS.async_close, tag=True))
    finish(running, "a", (0,))
    assert [s.request_id for s in running.step()] == ["b"]


def logits_of(running: TransformersEngine, each: Request, steps: int = 5) -> Tensor:
    got: list[Tensor] = []
    running.on_logits = lambda request_id, path, logits: got.append(logits.clone())
    start(running, each)
    decode(running, steps)
    running.on_logits = None
    finish(running, each.id)
    return torch.stack(got)


@pytest.mark.parametrize("shared", [0, 1, 13, 19, 20])
def test_prefix_reuse_gives_the_same_logits(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = (*PROMPT[:shared], *range(100, 125 - shared))
    want = logits_of(engine(), request("b", prompt))
    running = engine(max_num_seqs=1, prefill_chunk=7)
    logits_of(running, request("a"))
    fed: list[int] = []
    forward = running._run

    def counted(**how: Any) -> Tensor:
        fed.append(len(how["ids"]))
        return forward(**how)

    monkeypatch.setattr(running, "_run", counted)
    got = logits_of(running, request("b", prompt))
    assert float((got - want).abs().max()) < 1e-9
    assert sum(fed) == len(prompt) - shared + 4  # and the four tokens decoded afterwards


def test_a_prompt_held_whole_feeds_its_last_token_again() -> None:
    want = logits_of(engine(), request("a"))
    running = engine(max_num_seqs=1)
    for name in "ab":
        assert float((logits_of(running, request(name)) - want).abs().max()) < 1e-9


def test_the_row_with_the_longest_common_prefix_is_taken() -> None:
    running = engine(max_num_seqs=3)
    start(running, *(request(n, (*PROMPT[: 5 * i], 9, 9, 9)) for i, n in enumerate("abc")))
    running.step()
    rows = {n: running._running[n].slot for n in "abc"}
    for name in "abc":
        finish(running, name)
    start(running, request("d"))
    running.step()
    assert running._running["d"].slot == rows["c"]


# ------------------------------------------------------------------------------ memory


def test_the_pool_grows_with_use_and_not_before() -> None:
    """Bytes of keys and values: rows and slots double as they are needed, up to what was asked for."""
    running = engine(max_num_seqs=64, max_model_len=4096)
    token = 2 * 4 * 2 * 16 * 8  # keys and values, layers, heads, dimensions, bytes
    assert running._pool.bytes == 0
    start(running, request("a"))
    decode(running, 2)
    assert running._pool.bytes == 257 * token
    start(running, *(request(name) for name in "bcde"))
    decode(running, 2)
    assert running._pool.bytes == 8 * 257 * token
    start(running, request("f", tuple(range(200)) * 3))
    decode(running, 15)
    assert running._pool.bytes == 8 * 1025 * token < 64 * 4096 * token / 10


@pytest.mark.parametrize("graphs", [False, True], ids=["", "fixed shapes"])
def test_what_decodes_goes_on_exactly_where_the_pool_grows(graphs: bool) -> None:
    short, long = request("a"), request("b", tuple(i % 250 for i in range(400)))
    want = {}
    for one in (short, long):
        lone = engine(max_num_seqs=1, max_model_len=512)
        start(lone, one)
        want[one.id] = decode(lone, 30)[one.id, ()]
    running = engine(max_num_seqs=4, max_model_len=512, graphs=graphs)
    start(running, short)
    said = decode(running, 5)["a", ()]
    before = running._pool.bytes
    start(running, long)
    both = decode(running, 30)
    assert running._pool.bytes == before // 257 * 513 * 2
    assert [*said, *both["a", ()]][:30] == want["a"]
    assert len(both["b", ()]) > 15
    assert both["b", ()] == want["b"][: len(both["b", ()])]


def test_a_pool_that_cannot_grow_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    running = engine(max_num_seqs=2, max_model_len=512)
    start(running, request("a"))
    said = decode(running, 3)["a", ()]
    layers, allocated = running._pool.layers, type(running._pool.layers[0])._allocated

    def full(layer: Any, like: Tensor) -> Tensor:
        if layer is layers[2]:
            raise RuntimeError("out of memory")
        return allocated(layer, like)

    with monkeypatch.context() as patch:
        patch.setattr(type(layers[0]), "_allocated", full)
        start(running, request("b", tuple(i % 250 for i in range(400))))
        with pytest.raises(EngineError, match="out of memory"):
            running.step()
        running.cancel("b")
    assert [*said, *decode(running, 5)["a", ()]] == alone(request("a"), 8)


def test_captured_steps_are_keyed_by_shape_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape serves whichever row a request is in; shapes not used for long make way."""
    running = engine(max_num_seqs=3, graphs=True)
    assert running._graphs is not None
    start(running, *(request(name) for name in "abc"))
    decode(running, 1)
    for name in "abc":
        finish(running, name)
    running._graphs.clear()
    for row in range(3):
        running._free = {row}
        start(running, request("a"))
        decode(running, 2)
        assert running._running["a"].slot == row
        finish(running, "a")
    assert len(running._graphs) == 1
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    running._free = {0, 1, 2}
    start(running, *(request(name) for name in "abc"))
    decode(running, 1)
    for k in range(3):
        running.apply("a", Forked(path=(k,), promised=10, forced=(1,)))
        decode(running, 1)
        assert len(running._graphs) <= 2


# ------------------------------------------------------------------------------ threads


def test_blocked_threads_do_not_sample_until_joined() -> None:
    running = engine()
    start(running, request("a"))
    (first,) = running.step()
    follow(running, first)
    fork: list[Event] = [
        Forked(path=(0,), promised=10, forced=(TAGS.async_open,)),
        Forked(path=(1,), promised=10),
        Blocked(path=(1,), on="thread"),
        Blocked(path=()),
    ]
    for event in fork:
        running.apply("a", event)
    assert [s.path for s in running.step()] == [(0,)]
    running.apply("a", Joined(path=(1,), forced=(TAGS.async_open,)))
    running.apply("a", Decoded(path=(0,), token=5))
    assert [s.path for s in running.step()] == [(0,), (1,)]
    for path in ((0,), (1,)):
        running.apply("a", Decoded(path=path, token=TAGS.async_close, tag=True))
        finish(running, "a", path)
    running.apply("a", Joined(path=(), children=((0,), (1,)), forced=(TAGS.sync,)))
    assert [s.path for s in running.step()] == [()]


def test_samples_come_by_request_then_path() -> None:
    running = engine()
    start(running, request("b"), request("a"))
    for sampled in running.step():
        follow(running, sampled)
        for k in (0, 1):
            running.apply(sampled.request_id, Forked(path=(k,), promised=10, forced=(1,)))
    order = [(s.request_id, s.path) for s in running.step()]
    assert order == [(n, p) for n in "ba" for p in ((), (0,), (1,))]


def test_allowed_binds_until_the_threads_next_event() -> None:
    running = engine()
    running.add(request("a"))
    running.apply("a", Forked(path=(), allowed=only(17)))
    (first,) = running.step()
    assert first.token == 17
    running.apply("a", Decoded(path=(), token=17, allowed=all_but(*range(18), *range(19, SIZE))))
    (second,) = running.step()
    assert second.token == 18
    running.apply("a", Decoded(path=(), token=18))
    (third,) = running.step()
    free = engine()
    start(free, request("a", (*PROMPT, 17, 18)))
    assert [third.token] == [s.token for s in free.step()]


def test_a_schedule_decides_who_decodes() -> None:
    seen: list[list[tuple[str, Path]]] = []

    def main_only(live: Any) -> Any:
        seen.append(list(live))
        return [thread for thread in live if thread[1] == ()]

    running = engine(schedule=main_only)
    start(running, request("a"))
    (first,) = running.step()
    follow(running, first)
    running.apply("a", Forked(path=(0,), promised=10, forced=(TAGS.async_open,)))
    assert [s.path for s in running.step()] == [()]
    assert seen == [[("a", ())], [("a", ()), ("a", (0,))]]


def test_stepping_past_an_unanswered_sample_is_an_error() -> None:
    running = engine()
    start(running, request("a"))
    running.step()
    with pytest.raises(EngineError, match="no token to go on from"):
        running.step()


# ------------------------------------------------------------------------------ sampling


def test_a_seed_gives_the_same_alone_and_in_a_batch() -> None:
    hot = {"temperature": 1.0, "top_p": 0.9}
    requests = [
        request("a", params=hot, seed=5),
        request("b", params=hot, seed=5, choice=1),
        request("c", PROMPT[3:], params={**hot, "top_k": 20}, seed=6),
        request("d", params={"temperature": 1.7}, seed=5),
    ]
    want = {r.id: alone(r, 10) for r in requests}
    running = engine(max_num_seqs=4)
    start(running, *requests)
    said = decode(running, 10)
    assert {name: said[name, ()] for name in want} == want
    assert want["a"] != want["b"]
    assert want["a"] == alone(requests[0], 10) != alone(replace(requests[0], seed=7), 10)


def test_penalty_counts_prompt_and_text_that_the_thread_sees_but_no_tags() -> None:
    """A penalty so large that every counted id is out of reach, and a bias that asks for them."""
    wanted = {1: 90.0, 2: 80.0, 3: 70.0, 4: 60.0, 5: 50.0}
    params = {"repetition_penalty": 1e6}
    running = engine()
    start(running, request("a", (*PROMPT, 1), params=params, logit_bias=wanted))
    (first,) = running.step()
    assert first.token == 2  # 1 stands in the prompt
    running.apply("a", Decoded(path=(), token=2, text="x"))
    running.apply("a", Forked(path=(0,), promised=10, forced=(3,)))
    main, child = running.step()
    assert (main.token, child.token) == (3, 3)  # a forced token does not count
    running.apply("a", Decoded(path=(), token=4, tag=True))
    running.apply("a", Decoded(path=(0,), token=3, text="y"))
    main, child = running.step()
    assert (main.token, child.token) == (3, 4)  # neither does a tag, nor what is hidden
    finish(running, "a", (0,))
    running.apply("a", Joined(path=(), children=((0,),), forced=(TAGS.sync,)))
    (main,) = running.step()
    assert main.token == 4  # the joined child's text does


def test_logprobs_are_those_of_the_raw_logits() -> None:
    got: list[Tensor] = []
    running = engine()
    running.on_logits = lambda request_id, path, logits: got.append(logits.clone())
    start(running, request("a", params={"logprobs": 3}, logit_bias={7: 100.0}))
    (sampled,) = running.step()
    want = got[0].log_softmax(-1)
    assert sampled.token == 7
    assert sampled.logprob == pytest.approx(float(want[7]), abs=1e-12)
    assert [i for i, _ in sampled.top_logprobs] == want.topk(3).indices.tolist()


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt": ()}, "empty"),
        ({"prompt": (1, SIZE)}, "vocabulary"),
        ({"prompt": (-1,)}, "vocabulary"),
        ({"logit_bias": {SIZE: 1.0}}, "vocabulary"),
        ({"params": {"max_tokens": 109}}, r"prompt \(20\) \+ max_tokens \(109\).*\(128\)"),
    ],
)
def test_requests_that_never_could_be_served(wrong: dict[str, Any], says: str) -> None:
    running = engine()
    with pytest.raises(RequestError, match=says) as error:
        running.add(request("a", **wrong))
    assert "\n" not in str(error.value)
    assert not running.has_unfinished()


def test_duplicates_and_events_that_cannot_follow() -> None:
    running = engine()
    running.add(request("a"))
    with pytest.raises(RequestError):
        running.add(request("a"))
    bad: list[Event] = [
        Decoded(path=(), token=1),
        Forked(path=(0,)),
    ]
    for event in bad:
        with pytest.raises(RequestError):
            running.apply("a", event)
    running.apply("a", Forked(path=()))
    for event in (Forked(path=()), Decoded(path=(3,), token=1), Decoded(path=(), token=SIZE)):
        with pytest.raises(RequestError):
            running.apply("a", event)
    with pytest.raises(RequestError):
        running.apply("unknown", Decoded(path=(), token=1))


def test_serial_positions_are_not_offered() -> None:
    running = engine()
    assert running.capabilities.positions == ("promised", "overlap")
    with pytest.raises(CapabilityError):
        running.add(request("a", positions="serial"))


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_failing_forward_is_one_error_and_the_engine_lives_on(steps_before: int) -> None:
    broken = tiny_model("llama")
    running = TransformersEngine(broken, max_model_len=128, max_num_seqs=1)
    start(running, request("a"), request("b"))
    decode(running, steps_before)

    def fail(module: Any, inputs: Any) -> None:
        raise RuntimeError("no memory\nfor that")

    hook = broken.get_decoder().layers[2].register_forward_pre_hook(fail)
    with pytest.raises(EngineError, match="RuntimeError: no memory") as error:
        running.step()
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, RuntimeError)
    hook.remove()
    running.cancel("a")
    running.cancel("b")
    assert not running.has_unfinished()
    start(running, request("a"))
    fresh = TransformersEngine(broken, max_model_len=128)
    start(fresh, request("a"))
    assert decode(running, 5) == decode(fresh, 5)


def test_a_failed_step_can_be_taken_again() -> None:
    broken = tiny_model("llama")
    running = TransformersEngine(broken, max_model_len=128)
    start(running, request("a"))
    decode(running, 2)
    hook = broken.get_decoder().layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(EngineError):
        running.step()
    hook.remove()
    fresh = TransformersEngine(broken, max_model_len=128)
    start(fresh, request("a"))
    assert decode(fresh, 6)["a", ()][2:] == decode(running, 4)["a", ()]


def test_the_model_is_left_as_it_was() -> None:
    plain = tiny_model("gemma3")
    before, ids = plain.config._attn_implementation, torch.tensor([PROMPT])
    want = plain(ids).logits
    running = TransformersEngine(plain, max_model_len=128)
    start(running, request("a"))
    decode(running, 3)
    assert plain.config._attn_implementation == before
    assert torch.equal(plain(ids).logits, want)


def test_lower_precision_runs_in_the_models_own() -> None:
    for name in ("gemma2", "qwen3"):
        running = TransformersEngine(tiny_model(name, dtype=torch.bfloat16), max_model_len=128)
        got: list[Tensor] = []
        running.on_logits = lambda request_id, path, logits, got=got: got.append(logits)
        start(running, request("a"), request("b"))
        decode(running, 3)
        assert all(logits.dtype == torch.bfloat16 and bool(logits.isfinite().all()) for logits in got)


SMALL: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1}


def _llama(**rope: Any) -> LlamaForCausalLM:
    rope = {"rope_theta": 1e4, **rope}
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, num_attention_heads=2, rope_parameters=rope))


UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "not rotary": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    ),
    "no KV cache": lambda: MambaForCausalLM(MambaConfig(**SMALL)),
    "ALiBi": lambda: BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2)),
    "no causal language model": lambda: _llama(rope_type="default").model,
}


@pytest.mark.parametrize("says", UNSUPPORTED)
def test_models_it_cannot_run(says: str) -> None:
    with pytest.raises(CapabilityError, match=says) as error:
        TransformersEngine(UNSUPPORTED[says]())
    assert "\n" not in str(error.value)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 2000)), min_size=1, max_size=7))
def test_rows_are_read_together_where_that_reads_least(entries: list[tuple[int, int]]) -> None:
    chosen = dict(entries)
    rows, widths = sorted(chosen), [chosen[row] for row in sorted(chosen)]

    def cost(ranges: Sequence[tuple[int, int]]) -> int:
        return sum((rows[j - 1] + 1 - rows[i]) * max(widths[i:j]) + CALL_COST for i, j in ranges)

    def splits(i: int) -> Iterator[list[tuple[int, int]]]:
        if i == len(rows):
            yield []
        for j in range(i + 1, len(rows) + 1):
            yield from ([(i, j), *rest] for rest in splits(j))

    ranges = grouped(rows, widths)
    assert [k for i, j in ranges for k in range(i, j)] == list(range(len(rows)))
    assert cost(ranges) == min(map(cost, splits(0)))
