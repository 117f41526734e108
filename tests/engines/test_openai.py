"""The engine over a completions server: what it asks for is what training trains on, and nothing that a server says,
or fails to say, hangs it, raises out of turn or spoils the text.

The servers are replayed. `Played` knows written answers as the rows of `pack_serial` and refuses any prompt that
does not begin one of them.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

pytest.importorskip("openai")

from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.cli.view import segments
from pastalm.core.driver import Driver, Response
from pastalm.core.events import Decoded, Event, Finished, Joined
from pastalm.core.interpreter import Limits
from pastalm.core.language import Sync
from pastalm.core.params import SamplingParams
from pastalm.core.vocabulary import TAG_TOKENS, Vocabulary
from pastalm.engines.completions.discovery import connect
from pastalm.engines.completions.engine import OpenAIEngine
from pastalm.engines.completions.pieces import Pieces
from pastalm.engines.completions.serial import SerialLayout
from pastalm.engines.scripted import EOS, byte_vocabulary
from pastalm.errors import CapabilityError, ModelError, RemoteError, RequestError
from pastalm.eval.replay import decoded_rows
from pastalm.llm import LLM
from pastalm.models.chat_template import TEACHING, TextTokenizer
from pastalm.models.loading import Loaded
from pastalm.models.lossless import vocabulary_of
from pastalm.records.documents import Async, Document, Node, nest, normalize, parse, strip
from pastalm.records.traces import from_json, to_json
from pastalm.records.transcripts import linear_tokens
from pastalm.train.packing import pack_serial, unroll
from tests.laws.test_replay import PLENTY, ROOM, roomy
from tests.play import PIECES
from tests.served import Parts, Reply, llama_cpp_server, streaming
from tests.strategies import as_decoded

PREPARED = byte_vocabulary()
TAGS = PREPARED.tags
assert TAGS is not None
VLLM = {"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 1 << 20}
SGLANG = {"id": "m", "object": "model", "owned_by": "sglang"}
PROMPT = [1, 2, 3]
TIPS = parse(
    'Two:\n<promise topic="a" tokens="20"/><async>1. A, at length\n</async>'
    '<promise topic="b" tokens="20"/><async>2. B, at length\n</async><sync/>Done.'
)
TIPS_TEXT = strip(TIPS)


# ------------------------------------------------------------------------------ servers


def ids_chunk(ids: list[int], finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk as vLLM sends it with return_token_ids."""
    choice = {"index": 0, "text": PREPARED.text(ids), "token_ids": ids, "logprobs": None, "finish_reason": finish}
    return {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice | more]}


def text_chunk(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk as any server sends it."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice | more]}


def refusal(status: int, said: str = "no", **headers: str) -> Reply:
    return status, headers, {"error": {"message": said}}


@dataclass
class Played:
    """A server whose model writes documents, one a prompt. Told as a function of the request's body.

    rng: cuts chunks. beyond: goes on past the end of a stretch with nonsense, as a server that is ahead does.
    before: may answer instead (a failure). asked: bodies so far, thread-safe enough for tests.
    """

    documents: dict[int, Document]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    beyond: bool = False
    before: Callable[[dict[str, Any], list[int]], Reply | Parts | None] = lambda body, rest: None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return 200, {}, ids_chunk([65], "length")
        self.asked.append(body)
        rest = self.rest(body["prompt"])
        if rest is None:
            return refusal(400, f"no row begins with {body['prompt']}")
        instead = self.before(body, rest)
        return instead if instead is not None else self.parts(body, rest)

    def rest(self, prompt: list[int]) -> list[int] | None:
        """What follows a prompt in the row that it begins."""
        document = self.documents.get(prompt[0])
        if document is None:
            return None
        head = prompt[: len(PROMPT)]
        for row in pack_serial(head, document, PREPARED, eos=EOS):
            ids = row.input_ids.tolist()
            context = sum(int(label) < 0 for label in row.labels)
            context -= sum(int(i) == TAGS.async_open for i in ids[context:])
            if context <= len(prompt) < len(ids) and ids[: len(prompt)] == prompt:
                return ids[len(prompt) :]
        return None

    def parts(self, body: dict[str, Any], rest: list[int]) -> Parts:
        stops = {EOS, *body.get("stop_token_ids", ())}
        if self.beyond:
            stops = {EOS}
            rest = [*rest, *(self.rng.randrange(256) for _ in range(30)), TAGS.sync, TAGS.promise, EOS]
        left = body["max_tokens"]
        while rest and left > 0:
            cut = next((i + 1 for i, token in enumerate(rest) if token in stops), len(rest))
            n = min(self.rng.randint(1, 4), left, cut)
            said, rest, left = rest[:n], rest[n:], left - n
            if said[-1] in stops:
                stop = said[-1]
                yield ids_chunk(said, "stop", stop_reason=None if stop == EOS else stop)
                return
            yield ids_chunk(said)
        yield ids_chunk([], "length")


@contextmanager
def engine_over(
    answer: Callable[[dict[str, Any]], Reply | Parts],
    model: dict[str, Any] = VLLM,
    vocabulary: Vocabulary | None = PREPARED,
    **options: Any,
) -> Iterator[OpenAIEngine]:
    with streaming(answer, [model]) as url:
        options = {"retries": 1, "timeout": 5.0, "backoff": 0.01} | options
        engine = connect(url, vocabulary=lambda _: vocabulary, **options)
        try:
            yield engine
        finally:
            engine.close()


def run(driver: Driver, seconds: float = 60.0) -> None:
    """To the end, or an assertion."""
    end = time.monotonic() + seconds
    while driver.running:
        driver.step()
        assert time.monotonic() < end, "the engine hangs"
    assert not driver.engine.has_unfinished()


def submit(driver: Driver, first: int = 1, **params: Any) -> Response:
    params = {"max_tokens": PLENTY, "temperature": 0} | params
    prompt = [first, *PROMPT[1:]]
    return driver.submit(prompt, SamplingParams(**params), seed=1, positions="serial")


def answered(engine: OpenAIEngine, limits: Limits = ROOM, **params: Any) -> Response:
    driver = Driver(engine, engine.wire.vocabulary, limits=limits)
    running = submit(driver, **params)
    run(driver)
    return running


# ------------------------------------------------------------------------------ rows


@settings(max_examples=100)
@given(roomy)
def test_rows_while_decoding_are_the_rows_of_training(document: Document) -> None:
    """Told the events of a document in linear order, each stretch is read as `pack_serial` packs it."""
    layout = SerialLayout(PROMPT)
    seen: list[list[int]] = []
    for event in unroll(document, PREPARED, eos=EOS):
        layout.apply(event)
        seen.append(layout.row(event.path))
    for row in pack_serial(PROMPT, document, PREPARED, eos=EOS):
        ids = row.input_ids.tolist()
        if ids[-1] == TAGS.sync:
            ids = ids[:-1]
        assert ids in seen


# ------------------------------------------------------------------------------ laws over whole answers


def waiting(document: Document) -> Document:
    """Without the syncs that have nothing to wait for: they end no stretch."""
    kept: list[Node] = []
    for node in document:
        if isinstance(node, Sync):
            since = kept[max((i for i, k in enumerate(kept) if isinstance(k, Sync)), default=0) :]
            if any(isinstance(k, Async) for k in since):
                kept.append(node)
        else:
            kept.append(Async(waiting(node.body)) if isinstance(node, Async) else node)
    return normalize(kept)


written = roomy.map(waiting).map(as_decoded)


@settings(max_examples=25)
@given(st.lists(written, min_size=1, max_size=3), st.integers(0, 999), st.booleans(), st.booleans())
def test_what_the_model_writes_is_the_answer(
    documents: list[Document], seed: int, beyond: bool, finished: bool
) -> None:
    """However chunks are cut, however far the server is ahead, whichever requests share blocks. Any prompt that is
    not a row of training is refused, and would lose a thread."""
    played = Played({i + 1: d for i, d in enumerate(documents)}, random.Random(seed), beyond)
    with engine_over(played, SGLANG if finished else VLLM, shares="finished" if finished else "running") as engine:
        driver = Driver(engine, PREPARED, limits=ROOM)
        told = [submit(driver, i + 1) for i in range(len(documents))]
        run(driver)
    for running, document in zip(told, documents, strict=True):
        assert running.transcript.why == ""
        assert running.transcript.text == strip(document)
        assert nest(running.transcript.marks()) == document
        assert running.transcript.critical_path <= running.transcript.tokens


@settings(max_examples=10)
@given(written, st.integers(0, 999))
def test_failures_on_the_way_do_not_change_the_answer(document: Document, seed: int) -> None:
    """Streams that break off, end early, are no answer, or are refused for a while."""
    rng = random.Random(seed)
    failed: dict[str, int] = {}

    def before(body: dict[str, Any], rest: list[int]) -> Reply | Parts | None:
        key = str(body["prompt"])
        failed[key] = failed.get(key, 0) + 1
        if failed[key] > 1:
            return None
        some = rest[: rng.randint(0, 3)]
        some = [t for t in some if t not in (TAGS.sync, TAGS.async_close, EOS)]
        ways: list[Reply | Parts] = [
            refusal(503, "busy", **{"Retry-After": "0.01"}),
            iter_of(ids_chunk(some), None),
            iter_of(ids_chunk(some), b"data: {]\n\n"),
            iter_of(ids_chunk(some), {"error": {"message": "out of memory"}}),
            iter_of(ids_chunk([*some, -5])),
            iter_of(text_chunk("text without ids")),
            iter_of(ids_chunk(some)),
            iter_of(ids_chunk(some, "abort")),
            iter_of(ids_chunk(some, "length")),
        ]
        return rng.choice(ways)

    with engine_over(Played({1: document}, rng, before=before), retries=2) as engine:
        running = answered(engine)
    assert running.transcript.why == ""
    assert running.transcript.text == strip(document)


def iter_of(*parts: Any) -> Parts:
    yield from parts


def _any_ids(seed: int, weights: list[int]) -> Callable[[dict[str, Any]], Reply | Parts]:
    """A server that says anything."""

    def answer(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return 200, {}, ids_chunk([65], "length")
        rng = random.Random(f"{seed}/{body['prompt']}")

        def parts() -> Parts:
            for _ in range(rng.randint(0, 40)):
                n = rng.choice((0, 1, 1, 3))
                yield ids_chunk([rng.choice(weights) if rng.random() < 0.6 else rng.randrange(263) for _ in range(n)])
            yield ids_chunk([], rng.choice(["stop", "stop", "length", "abort", None]))

        return refusal(rng.choice([429, 500]), **{"Retry-After": "0.01"}) if rng.random() < 0.05 else parts()

    return answer


def check_ended(running: Response, events: list[Event], max_tokens: int) -> None:
    """Law 5: every thread ended once, within the budget, and the transcript holds together."""
    transcript = running.transcript
    assert transcript.finished
    assert transcript.tokens <= max_tokens
    ends = [event.path for event in events if isinstance(event, Finished)]
    assert sorted(ends) == sorted(transcript.threads)
    assert strip(parse(transcript.annotated)) == transcript.text


def followed(engine: OpenAIEngine, limits: Limits, max_tokens: int) -> tuple[Response, list[Event]]:
    driver = Driver(engine, engine.wire.vocabulary, limits=limits)
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    running = driver.submit([1], params, positions="serial")
    end = time.monotonic() + 60
    while driver.running:
        driver.step()
        assert time.monotonic() < end, "the engine hangs"
    return running, running.take()


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 150), st.integers(1, 4))
def test_any_ids_end_within_budgets(seed: int, max_tokens: int, threads: int) -> None:
    promise = [TAGS.promise, 97, TAGS.tokens, 49, 48, TAGS.promise_end]
    weights = [*promise, *promise, TAGS.sync, TAGS.async_close, EOS, 98, 32, 0xC3]
    with engine_over(_any_ids(seed, weights), backoff=0.0) as engine:
        running, events = followed(engine, Limits(max_threads=threads), max_tokens)
    check_ended(running, events, max_tokens)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 200), st.booleans())
def test_any_text_ends_within_budgets(seed: int, max_tokens: int, prepared: bool) -> None:
    """Tags malformed, cut anywhere, in the wrong places; characters that are none."""
    spelled = [*TAG_TOKENS.values(), "12", "a", "30", "\ud83d"]
    choices = spelled if prepared else [*PIECES, '<promise topic="a', '" tokens="30"/>', "\ud83d", "<promise/>"]

    def answer(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return 200, {}, text_chunk("a", "length")
        rng = random.Random(f"{seed}/{body['prompt']}")
        said = [text_chunk("".join(rng.choices(choices, k=rng.choice((1, 1, 2))))) for _ in range(rng.randint(0, 40))]
        return iter_of(*said, text_chunk("", rng.choice(["stop", "length"])))

    vocabulary = PREPARED if prepared else None
    with engine_over(answer, vocabulary=vocabulary, backoff=0.0) as engine:
        assert engine.wire.name == "text"
        running, events = followed(engine, Limits(), max_tokens)
    check_ended(running, events, max_tokens)


# ------------------------------------------------------------------------------ what is asked


def seen_main(played: Played) -> list[dict[str, Any]]:
    """Requests for the main thread: those whose prompt ends outside a chunk."""
    return [b for b in played.asked if b["prompt"].count(TAGS.async_open) == b["prompt"].count(TAGS.async_close)]


def test_a_running_parent_is_asked_once_a_stretch() -> None:
    """vLLM shares what still runs: the main thread's first completion lasts until its sync."""
    played = Played({1: TIPS})
    with engine_over(played) as engine:
        assert answered(engine).transcript.text == TIPS_TEXT
    assert len(seen_main(played)) == 2
    assert len(played.asked) == 4
    assert engine.traffic.completions == 4
    assert engine.traffic.again == engine.traffic.dropped == 0


def test_a_parent_that_must_end_to_share_is_sent_again_at_each_promise() -> None:
    """SGLang: the main thread's completions end with the promises, the children's begin with the same ids."""
    played = Played({1: TIPS})
    with engine_over(played, SGLANG) as engine:
        assert engine.server.shares == "finished"
        assert answered(engine).transcript.text == TIPS_TEXT
    main = [body["prompt"] for body in seen_main(played)]
    assert len(main) == 4
    assert [prompt[-1] for prompt in main[1:3]] == [TAGS.promise_end, TAGS.promise_end]
    children = [b["prompt"] for b in played.asked if b["prompt"] not in main]
    assert sorted(children) == sorted([*prompt, TAGS.async_open] for prompt in main[1:3])
    assert all(TAGS.promise_end in body["stop_token_ids"] for body in played.asked)


def test_what_is_sent() -> None:
    played = Played({1: TIPS})
    bias = {7: -3.0}
    with engine_over(played) as engine:
        answered(engine, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, logit_bias=bias)
        first, *others = played.asked
        told = {name: first[name] for name in ("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        assert told == {
            "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        }  # fmt: skip
        assert first["logit_bias"] == {"7": -3.0}
        assert len({body["seed"] for body in played.asked}) == len(played.asked), "threads do not repeat each other"
        again = [body["seed"] for body in played.asked]
        played.asked.clear()
        answered(engine, temperature=0.5)
        assert sorted(body["seed"] for body in played.asked) == sorted(again), "a seed repeats an answer"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("vllm", {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False}),
        ("me", {"top_k": 0, "min_p": 0, "repeat_penalty": 1, "ignore_eos": False}),
        ("somebody", {}),
    ],
)
def test_no_default_of_the_server_is_left_to_it(kind: str, told: dict[str, Any]) -> None:
    """llama-cpp-python's server penalises repetitions unless told not to, vLLM takes the model's own defaults."""
    played = Played({1: TIPS})
    with engine_over(played, VLLM | {"owned_by": kind}) as engine:
        answered(engine)
    names = {"top_p", "top_k", "min_p", "repetition_penalty", "repeat_penalty", "ignore_eos"}
    assert {k: v for k, v in played.asked[0].items() if k in names} == told | {"top_p": 1}


def test_without_tags_they_are_forbidden_from_first_to_last() -> None:
    plain = Played({1: normalize(parse("Two plain tips."))})
    with engine_over(plain) as engine:
        running = answered(engine, parallelism=0)
    assert running.transcript.text == "Two plain tips."
    (body,) = plain.asked
    assert {int(i) for i, value in body["logit_bias"].items() if value == -100} == set(TAGS)


def test_what_a_kind_of_server_lacks_is_refused() -> None:
    played = Played({1: TIPS})
    with engine_over(played, {"id": "m", "owned_by": "somebody"}) as engine:
        driver = Driver(engine, PREPARED)
        for odd in ({"top_k": 3}, {"min_p": 0.5}, {"ignore_eos": True}, {"repetition_penalty": 1.2}, {"logprobs": 1}):
            with pytest.raises(CapabilityError):
                submit(driver, **odd)
        with pytest.raises(CapabilityError, match="serial"):
            driver.submit(PROMPT, SamplingParams(max_tokens=5), positions="promised")
        with pytest.raises(RequestError, match="empty"):
            driver.submit([], SamplingParams(max_tokens=5), positions="serial")
    with engine_over(played, VLLM | {"max_model_len": 20}) as engine, pytest.raises(RequestError, match="20"):
        submit(Driver(engine, PREPARED), max_tokens=18)


def test_log_probabilities_and_alternatives_come_by_id() -> None:
    def answer(body: dict[str, Any]) -> Reply | Parts:
        top = {"token_id:72": -0.25, "token_id:74": -2}
        told = {"tokens": ["token_id:72"], "token_logprobs": [-0.25], "top_logprobs": [top]}
        chunk = ids_chunk([72], None if body.get("stream") else "length", logprobs=told)
        return iter_of(chunk, ids_chunk([EOS], "stop")) if body.get("stream") else (200, {}, chunk)

    with engine_over(answer) as engine:
        transcript = answered(engine, logprobs=1).transcript
    (only, end) = transcript.scored()[0][1], [*linear_tokens(transcript)][-1]
    assert (only.token, only.logprob, only.top_logprobs) == (72, -0.25, ((72, -0.25),))
    assert end[:2] == ((), EOS)


def test_a_token_that_is_put_right_is_what_the_server_goes_on_from() -> None:
    """A topic of four words: where the fourth would begin it ends, and the thread is asked for again from there."""
    prompts: list[list[int]] = []

    def answer(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return 200, {}, ids_chunk([65], "length")
        prompts.append(body["prompt"])
        if len(prompts) == 1:
            return iter_of(ids_chunk([TAGS.promise, *b"a b c d e"]), ids_chunk([*b" and no end"]))
        return iter_of(ids_chunk([*b"20", TAGS.promise_end, *b"x", EOS], "stop"))

    with engine_over(answer) as engine:
        transcript = answered(engine, max_tokens=300).transcript
    assert prompts[1] == [1, 2, 3, TAGS.promise, *b"a b c", TAGS.tokens]
    assert transcript.threads[(0,)].topic == "a b c"
    assert [text for path, text in segments(transcript) if not path] == ["x"]


# ------------------------------------------------------------------------------ failures


def stalls(*parts: Any, seconds: float = 30.0) -> Parts:
    yield from parts
    time.sleep(seconds)


def in_chunk(body: dict[str, Any], topic: str) -> bool:
    """Whether a request is for the chunk of a topic of one letter."""
    prompt = body["prompt"]
    opened = prompt.count(TAGS.async_open) > prompt.count(TAGS.async_close)
    return opened and prompt[_last(prompt, TAGS.tokens) - 1] == ord(topic)


def _last(ids: list[int], token: int) -> int:
    return len(ids) - 1 - ids[::-1].index(token)


def test_a_chunk_that_fails_in_company_is_written_alone() -> None:
    """While others are under way the chunk b fails always; it is written once nothing else is."""
    under_way: set[int] = set()
    begun, tried = threading.Event(), threading.Semaphore(0)

    def before(body: dict[str, Any], rest: list[int]) -> Reply | Parts | None:
        if not in_chunk(body, "b"):
            return counted(body, rest)
        assert begun.wait(20)
        if under_way:
            tried.release()
            return refusal(500)
        return None

    def counted(body: dict[str, Any], rest: list[int]) -> Parts:
        under_way.add(id(body))
        try:
            if in_chunk(body, "a"):  # keeps b company until both its tries have failed
                begun.set()
                for _ in range(2):
                    tried.acquire(timeout=20)
            for token in rest:
                yield ids_chunk([token])
        finally:
            under_way.discard(id(body))

    played = Played({1: TIPS}, before=before)
    with engine_over(played, retries=1) as engine:
        transcript = answered(engine).transcript
    assert transcript.text == TIPS_TEXT
    assert transcript.why == ""
    assert sum(in_chunk(body, "b") for body in played.asked) >= 3


@pytest.mark.parametrize("way", ["refused", "too long", "broken", "silent", "nonsense"])
def test_a_chunk_that_always_fails_is_left_out_and_the_rest_stands(way: str) -> None:
    def before(body: dict[str, Any], rest: list[int]) -> Reply | Parts | None:
        if not in_chunk(body, "b"):
            return None
        return {
            "refused": refusal(500, "boom"),
            "too long": refusal(400, "too long"),
            "broken": iter_of(None),
            "silent": stalls(seconds=2.0),
            "nonsense": iter_of({"choices": [{"text": 5, "token_ids": "x"}]}),
        }[way]

    played = Played({1: TIPS}, before=before)
    lost = [TAGS.async_open, TAGS.async_close]

    def rest(prompt: list[int]) -> list[int] | None:
        """After the sync the model reads an empty chunk, which no document has."""
        return [*b"Done.", EOS] if prompt[-3:] == [*lost, TAGS.sync] else Played.rest(played, prompt)

    played.rest = rest  # type: ignore[method-assign]
    with engine_over(played, retries=1, timeout=0.3) as engine:
        transcript = answered(engine).transcript
    assert transcript.text == "Two:\n1. A, at length\nDone."
    assert transcript.finish_reason == "abort"
    assert transcript.threads[(1,)].reason == "abort"
    assert transcript.threads[()].reason == "stop"
    assert engine.connection.base_url in transcript.why
    assert "\n" not in transcript.why


def test_a_chunk_that_failed_in_company_is_written_alone_once_the_others_have_gone() -> None:
    """It is told of its failure only then."""
    gone, refused = threading.Event(), 0

    def before(body: dict[str, Any], rest: list[int]) -> Reply | Parts | None:
        nonlocal refused
        if in_chunk(body, "a"):
            return followed(rest)
        if in_chunk(body, "b") and refused < 2:
            refused += 1
            assert gone.wait(20)
            time.sleep(0.3)  # what a said last is heard before
            return refusal(500)
        return None

    def followed(rest: list[int]) -> Parts:
        yield ids_chunk(rest)
        gone.set()

    played = Played({1: TIPS}, before=before)
    with engine_over(played, retries=1) as engine:
        transcript = answered(engine).transcript
    assert (transcript.text, transcript.why, refused) == (TIPS_TEXT, "", 2)


def test_a_main_thread_that_always_fails_ends_and_says_why() -> None:
    played = Played({1: TIPS}, before=lambda body, rest: refusal(500, "boom"))
    with engine_over(played, retries=0) as engine:
        transcript = answered(engine).transcript
    assert (transcript.text, transcript.finish_reason) == ("", "abort")
    assert "boom" in transcript.why


def test_a_request_that_fails_leaves_the_others_alone() -> None:
    played = Played({1: TIPS, 2: TIPS}, before=lambda body, rest: refusal(500) if body["prompt"][0] == 1 else None)
    with engine_over(played, retries=0) as engine:
        driver = Driver(engine, PREPARED, limits=ROOM)
        first, second = submit(driver, 1), submit(driver, 2)
        run(driver)
    assert first.transcript.finish_reason == "abort"
    assert second.transcript.text == TIPS_TEXT


def test_a_server_that_goes_away_ends_the_run() -> None:
    played = Played({1: TIPS}, before=lambda body, rest: iter_of(ids_chunk(rest[:3]), None))
    with streaming(played, [VLLM]) as url:
        engine = connect(url, vocabulary=lambda _: PREPARED, retries=0, backoff=0.01)
    driver = Driver(engine, PREPARED)
    running = submit(driver)
    with pytest.raises(RemoteError, match="cannot reach .* start the server"):
        run(driver)
    assert running.transcript.finish_reason == "abort"
    assert not engine.has_unfinished()
    engine.close()


def test_a_key_that_is_no_longer_taken_ends_the_run() -> None:
    played = Played({1: TIPS}, before=lambda body, rest: refusal(401, "bad key"))
    with engine_over(played) as engine, pytest.raises(RemoteError, match="401.*bad key"):
        answered(engine)


def test_who_cancels_is_gone_from_the_server() -> None:
    gone = threading.Event()

    def slow(body: dict[str, Any], rest: list[int]) -> Parts:
        try:
            for token in rest * 1000:
                time.sleep(0.01)
                yield ids_chunk([token] if token < 256 else [65])
        finally:
            gone.set()

    with engine_over(Played({1: TIPS}, before=slow)) as engine:
        driver = Driver(engine, PREPARED)
        running = submit(driver)
        while running.transcript.tokens < 5:
            driver.step()
        driver.cancel(running)
        assert gone.wait(10), "the server still decodes"
        assert not engine.has_unfinished()
        assert driver.step() == []


def test_a_step_returns_where_nothing_comes() -> None:
    """So that whoever drives can cancel while a server is silent."""
    with engine_over(Played({1: TIPS}, before=lambda body, rest: stalls(seconds=1.0)), timeout=30) as engine:
        driver = Driver(engine, PREPARED)
        running = submit(driver)
        assert driver.step() == []
        driver.cancel(running)
        assert not engine.has_unfinished()


def test_a_stream_of_a_silent_server_can_be_interrupted() -> None:
    released, spoke_again = threading.Event(), threading.Event()

    def silent(body: dict[str, Any], rest: list[int]) -> Parts:
        yield ids_chunk(rest[:4])
        if not released.wait(20):
            spoke_again.set()

    with engine_over(Played({1: TIPS}, before=silent), timeout=60) as engine:
        driver = Driver(engine, PREPARED, limits=ROOM)
        params = SamplingParams(max_tokens=50, temperature=0)
        stream = driver.submit(PROMPT, params, positions="serial")
        stream.interrupted = lambda: stream.transcript.tokens >= 4
        events = list(stream)
        assert not spoke_again.is_set()
        released.set()
    assert isinstance(events[-1], Finished)
    assert (stream.transcript.text, stream.transcript.finish_reason) == (TIPS_TEXT[:4], "abort")


def test_requests_beyond_the_most_wait() -> None:
    played = Played({1: TIPS, 2: TIPS})
    with engine_over(played, max_num_seqs=1) as engine:
        driver = Driver(engine, PREPARED, limits=ROOM)
        first, second = submit(driver, 1), submit(driver, 2)
        while not first.transcript.finished:
            driver.step()
            assert second.transcript.tokens == 0
        run(driver)
    assert second.transcript.text == TIPS_TEXT


# ------------------------------------------------------------------------------ finding out


def test_connecting_says_what_is_wrong() -> None:
    with pytest.raises(RemoteError, match="cannot reach"):
        connect("http://127.0.0.1:9/v1", retries=0)
    with streaming(lambda body: refusal(500, "boom"), [VLLM]) as url:
        with pytest.raises(RemoteError, match="serves no 'other', but m"):
            connect(url, "other")
        with pytest.raises(RemoteError, match="boom"):
            connect(url, "m")
        with pytest.raises(RequestError, match="shares"):
            connect(url, shares="never")  # type: ignore[arg-type]
    with streaming(lambda body: refusal(401, "no key"), [VLLM]) as url, pytest.raises(RemoteError, match="no key"):
        connect(url)
    with (
        streaming(lambda body: (200, {}, b"<html>"), [VLLM, VLLM | {"id": "n"}]) as url,
        pytest.raises(RemoteError, match="serves m, n: give --model"),
    ):
        connect(url)


def test_another_tokenizer_is_noticed() -> None:
    said = ids_chunk([66], "length", text="not B")
    with streaming(lambda body: (200, {}, said), [VLLM]) as url, pytest.raises(RemoteError, match="--tokenizer"):
        connect(url, vocabulary=lambda _: PREPARED)


def test_a_server_that_knows_no_ids_is_asked_in_text() -> None:
    def answer(body: dict[str, Any]) -> Reply | Parts:
        return (200, {}, text_chunk("a", "length")) if isinstance(body["prompt"], str) else refusal(422)

    with engine_over(answer) as engine:
        assert engine.wire.name == "text"
        assert engine.wire.vocabulary.tags is not None
        assert not engine.capabilities.logprobs


def test_asked_in_text_the_tags_are_forbidden_by_the_ids_of_the_model() -> None:
    biases: list[Any] = []

    def answer(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return (200, {}, text_chunk("a", "length")) if isinstance(body["prompt"], str) else refusal(422)
        biases.append(body.get("logit_bias"))
        return iter([text_chunk("Two tips."), text_chunk("", "stop")])

    with engine_over(answer) as engine:
        driver = Driver(engine, engine.wire.vocabulary)
        for parallelism in (0.0, 1.0):
            params = SamplingParams(temperature=0, max_tokens=9, parallelism=parallelism)
            running = driver.submit(engine.wire.vocabulary.encode("Which?"), params, positions="serial")
            run(driver)
            assert running.transcript.text == "Two tips."
    assert biases == [{str(i): -100 for i in TAGS}, None]


def test_asked_in_text_the_end_is_forbidden_by_the_ids_of_the_model() -> None:
    biases: list[Any] = []

    def answer(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return (200, {}, text_chunk("a", "length")) if isinstance(body["prompt"], str) else refusal(422)
        biases.append(body.get("logit_bias"))
        return iter([text_chunk("a")] * 9 + [text_chunk("", "length")])

    with engine_over(answer) as engine:
        driver = Driver(engine, engine.wire.vocabulary)
        params = SamplingParams(temperature=0, max_tokens=9, parallelism=0.0, ignore_eos=True)
        running = driver.submit(engine.wire.vocabulary.encode("Which?"), params, positions="serial")
        run(driver)
    assert running.transcript.text == "a" * 9
    assert biases == [{str(i): -100 for i in (*TAGS, *PREPARED.eos)}]


@pytest.mark.parametrize("added", [True, False])
def test_a_prompt_in_text_begins_as_the_model_is_used_to(added: bool) -> None:
    """A server puts in what the model's tokenizer puts in. SmolLM2's names a beginning that it does not put in, for
    its template does: left out, the model answers another prompt."""
    words = tokenizer()
    words.bos_token = "<|end|>"
    words.chat_template = "<|end|>" + words.chat_template
    if added:
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", 256)]
        )
    messages = [{"role": "user", "content": "Hi"}]
    text = TextTokenizer(words, words.encode).apply_chat_template(messages, tokenize=False)
    assert words(text).input_ids == words.apply_chat_template(messages)["input_ids"]


def test_the_end_is_no_text_where_a_server_says_it() -> None:
    """llama.cpp's server with `special`, which a prepared model needs there, says the end token too."""

    def answer(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return (200, {}, text_chunk("a", "length")) if isinstance(body["prompt"], str) else refusal(422)
        return iter([text_chunk("Yes"), text_chunk(".<|end|>"), text_chunk("", "stop")])

    with engine_over(answer, vocabulary=replace(PREPARED, ends=frozenset({"<|end|>"}))) as engine:
        driver = Driver(engine, engine.wire.vocabulary)
        prompt = engine.wire.vocabulary.encode("What of <|end|>?")
        assert engine.wire.prompt(prompt) == "What of <|end|>?"  # type: ignore[arg-type]
        running = driver.submit(prompt, SamplingParams(temperature=0, max_tokens=50), positions="serial")
        run(driver)
    assert (running.transcript.text, running.transcript.finish_reason) == ("Yes.", "stop")
    assert running.transcript.tokens == 3


# ------------------------------------------------------------------------------ text

XML = (
    'Two:\n<promise topic="a" tokens="20"/><async>1. A\n</async><promise topic="b" tokens="20"/><async>2. B\n</async>'
    "<sync/>Done."
)
STRETCHES = (
    ("Q: ", 'Two:\n<promise topic="a" tokens="20"/><promise topic="b" tokens="20"/><sync/>and more'),
    ('Q: Two:\n<promise topic="a" tokens="20"/><async>', "1. A\n</async> and more"),
    ('Q: Two:\n<promise topic="a" tokens="20"/><promise topic="b" tokens="20"/><async>', "2. B\n"),
    ("Q: " + XML.removesuffix("Done."), "Done."),
)
"""What a model that writes the XML is sent, and how it goes on. The second chunk ends with the text, not by its tag."""


def writes_xml(rng: random.Random, asked: list[str]) -> Callable[[dict[str, Any]], Reply | Parts]:
    def answer(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return 200, {}, text_chunk("a", "length")
        asked.append(body["prompt"])
        told = [(p, r) for p, r in STRETCHES if (p + r).startswith(body["prompt"]) and len(body["prompt"]) >= len(p)]
        return cut(told[-1][0] + told[-1][1], len(body["prompt"])) if told else refusal(400, body["prompt"])

    def cut(text: str, at: int) -> Parts:
        while at < len(text):
            n = rng.randint(1, 9)
            yield text_chunk(text[at : at + n])
            at += n
        yield text_chunk("", "stop")

    return answer


@settings(max_examples=10)
@given(st.integers(0, 999), st.sampled_from([VLLM, SGLANG]))
def test_a_model_that_writes_xml(seed: int, kind: dict[str, Any]) -> None:
    asked: list[str] = []
    with engine_over(writes_xml(random.Random(seed), asked), kind, vocabulary=None) as engine:
        driver = Driver(engine, engine.wire.vocabulary, limits=ROOM)
        prompt = engine.wire.vocabulary.encode("Q: ")
        params = SamplingParams(temperature=0, max_tokens=500)
        running = driver.submit(prompt, params, positions="serial")
        run(driver)
    assert running.transcript.why == ""
    assert running.transcript.annotated == XML
    assert running.transcript.threads[(1,)].reason == "stop"


@given(st.lists(st.sampled_from([*TAG_TOKENS.values(), "<|", "|>", "12", "7", "a ", "é", "<promise", '"/><', ""])))
def test_pieces_keep_the_text(parts: list[str]) -> None:
    for prepared in (True, False):
        pieces, text = Pieces(prepared=prepared), "".join(parts)
        for ids in (pieces.read(text), pieces.encode(text)):
            assert pieces.text(ids) == text
        assert pieces.vocabulary.text(pieces.encode(text)) == text
        tags = set(pieces.vocabulary.tags or ())
        assert tags.isdisjoint(pieces.encode(text)), "what a user types is no tag"
        parted = [pieces.text([i]) for i in pieces.read(text)]
        assert prepared or all(">" not in part[:-1] for part in parted), "nothing stands behind a tag in its piece"
        spelled = sum(text.count(t) for t in TAG_TOKENS.values()) if prepared else 0
        assert sum(token in tags for token in pieces.read(text)) == spelled
    pieces = Pieces(prepared=True, ends=["<|"])
    assert pieces.read("a<|b1") == [pieces.encode("a")[0], pieces.EOS, *pieces.encode("b1")]
    assert pieces.encode("120") == [pieces.encode(digit)[0] for digit in "120"]


@given(st.text(st.characters(exclude_categories=()), max_size=40), st.booleans())
def test_pieces_keep_any_text_a_json_body_can_hold(text: str, prepared: bool) -> None:
    pieces = Pieces(prepared=prepared)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert pieces.text(pieces.encode(text)) == pieces.vocabulary.text(pieces.encode(text)) == whole
    assert pieces.text(pieces.read(text)) == whole


def test_pieces_are_nobodys_table() -> None:
    """A piece means the same to every thread and to another server's engine, and none is kept."""
    pieces, texts = Pieces(prepared=True), [f"{i} of {i * 7919 % 1009} words" for i in range(2000)]
    mixed: list[str] = []

    def encode(texts: list[str]) -> None:
        mixed.extend(text for text in texts for _ in range(5) if pieces.text(pieces.encode(text)) != text)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=encode, args=(texts[::step],)) for step in (1, -1, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not mixed
    assert [pieces.encode(t) for t in texts] == [Pieces(prepared=True).encode(t) for t in texts]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for text in texts:
        pieces.read(f"{text} of its own")
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 50_000


@pytest.mark.parametrize("text", ["word " * 200_000, "<" * 1_000_000, "a>" * 500_000, "<|promise" * 100_000])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_long_text_is_cut_into_pieces_in_one_pass(text: str, prepared: bool) -> None:
    """A body of 1 MB: where a pass over what is left were made for each piece, this would take minutes."""
    pieces = Pieces(prepared=prepared)
    assert pieces.text(pieces.read(text)) == pieces.text(pieces.encode(text)) == text


def test_the_longest_piece_is_a_number_that_a_trace_can_hold() -> None:
    pieces = Pieces()
    for token in pieces.encode("\U0010ffff" * 1000):
        assert from_json(to_json(Decoded(path=(), token=token))) == Decoded(path=(), token=token)
        assert json.loads(json.dumps(token)) == token


# ------------------------------------------------------------------------------ the whole way, and a real server


def test_the_command_over_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """generate, raw and taught, chat, and what goes wrong: the answer on stdout, one line on stderr."""
    from typer.testing import CliRunner

    from pastalm.cli import app

    asked: list[str] = []
    answer = writes_xml(random.Random(0), asked)
    with streaming(answer, [VLLM]) as url:

        def command(*words: str, stdin: str | None = None) -> Any:
            return CliRunner().invoke(app, [*words, "--base-url", url, "--model", "m"], input=stdin)

        monkeypatch.setattr("pastalm.models.loading.load_tokenizer", no_tokenizer)
        done = command("generate", "--raw", "Q: ", "--json")
        assert json.loads(done.stdout)["annotated"] == XML
        assert done.exit_code == 0
        assert asked[0] == "Q: "
        done = command("generate", "Q: ")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "no chat template" in done.stderr
        done = command("generate", "--raw", "unknown", "--sequential")
        assert done.exit_code == 1
        assert "a part of the answer is missing" in done.stderr
        done = command("generate", "x", "--dtype", "float32")
        assert "leave out --adapter, --dtype" in done.stderr
    done = CliRunner().invoke(app, ["generate", "x", "--prompted"])
    assert (done.exit_code, "go with --base-url" in done.stderr) == (2, True)
    done = CliRunner().invoke(app, ["generate", "x", "--base-url", url, "--model", "m"])
    assert done.exit_code == 1
    assert f"cannot reach {url}" in done.stderr


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes in GPT-2's alphabet are tokens 0..255, then the end, the six tags and one pair, which no letters are."""
    specials = ["<|end|>", *TAG_TOKENS.values()]
    words = {word: i for i, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *specials])}
    inner = Inner(models.BPE(vocab=words | {"[1": 263}, merges=[("[", "1")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in specials])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return made


def no_tokenizer(name: str, *, prompted: bool = False) -> Loaded:
    raise ModelError("none here")


def test_a_model_that_was_not_finetuned_is_taught_unless_it_is_to_write_sequentially(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = tokenizer()
    plain = replace(vocabulary_of(words, eos={256}, size=300), tags=None)
    made = Loaded("m", None, words, plain, False, None, 4096, TEACHING)
    monkeypatch.setattr("pastalm.models.loading.load_tokenizer", lambda name, *, prompted: made)
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> Reply | Parts:
        asked.append(body)
        return iter_of(text_chunk("Yes.", "stop")) if body.get("stream") else (200, {}, text_chunk("a", "length"))

    question = [{"role": "user", "content": "Is a tag <|end|> or <promise/>?"}]
    with streaming(answer, [VLLM]) as url:
        llm = LLM.remote(url, prompted=True, retries=0)
        for parallelism in (1.0, 0.0):
            out = llm.chat(question, SamplingParams(max_tokens=50, temperature=0, parallelism=parallelism))
            assert out[0].outputs[0].text == "Yes."
    taught, sequential = (body["prompt"] for body in asked[-2:])
    assert TEACHING in taught
    assert "promise topic" not in sequential
    assert sequential == "user: Is a tag <|end|> or <promise/>?\nassistant:"


REAL = ("--interrupt_requests", "false", "--type_k", "0", "--type_v", "0", "--flash_attn", "false")
"""It decodes one request after another, whole, with a cache in float32."""


class Shared:
    """The tiny model behind a real server: tags of the XML are tokens of its own, favoured by a bias."""

    xml = ('<promise topic="a" tokens="20"/>', '<promise topic="b" tokens="10"/>', "<sync/>", "</async>", "<async>")
    first = 264

    @classmethod
    def bias(cls) -> dict[int, float]:
        """Printable letters only, so that text is tokens; tags are likely; the end is not."""
        letters = {i for i, w in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())) if w.isascii() and w.isalpha()}
        banned = {i: -100.0 for i in range(300) if i not in letters}
        likely = dict(zip(range(cls.first, cls.first + 4), (5.0, 5.0, 6.0, 5.0), strict=True))
        return banned | likely


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Any]]:
    """URL, model and tokenizer of a llama.cpp server of a tiny random model in float32."""
    pytest.importorskip("llama_cpp")
    for needed in ("uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
        pytest.importorskip(needed)
    from pastalm.models import gguf_files
    from tests.laws.tiny import tiny_model

    words = tokenizer()
    words.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in Shared.xml])
    assert words.convert_tokens_to_ids(Shared.xml[0]) == Shared.first
    model = tiny_model("llama", dtype=torch.float32, layers=3)
    vocabulary = vocabulary_of(words, eos={256}, size=300)
    path = tmp_path_factory.mktemp("served") / "tiny.gguf"
    gguf_files.export(Loaded("tiny", model, words, vocabulary, True, None, 4096), path, "F32")
    with llama_cpp_server(path, context=1024, options=REAL) as url:
        yield url, model, words


def test_a_real_server_writes_what_the_model_says(real: tuple[str, Any, Any]) -> None:
    """Greedy, by replay: each token of each stretch has, in one plain forward pass over its row, the largest logit
    or one within 1e-2 of it (llama.cpp with weights in float32)."""
    url, model, words = real
    bias = Shared.bias()
    added = torch.tensor([bias.get(i, 0.0) for i in range(300)])
    engine = connect(url, retries=1, timeout=60)
    rows: list[str] = []
    forks = joins = 0
    try:
        begun = engine.connection.open

        def spying(body: dict[str, Any], wire: Any) -> Any:
            rows.append(body["prompt"])
            return begun(body, wire)

        engine.connection.open = spying  # type: ignore[method-assign]
        driver = Driver(engine, engine.wire.vocabulary)
        for prompt in ("hello", "abc", "Zebra"):
            params = SamplingParams(temperature=0, max_tokens=250, logit_bias=bias)
            running = driver.submit(engine.wire.vocabulary.encode(prompt), params, positions="serial")
            end = time.monotonic() + 120
            while driver.running:
                driver.step()
                assert time.monotonic() < end
            transcript = running.transcript
            events = running.take()
            check_ended(running, events, 250)
            assert transcript.why == ""
            forks += len(transcript.threads) - 1
            joins += sum(isinstance(e, Joined) and len(e.children) > 1 for e in events)
            replayed = 0
            vocabulary = engine.wire.vocabulary
            for read, decoded in decoded_rows(vocabulary.encode(prompt), events):
                said = [token for token, event in decoded if event]
                context, own = (b"".join(map(vocabulary.piece, ids)).decode() for ids in (read, said))
                assert context in rows
                given, whole = words(context)["input_ids"], words(context + own)["input_ids"]
                assert whole[: len(given)] == given
                with torch.inference_mode():
                    logits = model(torch.tensor([whole])).logits[0] + added
                for i in range(len(given), len(whole)):
                    assert logits[i - 1].max() - logits[i - 1, whole[i]] < 1e-2
                    replayed += 1
            assert replayed > 20
    finally:
        engine.close()
    assert forks > 2 and joins > 0, (forks, joins)


@pytest.mark.parametrize("how", ["closed", "dropped", "dropped while it decodes"])
def test_nothing_is_left_of_a_connection(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread, loop and client end with the `LLM`, closed or only collected."""

    def no_tokenizer(*_: Any, **__: Any) -> None:
        raise ModelError("none")

    monkeypatch.setattr("pastalm.models.loading.load_tokenizer", no_tokenizer)

    def threads() -> int:
        return sum(thread.name == "pastalm-openai" for thread in threading.enumerate())

    def answer(body: dict[str, Any]) -> Reply | Parts:
        return slow() if body.get("stream") else (200, {}, text_chunk("a", "length"))

    def slow() -> Parts:
        for _ in range(100):
            yield text_chunk("a")
            time.sleep(0.05)

    before = threads()
    with streaming(answer, [VLLM]) as url:
        for _ in range(3):
            llm = LLM.remote(url, retries=0)
            connection = llm.driver.engine.connection  # type: ignore[attr-defined]
            loop, client = connection._loop, connection._client
            events = iter(llm.stream("Which?", SamplingParams(max_tokens=9)))
            next(events)
            if how == "dropped":
                events.close()
            if how == "closed":
                llm.close()
                llm.close()
            del llm, connection, events
            gc.collect()
            end = time.monotonic() + 10
            while not (loop.is_closed() and client.is_closed()) and time.monotonic() < end:
                time.sleep(0.01)
            assert loop.is_closed() and client.is_closed()
    assert threads() == before
