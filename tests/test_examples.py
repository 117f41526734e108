"""The programs in examples/ run, each as its docstring says, and print what they promise."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from pastalm.errors import ModelError
from pastalm.models import checkpoints, downloads
from tests.served import Parts, Reply, free_port, streaming
from tests.test_models import byte_level, small_model

EXAMPLES = Path(__file__).parents[1] / "examples"
PASTA = str(Path(sys.executable).with_name("pasta"))
TRACE = Path(__file__).parent / "data" / "trace.jsonl"


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments, in a folder of its own; what it wrote to stdout and stderr. In this process, so
    that libraries are imported once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def go(name: str, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return tuple(capfd.readouterr())

    return go


@pytest.fixture(scope="module")
def embedded() -> None:
    try:
        downloads.pull()
    except ModelError as error:
        pytest.skip(f"the embedded model cannot be fetched here: {error}")


@pytest.fixture(scope="module")
def served(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of `pasta serve` with the embedded model."""
    pytest.importorskip("uvicorn")
    port = free_port()
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as file:
        process = subprocess.Popen([PASTA, "serve", "--port", str(port)], stdout=file, stderr=file)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, TimeoutError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_every_example_is_tested_and_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = set(Path(__file__).read_text().split('run("')[1:])
    assert names == {rest.partition('"')[0] for rest in tested if rest[0].isalpha()}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in names)


def test_the_library(run: Run, embedded: None) -> None:
    stdout, stderr = run("library", "Give me two tips for staying healthy.")
    answer, *replies = stdout.rsplit("\n- ", 3)
    assert len(answer) > 40 and len(replies) == 3 and all(replies)
    tokens, threads, steps = [int(word) for word in stderr.splitlines()[-1].split() if word.isdigit()]
    assert threads > 1 and steps < tokens


def test_the_readmes_program(embedded: None, capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program, {})
    printed = capsys.readouterr().out
    assert " forked " in printed and float(printed.split()[-1]) > 1


def test_the_openai_client(run: Run, served: str) -> None:
    stdout, stderr = run("openai_client", "Give me two tips for staying healthy.", "--base-url", served)
    assert len(stdout) > 40
    assert "'fork_odds': 1.0" in stderr and "'threads': " in stderr


def test_an_adapter_of_ones_own(run: Run, tmp_path: Path) -> None:
    """On a small random model, which learns nothing in a step: that it is annotated, trained and loaded."""
    tokenizer = byte_level()
    checkpoints.save(small_model(len(tokenizer)), tokenizer, tmp_path / "base")
    tips = "".join(f"{i}. **{word}**: do it every day, and do it well.\n" for i, word in enumerate("abc", 1))
    responses = [tips, "Sleep well, and eat well."] * 15
    rows = [{"id": str(i), "prompt": f"Tips, {i}?", "response": text} for i, text in enumerate(responses)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stdout, stderr = run("own_adapter", "answers.jsonl", "out", "Tips?", "--model", tmp_path / "base")
    assert "chunks, parallelism" in stdout
    assert "<async>" in (tmp_path / "out" / "annotated.jsonl").read_text()
    assert (tmp_path / "out" / "run" / "adapter" / "adapter_model.safetensors").is_file()


def said(text: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    return {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}


def two_tips(body: dict[str, Any]) -> Reply | Parts:
    """A server of text whose model writes two tips at the same time."""
    if not body.get("stream"):
        return 200, {}, said("a")
    prompt: str = body["prompt"]
    topic = prompt.rpartition('topic="')[2].partition('"')[0]
    promises = "".join(f'<promise topic="{t}" tokens="20"/>' for t in ("sleep", "food"))
    ends = {"<async>": f"About {topic}.\n</async>", "<sync/>": "That is all."}
    text = next((text for end, text in ends.items() if prompt.endswith(end)), f"Two tips.\n{promises}<sync/>")
    end = said("")
    end["choices"][0]["finish_reason"] = "stop"
    return iter([said(text), end])


def test_a_server_of_completions(run: Run, embedded: None) -> None:
    with streaming(two_tips, [{"id": "m", "object": "model", "owned_by": "vllm"}]) as url:
        words = ("--tokenizer", "smollm2-135m-instruct", "--prompted")
        stdout, stderr = run("remote_vllm", "Two tips?", "--base-url", url, *words)
    answer, _, threads = stdout.partition("\nmain\t")
    assert answer == "Two tips.\nAbout sleep.\nAbout food.\nThat is all."
    assert [line.split("\t")[:2] for line in threads.splitlines()[1:]] == [["0", "sleep"], ["1", "food"]]


def test_pastalms_own_server_is_one_of_completions(run: Run, served: str) -> None:
    words = ("--tokenizer", "smollm2-135m-instruct", "--prompted")
    stdout, stderr = run("remote_vllm", "Name a river.", "--base-url", served, *words)
    assert len(stdout.partition("\nmain\t")[0]) > 2


@pytest.mark.parametrize("at", [0.5, 1.0])
def test_a_trace_becomes_a_picture(run: Run, tmp_path: Path, at: float) -> None:
    run("trace_to_picture", TRACE, "picture.svg", "--at", at)
    picture = (tmp_path / "picture.svg").read_text()
    assert picture.startswith("<svg") and "parallelism" in picture
    assert "url(http" not in picture and 'url("http' not in picture
