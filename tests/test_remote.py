"""Asking a server: every question is answered once; a run that cannot go on says why and keeps what it has."""

from __future__ import annotations

import importlib.util
import json
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from pastalm.errors import RemoteError
from pastalm.models import loading
from pastalm.records.chat_client import ChatClient, Completion, Usage
from pastalm.records.documents import parse, strip
from pastalm.train.annotate import PlainAnswer, annotate_file
from pastalm.train.annotate_remote import LanguageModel
from tests.served import Reply, completion, free_port, llama_cpp_server, replaying
from tests.train.test_annotate import read, row, write
from tests.train.test_annotate_remote import GOOD, PLAIN
from tests.train.test_structure import words


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def last(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_every_question_is_answered_once_and_several_are_under_way() -> None:
    together = threading.Barrier(4, timeout=20)

    def answer(body: dict[str, Any]) -> Reply:
        together.wait()
        return completion(last(body).upper())

    with replaying(answer) as url:
        remote: ChatClient[int] = ChatClient(url, "m", concurrency=4, usage=Usage(prices=(1e6, 2e6)))
        found = dict(remote.ask((i, asked(f"q{i}")) for i in range(12)))
    assert found == {i: Completion(f"Q{i}", "stop") for i in range(12)}
    assert (remote.usage.requests, remote.usage.tokens_in, remote.usage.tokens_out) == (12, 120, 60)
    assert remote.usage.cost == 12 * (10 + 2 * 5)


def test_busy_and_failing_servers_are_asked_again() -> None:
    turns = count()

    def answer(body: dict[str, Any]) -> Reply:
        turn = next(turns)
        if turn == 0:
            return 429, {"Retry-After": "0.01"}, {"error": {"message": "slow down"}}
        if turn == 1:
            return 503, {"Retry-After": "0.01"}, b"<html>busy</html>"
        return completion("yes")

    with replaying(answer) as url:
        remote: ChatClient[str] = ChatClient(url, "m", concurrency=1, retries=3)
        assert list(remote.ask([("a", asked("x"))])) == [("a", Completion("yes", "stop"))]
    assert next(turns) == 3


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ((400, {}, {"error": {"message": "too long"}}), "too long"),
        ((200, {}, {"choices": []}), "not an answer"),
        ((200, {}, b"{]"), "not an answer"),
    ],
)
def test_a_question_that_gets_no_answer_says_why(reply: Reply, why: str) -> None:
    with replaying(lambda body: reply if "bad" in last(body) else completion("ok")) as url:
        remote: ChatClient[str] = ChatClient(url, "m", retries=0)
        found = dict(remote.ask([("a", asked("bad")), ("b", asked("good"))]))
    assert why in found["a"].refused
    assert found["b"] == Completion("ok", "stop")


def test_a_server_that_is_down_or_refuses_the_run_is_one_clear_error() -> None:
    gone: ChatClient[str] = ChatClient(f"http://127.0.0.1:{free_port()}/v1", "m", retries=0)
    with pytest.raises(RemoteError, match="cannot reach http.*start the server"):
        list(gone.ask([("a", asked("x"))]))
    for status, said in ((401, "wrong key"), (404, "no such model")):
        with replaying(lambda _, s=status, t=said: (s, {}, {"error": {"message": t}})) as url:  # type: ignore[misc]
            remote: ChatClient[str] = ChatClient(url, "m", retries=0)
            with pytest.raises(RemoteError, match=f"answers {status}.*{said}") as caught:
                list(remote.ask([("a", asked("x"))]))
            assert "\n" not in str(caught.value)


def test_annotations_are_checked_counted_and_gone_on_with(tmp_path: Path) -> None:
    """Recorded answers, good and bad, then a server that fails in the middle of a run."""
    said = {"1": GOOD, "2": GOOD.replace("greens", "vegetables"), "3": "x</async>", "4": GOOD, "5": GOOD}
    down = threading.Event()

    def answer(body: dict[str, Any]) -> Reply:
        name = last(body).split("Tips? ")[1][0]
        if name == "5" and not down.is_set():
            return 401, {}, {"error": {"message": "key expired"}}
        return completion(said[name], "length" if name == "4" else "stop")

    rows = [row(str(i), PLAIN) | {"prompt": f"Tips? {i}"} for i in range(1, 6)]
    source, target = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    with replaying(answer) as url:
        remote: ChatClient[PlainAnswer] = ChatClient(url, "m", concurrency=1, retries=0)
        marks = LanguageModel(remote, words)
        with pytest.raises(RemoteError, match="key expired"):
            annotate_file(source, target, marks, words)
        assert [r["id"] for r in read(target)] == ["1"]
        down.set()
        counts = annotate_file(source, target, marks, words)
    assert counts.dropped == {"text changed": 1, "malformed tags": 1, "annotation cut off": 1}
    assert (counts.skipped, counts.written) == (1, 1)
    assert [r["id"] for r in read(target)] == ["1", "5"]
    for r in read(target):
        assert strip(parse(str(r["annotated"]))) == PLAIN
        assert r["chunks"] == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real llama.cpp server of the embedded model, in 16 bits: its kernels for AMX, which a build that is not ours
    may have, crash on fewer."""
    pytest.importorskip("llama_cpp")
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("sse_starlette") is None:
        pytest.skip("llama-cpp-python[server] is not installed")
    from pastalm.models import gguf_files

    path = tmp_path_factory.mktemp("server") / "model.gguf"
    gguf_files.export(loading.load(adapter=None, dtype="float32"), path, "F16")
    with llama_cpp_server(path) as url:
        yield url


def test_a_real_server_is_asked(server: str, tmp_path: Path) -> None:
    """What so small a model writes is no annotation; that it is dropped, counted and paid for is what is seen."""
    source = write(tmp_path / "in.jsonl", row("a", "Sleep well."), row("b", PLAIN))
    remote: ChatClient[PlainAnswer] = ChatClient(
        server, "any", concurrency=2, options={"temperature": 0, "max_tokens": 48}, usage=Usage(prices=(1, 1))
    )
    counts = annotate_file(source, tmp_path / "out.jsonl", LanguageModel(remote, words), words)
    assert counts.read == 2
    assert counts.written + sum(counts.dropped.values()) == 2
    assert remote.usage.requests == 2
    assert remote.usage.tokens_in > 2000, "the description and seven examples"
    assert 0 < remote.usage.tokens_out <= 96
    assert remote.usage.cost > 0
    assert json.dumps(read(tmp_path / "out.jsonl")) is not None
