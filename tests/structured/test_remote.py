"""Structured answers over a completions server: every one is whole and valid, whatever the server says or refuses."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

pytest.importorskip("openai")

from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm import LLM, SamplingParams
from pastalm.core.driver import Driver, Response
from pastalm.core.events import Decoded, Forked, Joined
from pastalm.engines.completions.discovery import connect
from pastalm.engines.completions.engine import OpenAIEngine
from pastalm.engines.completions.serial import SerialLayout
from pastalm.engines.scripted import byte_vocabulary
from pastalm.errors import ModelError, RequestError
from pastalm.models import loading
from pastalm.structured.structures import Structures
from tests.engines.test_openai import SGLANG, VLLM, ids_chunk, iter_of, refusal, text_chunk
from tests.served import Parts, Reply, llama_cpp_server, streaming
from tests.server.serving import serving
from tests.structured.examples import fields
from tests.structured.test_structured import NESTED, TEXT, TOOLS, rows, valid

OTHER = {"id": "m", "object": "model", "owned_by": "someone"}
LLAMA = VLLM | {"owned_by": "llamacpp"}
PROMPT = "Give data: "
BYTES = byte_vocabulary()
Answer = Callable[[dict[str, Any]], Reply | Parts]


@contextmanager
def driver_over(answer: Answer, model: dict[str, Any], vocabulary: Any = None, **options: Any) -> Iterator[Driver]:
    """A driver over a server that answers as told."""

    def told(body: dict[str, Any]) -> Reply | Parts:
        if not body.get("stream"):
            return 200, {}, ids_chunk([65], "length") if vocabulary else text_chunk("a", "length")
        return answer(body)

    with streaming(told, [model]) as url:
        options = {"retries": 1, "timeout": 5.0, "backoff": 0.0} | options
        engine = connect(url, vocabulary=lambda _: vocabulary, **options)
        driver = over(engine)
        try:
            yield driver
        finally:
            driver.close()


def over(engine: OpenAIEngine) -> Driver:
    offers = engine.capabilities
    structure = Structures(engine.wire.vocabulary, offers.positions, masks=False, guides=offers.guides)
    return Driver(engine, engine.wire.vocabulary, structure=structure)


def ask(driver: Driver, schema: Any, **params: Any) -> Response:
    settings = {"temperature": 1.0, "max_tokens": 300, "seed": 1} | params
    prompt = driver.vocabulary.encode(PROMPT)
    return driver.submit(prompt, SamplingParams(schema=schema, **settings), positions="serial")


def run(driver: Driver, *responses: Response, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not all(response.finished for response in responses):
        driver.step()
        assert time.monotonic() < end, "the engine hangs"
    assert not driver.engine.has_unfinished()


# ------------------------------------------------------------------------------ what a server is asked


def test_a_field_sees_the_fields_that_it_waits_for() -> None:
    layout, a, b = SerialLayout([1]), (0,), (1,)
    for event in (
        Forked(path=(), forced=(2,)),
        Forked(path=a, forced=(3,)),
        Forked(path=b),
        Decoded(path=a, token=4, forced=(5,)),
        Joined(path=b, children=(a,), forced=(6,)),
        Decoded(path=b, token=7),
    ):
        layout.apply(event)
    assert layout.row(b) == [1, 2, 3, 4, 5, 6, 7]
    assert layout.row(()) == [1, 2]


VALUES = {"name": '"Anna"', "age": "34", "color": '"green"', "note": '"fine"'}
SCHEMA = fields(
    name={"type": "string"},
    age={"type": "integer"},
    color={"enum": ["red", "green"]},
    note={"type": "string", "x-depends-on": ["name", "age"]},
)
WANTED = {"name": "Anna", "age": 34, "color": "green", "note": "fine"}


def key_of(body: dict[str, Any]) -> tuple[str, str]:
    """The field that a prompt asks for, and what it has of its value."""
    prompt = body["prompt"] if isinstance(body["prompt"], str) else BYTES.text(body["prompt"])
    name = max(VALUES, key=lambda name: prompt.rfind(f'{name}":'))
    return name, prompt.rpartition(f'{name}":')[2].strip()


REGEX = {
    "name": r'([^"\\\r\n\t]|\\["\\/bfnrt])*",',
    "age": " ?-?(0|[1-9][0-9]{0,15}),",
    "color": '(red"|green"),',
    "note": r'([^"\\\r\n\t]|\\["\\/bfnrt])*",',
}
FORMS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "vllm": (VLLM, lambda body: body.get("structured_outputs")),
    "sglang": (SGLANG, lambda body: {"regex": body["regex"]} if "regex" in body else None),
    "llamacpp": (LLAMA, lambda body: {"json": body["json_schema"]} if "json_schema" in body else None),
    "ours": (VLLM | {"owned_by": "pastalm"}, lambda body: body.get("structured_outputs")),
}


@pytest.mark.parametrize("server", FORMS)
def test_each_field_is_a_completion_that_the_server_holds_to_its_form(server: str) -> None:
    """By a regular expression of the rest where it takes one; else by a schema, but for plain texts and numbers."""
    asked: list[dict[str, Any]] = []
    model, guide_in = FORMS[server]

    def answer(body: dict[str, Any]) -> Parts:
        asked.append(body)
        name, begun = key_of(body)
        return iter_of(text_chunk(VALUES[name].removeprefix(begun) + ","), text_chunk("", "stop"))

    with driver_over(answer, model) as driver:
        response = ask(driver, SCHEMA)
        run(driver, response)
    assert json.loads(response.transcript.text) == WANTED
    assert response.transcript.finish_reason == "stop"
    assert len(asked) == 4
    (note,) = [body["prompt"] for body in asked if key_of(body)[0] == "note"]
    assert note.replace(" ", "").endswith('{"name":"Anna","age":34,"note":"')
    given = {key_of(body)[0]: guide_in(body) for body in asked}
    if server in ("vllm", "sglang"):
        assert given == {name: {"regex": regex} for name, regex in REGEX.items()}
    else:
        assert given == dict.fromkeys(REGEX) | {"color": {"json": {"enum": ["red", "green"]}}}


def test_a_server_that_cannot_hold_a_schema_is_asked_without_it() -> None:
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> Reply | Parts:
        asked.append(body)
        if "structured_outputs" in body:
            return refusal(400, "unsupported schema")
        name, begun = key_of(body)
        return iter_of(text_chunk(VALUES[name].removeprefix(begun)), text_chunk("", "stop"))

    with driver_over(answer, VLLM) as driver:
        response = ask(driver, SCHEMA)
        run(driver, response)
    assert json.loads(response.transcript.text) == WANTED
    assert sum("structured_outputs" in body for body in asked) == 4


BEYOND = ['", "age": 34, "x', '"}\n', '",', '" and so on', '"', '"\n']


@pytest.mark.parametrize("beyond", BEYOND)
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_what_stands_behind_a_value_is_left_out(beyond: str, kind: str) -> None:
    """A server without guided decoding writes on: the rest of the object, or more."""

    def answer(body: dict[str, Any]) -> Parts:
        name, begun = key_of(body)
        rest = VALUES[name].removeprefix(begun).removesuffix('"')
        said = rest + (beyond if '"' in VALUES[name] else beyond.removeprefix('"') or "\n")
        if kind == "text":
            return iter_of(text_chunk(said[:2]), text_chunk(said[2:]), text_chunk("more of it"), text_chunk("", "stop"))
        return iter_of(ids_chunk(list(said.encode())), ids_chunk(list(b"more")), ids_chunk([], "stop"))

    with driver_over(answer, OTHER, BYTES if kind == "ids" else None) as driver:
        response = ask(driver, SCHEMA)
        run(driver, response)
    assert json.loads(response.transcript.text) == WANTED
    assert response.transcript.finish_reason == "stop"


def test_what_does_not_fit_is_asked_for_again_then_led_out() -> None:
    seeds: list[tuple[int, float]] = []

    def answer(body: dict[str, Any]) -> Parts:
        name, _ = key_of(body)
        if name != "color":
            return iter_of(text_chunk("1, " if name == "age" else 'x", '))
        seeds.append((body.get("seed", -1), body["temperature"]))
        return iter_of(text_chunk("purple" if len(seeds) < least else 'green"'), text_chunk("", "stop"))

    schema = fields(color={"enum": ["red", "green"]}, age={"type": "integer"}, name={"type": "string"})
    least = 0
    for least, color, reason in ((3, "green", "stop"), (1000, None, "length")):  # noqa: B007
        seeds.clear()
        with driver_over(answer, OTHER) as driver:
            response = ask(driver, schema, temperature=0)
            run(driver, response)
        found = json.loads(response.transcript.text)
        assert found["color"] == color or color is None and found["color"] in ("red", "green")
        assert found["age"] == 1 and found["name"] == "x"
        assert response.transcript.threads[(0,)].reason == reason
        assert len({seed for seed, _ in seeds}) == len(seeds) <= 5
        assert seeds[0][1] == 0 and all(temperature > 0 for _, temperature in seeds[1:])


def test_a_field_that_is_lost_leaves_whole_json_and_says_so() -> None:
    def answer(body: dict[str, Any]) -> Reply | Parts:
        name, begun = key_of(body)
        if name == "age":
            return refusal(400, "too long")
        return iter_of(text_chunk(VALUES[name].removeprefix(begun)), text_chunk("", "stop"))

    with driver_over(answer, VLLM) as driver:
        response = ask(driver, SCHEMA)
        run(driver, response)
    assert valid(SCHEMA, response.transcript.text)
    assert json.loads(response.transcript.text)["name"] == "Anna"
    assert response.transcript.threads[(1,)].reason == "abort"
    assert "too long" in response.transcript.why


SCHEMAS = [row["schema"] for row in rows("schemas.jsonl")[1::9]] + [
    row["schema"] for row in rows("functions.jsonl")[::7]
]
SAID = [
    '"',
    "a",
    "0",
    "12",
    "{",
    "}",
    "[",
    "]",
    ", ",
    ": ",
    '": "',
    '", "',
    "null",
    "true",
    " ",
    "\n",
    "\\",
    "é",
    "-",
    "red",
]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(SCHEMAS),
    st.sampled_from([VLLM, SGLANG, OTHER]),
    st.booleans(),
    st.integers(20, 200),
)
def test_any_text_leaves_valid_json_within_the_budget(
    seed: int, schema: Any, model: dict[str, Any], parallel: bool, budget: int
) -> None:
    """Chunks of anything, ends anywhere, refusals, streams that break off."""

    def answer(body: dict[str, Any]) -> Reply | Parts:
        rng = random.Random(f"{seed}/{body['prompt']}/{body.get('seed')}")
        if rng.random() < 0.1:
            return refusal(rng.choice([400, 429, 500]), **{"Retry-After": "0.01"})
        said = [text_chunk("".join(rng.choices(SAID, k=rng.choice((1, 1, 3))))) for _ in range(rng.randint(0, 12))]
        return iter_of(*said, *rng.choice([[text_chunk("", "stop")], [text_chunk("", "length")], [None]]))

    with driver_over(answer, model) as driver:
        try:
            response = ask(driver, schema, seed=seed, parallelism=float(parallel), max_tokens=budget)
        except RequestError as error:
            assert "is too few" in str(error)
            return
        run(driver, response)
    assert valid(schema, response.transcript.text), response.transcript.text
    assert response.transcript.tokens <= budget


@pytest.mark.parametrize("choice", ["required", "first", "auto"])
def test_a_tool_is_called(choice: str) -> None:
    parts = {"name": '"first"', "a": '"x"', "n": "7"}

    def answer(body: dict[str, Any]) -> Parts:
        prompt = body["prompt"]
        if prompt == PROMPT:
            return iter_of(text_chunk("<tool_call>"), text_chunk("\nmore"), text_chunk("", "stop"))
        name = max(parts, key=lambda name: prompt.rfind(f'{name}":'))
        begun = prompt.rpartition(f'{name}":')[2].strip()
        return iter_of(text_chunk(parts[name].removeprefix(begun)), text_chunk("", "stop"))

    with driver_over(answer, VLLM) as driver:
        params = SamplingParams(tools=TOOLS, tool_choice=choice, max_tokens=200, temperature=0)
        response = driver.submit(driver.vocabulary.encode(PROMPT), params, positions="serial")
        run(driver, response)
    text = response.transcript.text
    assert text.startswith("<tool_call>") == (choice == "auto")
    call = json.loads(text.replace("<tool_call>", "").replace("</tool_call>", ""))
    assert call == {"name": "first", "arguments": {"a": "x", "n": 7}}


# ------------------------------------------------------------------------------ real servers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A llama.cpp server of the embedded model, in 16 bits; it has no guided decoding by schema."""
    pytest.importorskip("llama_cpp")
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("sse_starlette") is None:
        pytest.skip("llama-cpp-python[server] is not installed")
    from pastalm.models import gguf_files

    path = tmp_path_factory.mktemp("structured") / "model.gguf"
    gguf_files.export(loading.load(adapter=None, dtype="float32"), path, "F16")
    with llama_cpp_server(path, options=("--interrupt_requests", "false")) as url:
        yield url


def remote(url: str, monkeypatch: pytest.MonkeyPatch) -> LLM:
    def no_tokenizer(name: str, *, prompted: bool = False) -> Any:
        raise ModelError("none here")

    monkeypatch.setattr("pastalm.models.loading.load_tokenizer", no_tokenizer)
    return LLM.remote(url, timeout=120)


ANNA = "The name is Anna. The age is 34. The color is green. The name, the age and the color as JSON: "
DATA = fields(
    name=TEXT, color={"enum": ["red", "green", "blue"]}, age={"type": "integer", "minimum": 0, "maximum": 120}
)


def test_a_server_without_guided_decoding_is_checked(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with remote(llama, monkeypatch) as llm:
        out = llm.generate(ANNA, SamplingParams(schema=DATA, temperature=0, max_tokens=120))
        assert json.loads(out[0].outputs[0].text) == {"name": "Anna", "color": "green", "age": 34}
        schema = fields(
            when={"type": "string", "format": "date"}, ok={"type": "boolean"}, tags=NESTED["properties"]["tags"]
        )
        out = llm.generate("List:", SamplingParams(schema=schema, temperature=1, seed=3, max_tokens=120))
        assert valid(schema, out[0].outputs[0].text)


def test_our_own_server_holds_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(serving(stack.enter_context(LLM(adapter=None, max_num_seqs=16))))
        llm = stack.enter_context(remote(f"{served.url}/v1", monkeypatch))
        assert llm.driver.engine.capabilities.guides
        out = llm.generate(ANNA, SamplingParams(schema=DATA, temperature=0, max_tokens=120))
        assert json.loads(out[0].outputs[0].text) == {"name": "Anna", "color": "green", "age": 34}
        every = [*SCHEMAS[::9], NESTED]
        params = [SamplingParams(schema=s, temperature=1, seed=i, max_tokens=150) for i, s in enumerate(every)]
        answers = [llm.submit("Make something up: ", one) for one in params]
        assert len(answers) >= 4
        llm.driver.run(answers)
        for schema, answer in zip(every, answers, strict=True):
            assert valid(schema, answer.transcript.text), answer.transcript.text
        again = llm.submit("Make something up: ", params[-1])
        llm.driver.run([again])
        assert again.transcript.text == answers[-1].transcript.text
        eight = [llm.submit(ANNA, SamplingParams(schema=DATA, seed=i, max_tokens=120)) for i in range(8)]
        llm.driver.run(eight)
        assert all(valid(DATA, one.transcript.text) for one in eight)
