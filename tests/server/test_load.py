"""Many clients at once, some of them rude, and an engine that fails: no answer is lost, crossed or left running.

Over a small random model in float64, where an answer does not hang on its company, and in float32 on the native engine,
where it has not been seen to: each is held against the same request alone. No test asserts speed.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest

from pastalm import LLM, EngineError, SamplingParams
from pastalm.core.events import SampledToken
from pastalm.core.params import Request as EngineRequest
from pastalm.core.transcript import Transcript
from pastalm.engines.native import library
from pastalm.engines.scripted import ScriptedEngine
from pastalm.models import checkpoints
from pastalm.records.traces import from_json
from tests.server.serving import (
    HELLO,
    TIPS,
    TIPS_TEXT,
    Raw,
    Served,
    curl,
    events_of,
    eventually,
    forking,
    joined,
    metrics,
    open_stream,
    playing,
    serving,
    tiny,
    tiny_parts,
)

BUILT = pytest.mark.skipif(bool(library.unavailable()), reason=library.unavailable())
WORDS = ["five", "tips", "for", "sleeping", "well", "and", "why", "they", "help", "naive", "cafe", "say"]

# ------------------------------------------------------------------------------ mixed load


def request_of(rng: random.Random, bias: dict[str, float]) -> dict[str, Any]:
    """A chat or completion request of random size; what it gives does not hang on the load."""
    said = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
    body: dict[str, Any] = {
        "model": "played",
        "max_tokens": rng.choice((3, 20, 60, 150)),
        "temperature": rng.choice((0, 0, 1)),
        "seed": rng.randint(0, 999),
        "n": rng.choice((1, 1, 2)),
        "stream": rng.random() < 0.5,
        "logit_bias": bias,
        "pasta": {"parallelism": rng.choice((0, 1, 1))},
    }
    if rng.random() < 0.3:
        body["stop"] = [rng.choice("aeins")]
    if rng.random() < 0.6:
        return {**body, "messages": [{"role": "user", "content": said}]}
    return {**body, "prompt": said}


def alone(llm: LLM, body: dict[str, Any]) -> list[str]:
    """What the request gives without a server and without company."""
    params = SamplingParams(
        n=body["n"],
        temperature=body["temperature"],
        seed=body["seed"],
        stop=tuple(body.get("stop", ())),
        max_tokens=body["max_tokens"],
        logit_bias={int(key): value for key, value in body["logit_bias"].items()},
        parallelism=body["pasta"]["parallelism"],
    )
    (output,) = llm.chat(body["messages"], params) if "messages" in body else llm.generate(body["prompt"], params)
    return [each.text for each in output.outputs]


def patiently(url: str, body: Any) -> Raw:
    """A request by curl; asks again when the queue is full."""
    while (reply := curl(url, body))[0] == 429:
        time.sleep(0.05)
    return reply


def asked(served: Served, body: dict[str, Any]) -> list[str]:
    """The texts that the server gives."""
    url = f"{served.url}/v1/{'chat/completions' if 'messages' in body else 'completions'}"
    status, _, got = patiently(url, body)
    assert status == 200, got
    if not body["stream"]:
        return [c["message"]["content"] if "messages" in body else c["text"] for c in got["choices"]]
    chunks = events_of(got)
    if "messages" in body:
        return [joined(chunks, i) for i in range(body["n"])]
    choices = [c for chunk in chunks for c in chunk["choices"]]
    return ["".join(c["text"] for c in choices if c["index"] == i) for i in range(body["n"])]


def leaving(served: Served, body: dict[str, Any]) -> None:
    """Reads the beginning of a long stream and leaves."""
    long = {**body, "max_tokens": 300, "n": 1, "stop": None, "logit_bias": {**body["logit_bias"], "1": -100}}
    url = f"{served.url}/v1/{'chat/completions' if 'messages' in body else 'completions'}"
    while True:
        try:
            with open_stream(url, {**long, "stream": True}) as stream:
                stream.readline()
            return
        except OSError as error:
            assert "429" in str(error)
            time.sleep(0.05)


def bad(served: Served, i: int) -> None:
    """One of some requests that are malformed or over a limit."""
    url = f"{served.url}/v1/chat/completions"
    body = {"model": "played", "messages": HELLO}
    wrong = ("{", {**body, "max_tokens": 9999}, {**body, "tools": [1]}, {**body, "messages": "x"}, "x" * 30_000)
    assert patiently(url, wrong[i % len(wrong)])[0] == (413 if i % len(wrong) == 4 else 400)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=BUILT)])
def test_many_clients_get_what_each_would_get_alone(native: bool) -> None:
    reference, rng = tiny(max_num_seqs=1, native=native), random.Random(0)
    bias = forking(reference)
    bodies = [request_of(rng, bias) for _ in range(90)]
    expected = [alone(reference, body) for body in bodies]
    assert len({text for texts in expected for text in texts}) > 60, "crossed answers would not show"
    llm = tiny(max_num_seqs=4, native=native)
    with serving(llm, max_queue=6, max_body=20_000) as served, ThreadPoolExecutor(12) as clients:
        good = {i: clients.submit(asked, served, body) for i, body in enumerate(bodies)}
        rude = [clients.submit(leaving, served, bodies[i]) for i in range(0, 90, 10)]
        rude += [clients.submit(bad, served, i) for i in range(10)]
        wrong = [i for i, future in good.items() if future.result(200) != expected[i]]
        for future in rude:
            future.result(200)
        assert wrong == []
        assert served.becomes_idle()
        metrics = served.metrics()
        assert metrics["pasta_disconnects_total"] >= 1
        assert metrics["pasta_tokens_total"] > metrics["pasta_critical_path_tokens_total"], "nothing forked"


def test_a_second_turn_feeds_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny(max_num_seqs=2)
    engine: Any = llm.driver.engine
    fed: list[int] = []
    run = engine._run

    def counted(**how: Any) -> Any:
        fed.append(0 if how.get("decoding", True) else len(how["ids"]))
        return run(**how)

    monkeypatch.setattr(engine, "_run", counted)
    with serving(llm) as served:
        ask = served.client.chat.completions.create
        told: dict[str, Any] = {"model": "played", "max_tokens": 30, "temperature": 0, "logit_bias": forking(llm)}
        first = ask(messages=HELLO, **told)
        prompt = sum(fed)
        second = ask(messages=[*HELLO, first.choices[0].message, {"role": "user", "content": "Why?"}], **told)
    assert prompt == first.usage.prompt_tokens > 20
    assert sum(fed) == second.usage.prompt_tokens, "the first prompt was fed again"


# ------------------------------------------------------------------------------ the engine's thread


class Watched(ScriptedEngine):
    """Calls `at_step` in each of its steps with how many there were."""

    steps = 0

    def at_step(self, step: int) -> None:
        """To be replaced."""

    def step(self) -> list[SampledToken]:
        sampled = super().step()
        self.steps += 1
        self.at_step(self.steps)
        return sampled


def test_a_dropped_request_is_in_no_further_step() -> None:
    llm = playing("x" * 500, engine=Watched, step_seconds=0.005)
    engine = llm.driver.engine
    assert isinstance(engine, Watched)
    inside, gone = Flag(), Flag()

    def pause(step: int) -> None:
        if step == 5:
            inside.set()
            gone.wait(20)

    engine.at_step = pause  # type: ignore[method-assign]
    with serving(llm) as served:
        stream = open_stream(f"{served.url}/v1/chat/completions", {"model": "played", "messages": HELLO})
        assert inside.wait(20)
        stream.close()
        assert eventually(lambda: served.metrics()["pasta_disconnects_total"] == 1)
        gone.set()
        assert served.becomes_idle()
        assert engine.steps == 5


@pytest.mark.parametrize("error", [EngineError("the forward pass failed"), RuntimeError("a bug")])
def test_a_failing_step_is_a_clear_error_and_the_server_goes_on(error: Exception) -> None:
    llm = playing(TIPS, engine=Watched, step_seconds=0.003)
    engine = llm.driver.engine
    assert isinstance(engine, Watched)

    def fail(step: int) -> None:
        if step % 130 == 0:
            raise error

    engine.at_step = fail  # type: ignore[method-assign]
    body = {"model": "played", "messages": HELLO, "max_tokens": 200}
    outcomes: Counter[str] = Counter()

    def client(i: int) -> str:
        status, _, reply = curl(f"{served.url}/v1/chat/completions", {**body, "stream": i % 2 == 0})
        last = events_of(reply)[-1] if i % 2 == 0 and status == 200 else reply
        if "error" in last:
            assert last["error"]["type"] == "server_error" and "the " in last["error"]["message"]
            assert "a bug" not in last["error"]["message"]
            return "error"
        text = joined(events_of(reply)) if i % 2 == 0 else reply["choices"][0]["message"]["content"]
        return "whole" if text == TIPS_TEXT else "cut"

    with serving(llm) as served, ThreadPoolExecutor(6) as clients:
        outcomes.update(clients.map(client, range(24)))
        assert set(outcomes) == {"whole", "error"}, outcomes
        assert served.becomes_idle()
        assert served.metrics()["pasta_failed_steps"] >= 1
        engine.at_step = lambda step: None  # type: ignore[method-assign]
        assert client(0) == client(1) == "whole"


def test_an_engine_that_fails_to_cancel_does_not_end_the_server() -> None:
    class Clinging(ScriptedEngine):
        cancelled = 0

        def cancel(self, request_id: str) -> None:
            super().cancel(request_id)
            self.cancelled += 1
            if self.cancelled == 1:
                raise RuntimeError("a bug")

    with serving(playing(TIPS, engine=Clinging, step_seconds=0.01)) as served:
        url, body = f"{served.url}/v1/chat/completions", {"model": "played", "messages": HELLO, "max_tokens": 200}
        with open_stream(url, body) as stream:
            stream.readline()
        assert eventually(lambda: served.metrics()["pasta_failed_steps"] == 1)
        assert curl(f"{served.url}/health")[0] == 200
        assert curl(url, body)[2]["choices"][0]["message"]["content"] == TIPS_TEXT
        assert served.becomes_idle()


def test_a_request_that_the_engine_does_not_take_fails_alone() -> None:
    class Picky(ScriptedEngine):
        def add(self, request: EngineRequest) -> None:
            if request.choice == 1:
                raise RuntimeError("out of luck")
            super().add(request)

    with serving(playing(TIPS, engine=Picky, step_seconds=0.01)) as served:
        url, body = f"{served.url}/v1/chat/completions", {"model": "played", "messages": HELLO, "max_tokens": 200}
        with open_stream(url, body) as other:
            for stream in (False, True):
                status, _, reply = curl(url, {**body, "n": 2, "stream": stream})
                assert (status, reply["error"]["code"]) == (500, "engine_error")
            assert joined(events_of(other.read().decode())) == TIPS_TEXT
        assert served.becomes_idle()


@pytest.mark.parametrize("path", [(), (0,)])
def test_a_thread_that_the_engine_loses_is_a_clear_error_for_its_client_alone(path: tuple[int, ...]) -> None:
    class Losing(ScriptedEngine):
        """Loses a thread of requests for at most 199 tokens, at its fourth token."""

        def __init__(self, *options: Any, **more: Any) -> None:
            super().__init__(*options, **more)
            self.sampled: Counter[str] = Counter()

        def step(self) -> list[SampledToken]:
            return [self._kept_or_lost(token) for token in super().step()]

        def _kept_or_lost(self, token: SampledToken) -> SampledToken:
            self.sampled[token.request_id] += token.path == path
            picked = self._playing[token.request_id].request.params.max_tokens == 199
            lost = picked and token.path == path and self.sampled[token.request_id] == 4
            return replace(token, lost="the logits processor Odd failed: KeyError: 3") if lost else token

    with serving(playing(TIPS, engine=Losing, step_seconds=0.01)) as served:
        url, body = f"{served.url}/v1/chat/completions", {"model": "played", "messages": HELLO, "max_tokens": 200}
        wanted = "a part of the answer is missing: the logits processor Odd failed: KeyError: 3"
        with open_stream(url, body) as other:
            status, _, reply = curl(url, {**body, "max_tokens": 199})
            assert (status, reply["error"]["code"], reply["error"]["message"]) == (500, "engine_error", wanted)
            _, _, reply = curl(url, {**body, "max_tokens": 199, "stream": True})
            last = events_of(reply)[-1]
            assert (last["error"]["code"], last["error"]["message"]) == ("engine_error", wanted)
            assert joined(events_of(other.read().decode())) == TIPS_TEXT
        assert served.metrics()["pasta_failed_steps"] == 0
        assert served.becomes_idle()


# ------------------------------------------------------------------------------ the command


@contextmanager
def commanded(model: Path, *options: str) -> Iterator[tuple[Any, str]]:
    """`pasta serve`, up: the process, and the URL with /v1."""
    command = [sys.executable, "-m", "pastalm.cli", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith(f"{model.name} on http://127.0.0.1:"), said
        url = said.split()[-1]
        assert eventually(lambda: _up(url))
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("number", "code", "last_words"), [(signal.SIGTERM, 0, ""), (signal.SIGINT, 130, "pasta: interrupted\n")]
)
def test_a_signal_finishes_what_runs(tmp_path: Path, number: int, code: int, last_words: str) -> None:
    model, tokenizer = tiny_parts()
    checkpoints.save(model, tokenizer, tmp_path / "played")
    bias = {"1": -100.0}
    body = {"model": "played", "messages": HELLO, "max_tokens": 250, "temperature": 0, "logit_bias": bias}
    options = ("--dtype", "float64", "--max-num-seqs", "3", "--max-model-len", "512")
    with commanded(tmp_path / "played", *options) as (process, url):
        with ThreadPoolExecutor(4) as clients:
            waiting = [clients.submit(curl, f"{url}/chat/completions", body) for _ in range(4)]

            def taken() -> bool:
                """Whether the server has all four, or has answered them."""
                there = metrics(url.removesuffix("/v1"))
                done = sum(n for key, n in there.items() if "pasta_requests_total{" in key and "completions" in key)
                return done + there["pasta_unfinished_answers"] >= 4

            assert eventually(taken, 60)
            with open_stream(f"{url}/chat/completions", body) as stream:
                first = stream.readline()
                process.send_signal(number)
                text = joined(events_of((first + stream.read()).decode()))
            replies = [future.result(100) for future in waiting]
        assert [status for status, _, _ in replies] == [200] * 4
        assert {reply["choices"][0]["message"]["content"] for _, _, reply in replies} == {text}
        assert {reply["usage"]["completion_tokens"] for _, _, reply in replies} == {250}
        assert process.wait(60) == code
        assert not _up(url)
        assert (process.stdout.read(), process.stderr.read()) == ("", last_words)


def test_a_gguf_file_is_served(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    import torch

    from pastalm.models import gguf_files
    from tests.engines.test_llama_cpp import loaded
    from tests.laws.tiny import tiny_model

    made = loaded(tiny_model("llama", dtype=torch.float32, layers=3))
    tags = made.vocabulary.tags
    assert tags is not None
    bias = {str(tags.promise): 8.0, str(tags.tokens): 8.0, str(tags.async_close): 5.0}
    body = {"model": "tiny.gguf", "messages": HELLO, "max_tokens": 200, "temperature": 0, "logit_bias": bias}
    with commanded(gguf_files.export(made, tmp_path / "tiny.gguf", "F32"), "--max-model-len", "512") as (_, url):
        status, _, whole = curl(f"{url}/chat/completions", body)
        assert status == 200 and whole["choices"][0]["message"]["content"]
        assert whole["usage"]["pasta"]["choices"][0]["threads"] > 1
        asked = {**body, "stream": True, "pasta": {"events": True}}
        chunks = events_of(curl(f"{url}/chat/completions", asked)[2])
        told = Transcript(from_json(json.dumps(e)) for c in chunks for e in c.get("pasta", {}).get("events", []))
        assert told.finished and len(told.threads) > 1
        assert joined(chunks) == told.text != ""


def _up(url: str) -> bool:
    try:
        return curl(f"{url}/models")[0] == 200
    except subprocess.CalledProcessError:
        return False
