"""Structured answers of real engines: exact as any answer is, and JSON that validates whatever is sampled."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch

from pastalm import LLM, Limits, SamplingParams
from pastalm.core.driver import Driver, Response
from pastalm.core.events import Joined
from pastalm.engines.llama_cpp import MAX_SEQUENCES, LlamaCppEngine, LlamaCppModel
from pastalm.engines.native.engine import NativeEngine
from pastalm.engines.native.model import NativeModel
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.errors import PastaError, RequestError
from pastalm.models import gguf_files, packed_models
from pastalm.structured.grammar import Grammars
from pastalm.structured.plan import Leaf
from pastalm.structured.structures import Structures
from tests.engines.test_llama_cpp import loaded
from tests.laws.oracle import Linear, Record
from tests.laws.reference import reference_logits
from tests.laws.tiny import tiny_model, tiny_vocabulary
from tests.structured.examples import fields

HERE = Path(__file__).parent
TEXT = {"type": "string", "maxLength": 12}
EXACTLY = 1e-9
CLOSE = 1e-3
"""In float32."""


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


NESTED = fields(
    name=TEXT,
    age={"type": "integer", "minimum": 0, "maximum": 120},
    color={"enum": ["red", "green", "reddish"]},
    home=fields(city=TEXT, zip=TEXT, near={"type": "boolean"}),
    tags={"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2},
    kinds={"type": "array", "items": TEXT, "maxItems": 3, "x-count-first": True},
    where=TEXT | {"x-depends-on": ["home", "tags"]},
    summary=TEXT,
)


class Traced:
    """A driver over a tiny model, in float64 unless an engine is given, that keeps each token's logits."""

    def __init__(self, *, threads: int = 16, tags: bool = True, layers: int = 2, engine: Any = None) -> None:
        if engine is None:
            self.model = tiny_model("llama", layers=layers)
            engine = TransformersEngine(self.model, max_num_seqs=4, max_model_len=1024)
        self.engine = engine
        self.vocabulary = tiny_vocabulary(tags=tags)
        structures = Structures(self.vocabulary, self.engine.capabilities.positions)
        self.driver = Driver(self.engine, self.vocabulary, limits=Limits(max_threads=threads), structure=structures)
        self.logits: dict[tuple[str, Any, int], Any] = {}
        self.engine.on_logits = self._keep

    def _keep(self, request_id: str, path: Any, logits: Any) -> None:
        thread = self.engine._running[request_id].threads[path]
        self.logits[request_id, path, thread.count] = torch.as_tensor(logits).clone()

    def run(self, schema: Any, **params: Any) -> Response:
        settings = {"temperature": 1.0, "max_tokens": 400, "seed": 1} | params
        response = self.driver.submit(list(b"Give data: "), SamplingParams(schema=schema, **settings))
        events = list(response)
        self.events = events
        return response


def error(traced: Traced, response: Response, model: Any) -> float:
    """Largest difference of the logits of an answer from those of one masked forward pass."""
    linear = Linear(response.prompt_token_ids, Record.of(traced.events), "overlap")
    want = reference_logits(model, linear.tokens, linear.positions, linear.visible)
    assert len(traced.logits) > 20
    assert any(isinstance(event, Joined) and event.children for event in traced.events)
    return max(
        float((logits - want[linear.place[path, index - 1] if index else len(linear.prompt) - 1]).abs().max())
        for (_, path, index), logits in traced.logits.items()
    )


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_logit_is_that_of_one_masked_pass(threads: int, seed: int) -> None:
    traced = Traced(threads=threads)
    assert error(traced, traced.run(NESTED, seed=seed), traced.model) < EXACTLY


@pytest.mark.parametrize("threads", [2, 16])
def test_every_logit_of_the_native_engine_is_too(threads: int) -> None:
    reference = tiny_model("llama", dtype=torch.float32)
    with closing(NativeModel(*packed_models.from_model(reference, "F32"), threads=1)) as weights:
        engine = NativeEngine(weights, max_num_seqs=2, max_model_len=1024, cache_type="F32")
        traced = Traced(threads=threads, engine=engine)
        assert error(traced, traced.run(NESTED), reference) < CLOSE


@pytest.mark.parametrize("threads", [2, 16])
def test_every_logit_of_llama_cpp_is_too(threads: int, tmp_path: Path) -> None:
    reference = tiny_model("llama", dtype=torch.float32, layers=3)
    weights = LlamaCppModel(gguf_files.export(loaded(reference), tmp_path / "tiny.gguf", "F32"))
    exact: Any = {"cache_type": "F32", "flash_attention": False}
    with closing(weights), closing(LlamaCppEngine(weights, max_num_seqs=2, max_model_len=1024, **exact)) as engine:
        traced = Traced(threads=threads, engine=engine)
        assert error(traced, traced.run(NESTED), reference) < CLOSE
        engine.forget()
        assert len(engine._cache.free) == MAX_SEQUENCES


def test_threads_drafts_and_the_order_of_steps_do_not_change_an_answer() -> None:
    answers = {
        Traced(threads=threads).run(NESTED, drafts=drafts).transcript.text
        for threads, drafts in ((1, "off"), (2, "lookup,siblings"), (16, "off"), (16, "lookup,siblings"))
    }
    assert len(answers) == 1


def valid(schema: Any, text: str) -> bool:
    return bool(jsonschema_rs.is_valid(schema, json.loads(text)))


@pytest.mark.parametrize("parallelism", [1.0, 0.0])
def test_every_answer_of_a_random_model_validates(parallelism: float) -> None:
    """Random logits: nothing but the grammar and the budget makes it JSON."""
    traced = Traced(layers=1)
    every = [(row["name"], row["schema"]) for row in rows("schemas.jsonl")[::9]]
    every += [(row["name"], row["schema"]) for row in rows("functions.jsonl")[::16]]
    submitted = [
        traced.driver.submit(
            list(name.encode()), SamplingParams(schema=schema, max_tokens=400, seed=i, parallelism=parallelism)
        )
        for i, (name, schema) in enumerate(every)
    ]
    traced.driver.run(submitted)
    for (name, schema), response in zip(every, submitted, strict=True):
        text = response.transcript.text
        assert valid(schema, text), (name, text)
        assert response.transcript.finish_reason in ("stop", "length")
        assert response.transcript.tokens <= 400


@pytest.mark.parametrize("max_tokens", [60, 90, 150])
def test_a_budget_that_ends_early_leaves_whole_json(max_tokens: int) -> None:
    schema = fields(a={"type": "string"}, b={"type": "array", "items": {"type": "string"}}, c={"type": "object"})
    for parallelism in (1.0, 0.0):
        response = Traced().run(schema, max_tokens=max_tokens, parallelism=parallelism)
        assert valid(schema, response.transcript.text)
        assert response.transcript.tokens <= max_tokens


def test_a_budget_below_the_shortest_answer_is_refused() -> None:
    with pytest.raises(RequestError, match="max_tokens 5 is too few"):
        Traced().run(NESTED, max_tokens=5)


@pytest.mark.parametrize("row", rows("refused.jsonl"), ids=lambda row: row["name"])
def test_what_cannot_be_held_is_refused_by_name(row: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        Traced().run(row["schema"])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "schema, refused",
    [
        ({"type": "object", "properties": {f"p{i}": TEXT for i in range(1000)}}, ""),
        ({"$ref": "#/$defs/n", "$defs": {"n": fields(n={"$ref": "#/$defs/n"})}}, "cannot be held"),
        ({"type": "array", "items": TEXT, "minItems": 100_000}, "cannot be held"),
    ],
    ids=["a thousand fields", "no end", "too long"],
)
def test_a_schema_without_a_short_answer_is_refused_soon(schema: Any, refused: str) -> None:
    if not refused:
        assert valid(schema, Traced(layers=1).run(schema, max_tokens=60).transcript.text)
        return
    with pytest.raises(RequestError, match=refused):
        Traced(layers=1).run(schema)


def test_the_stream_is_the_answer_in_document_order() -> None:
    traced = Traced()
    response = traced.driver.submit(list(b"x"), SamplingParams(schema=NESTED, max_tokens=400, temperature=1, seed=5))
    pieces: list[str] = []
    for _ in response:
        pieces.append(response.transcript.certain(start=len("".join(pieces))))
    assert "".join(pieces) == response.transcript.text
    assert list(json.loads("".join(pieces))) == list(NESTED["properties"])
    assert sum(map(bool, pieces)) > 10


def test_a_field_that_may_be_left_out_is_there_or_not() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": ["x"]}}, "required": ["a"]}
    texts = {Traced().run(schema, seed=seed).transcript.text for seed in range(12)}
    assert texts == {'{"a": 1}', '{"a": 1, "b": "x"}'}


def test_other_requests_beside_it_change_nothing_and_end_as_ever() -> None:
    traced = Traced()
    alone = traced.run(NESTED, seed=9).transcript.text
    params = SamplingParams(schema=NESTED, max_tokens=400, temperature=1, seed=9)
    free = traced.driver.submit(list(b"Say"), SamplingParams(max_tokens=40, temperature=1, seed=2))
    beside = traced.driver.submit(list(b"Give data: "), params)
    traced.driver.run([free, beside])
    assert beside.transcript.text == alone and free.transcript.finished


def test_a_cancelled_answer_leaves_nothing() -> None:
    traced = Traced()
    response = traced.driver.submit(list(b"x"), SamplingParams(schema=NESTED, max_tokens=400, seed=5))
    for _ in range(3):
        traced.driver.step()
    response.cancel()
    assert response.finished and not traced.engine.has_unfinished() and not traced.driver.running


def test_stop_strings_cut_and_settings_that_contradict_a_schema_are_refused() -> None:
    with pytest.raises(PastaError, match="min_tokens"):
        Traced().run(NESTED, min_tokens=3)
    with pytest.raises(PastaError, match="schema or tools"):
        Traced().run(NESTED, tools=[{"name": "a"}])


TOOLS = [{"name": "first", "parameters": fields(a=TEXT, n={"type": "integer"})}, {"name": "second"}]


@pytest.mark.parametrize("choice", ["required", "first", "second"])
@pytest.mark.parametrize("parallelism", [1.0, 0.0])
def test_a_call_names_a_tool_and_its_arguments(choice: str, parallelism: float) -> None:
    traced = Traced()
    params = SamplingParams(tools=TOOLS, tool_choice=choice, max_tokens=300, seed=4, parallelism=parallelism)
    response = traced.driver.submit(list(b"call: "), params)
    traced.driver.run([response])
    call = json.loads(response.transcript.text)
    assert list(call) == ["name", "arguments"] and call["name"] in ("first", "second")
    assert choice in ("required", call["name"])
    assert set(call["arguments"]) >= ({"a", "n"} if call["name"] == "first" else set())


@pytest.mark.parametrize("tags", [True, False], ids=["prepared", "not prepared"])
def test_an_answer_that_begins_as_a_call_becomes_one(tags: bool) -> None:
    """The model's first tokens are put in its mouth by a bias processor; the rest is the plan's."""
    opening = list(b"<tool_call>")

    def say(visible: Any, logits: Any) -> Any:
        written = len(visible) - 4
        if 0 <= written < len(opening):
            logits[opening[written]] = 1e4
        return logits

    traced = Traced(tags=tags)
    params = SamplingParams(tools=TOOLS, max_tokens=400, seed=4, processors=[say])
    response = traced.driver.submit(list(b"ask "), params)
    traced.driver.run([response])
    text = response.transcript.text
    assert text.startswith("<tool_call>\n") and text.endswith("\n</tool_call>")
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] in ("first", "second")
    plain = traced.driver.submit(list(b"ask "), SamplingParams(tools=TOOLS, max_tokens=60, seed=4))
    traced.driver.run([plain])
    assert not plain.transcript.text.startswith("<tool_call>")


def test_a_mask_admits_what_the_grammar_has() -> None:
    vocabulary = tiny_vocabulary()
    value = Grammars(vocabulary).value(Leaf({"enum": ["ab", "ac"]}), ",")
    assert value.begin() == b'"a'
    assert np.flatnonzero(value.mask()).tolist() == [ord("b"), ord("c")]
    assert value.write(ord("b")) and value.certain() == list(b'",') and value.ended
    assert value.text == b'"ab"'


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(adapter=None, max_num_seqs=8) as llm:
        yield llm


@pytest.mark.parametrize("parallelism", [1.0, 0.0])
def test_the_embedded_model_writes_what_validates(llm: LLM, parallelism: float) -> None:
    every = [row["schema"] for row in rows("schemas.jsonl")[3::40]] + [NESTED]
    every += [row["schema"] for row in rows("functions.jsonl")[2::25]]
    conversations = [[{"role": "user", "content": "Make something up."}] for _ in every]
    submitted = [
        llm.submit(conversation, SamplingParams(schema=schema, max_tokens=200, seed=i, parallelism=parallelism))
        for i, (conversation, schema) in enumerate(zip(conversations, every, strict=True))
    ]
    llm.driver.run(submitted)
    for schema, response in zip(every, submitted, strict=True):
        assert valid(schema, response.transcript.text), response.transcript.text


def test_values_are_read_from_the_prompt(llm: LLM) -> None:
    schema = fields(name={"type": "string"}, color={"enum": ["red", "green", "blue"]}, age={"type": "integer"})
    asked = [{"role": "user", "content": "Extract the data. Anna is 34 years old. Her favourite color is green."}]
    text = llm.chat(asked, SamplingParams(schema=schema, temperature=0, max_tokens=200))[0].outputs[0].text
    assert json.loads(text) == {"name": "Anna", "color": "green", "age": 34}
