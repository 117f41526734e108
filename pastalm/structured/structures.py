"""The answers of one model whose form is given: from sampling parameters to threads, and to words for the prompt."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pastalm.core.interpreter import Interpreter, Limits
from pastalm.core.layout import Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import RequestError, complaint
from pastalm.structured import plan
from pastalm.structured.calls import CallInterpreter
from pastalm.structured.checked import ByteGrammars, CheckedFields
from pastalm.structured.grammar import Grammars
from pastalm.structured.interpreter import FieldInterpreter, TooFewTokens
from pastalm.structured.schemas import without


class Structures:
    """Makes the interpreters of structured answers. The grammars are made when they are first needed.

    vocabulary: the model's tokens.
    positions: the policies that the engine offers.
    masks: the engine masks logits. False: what it samples is checked.
    guides: what such an engine can hold values to itself (guides.py).
    """

    def __init__(
        self, vocabulary: Vocabulary, positions: Sequence[Policy], *, masks: bool = True, guides: Collection[str] = ()
    ) -> None:
        self._vocabulary, self._positions = vocabulary, positions
        self._masks, self._guides = masks, guides
        self._grammars: Grammars | None = None

    def __call__(self, request: Request, limits: Limits) -> tuple[FieldInterpreter | CallInterpreter, Request] | None:
        """The threads of an answer, and the request with the masks of its values, or their schemas; None if its form is
        free.

        Where it is clear that the answer is JSON, positions are `overlap`: no model was taught to leave a gap for a
        field, and gaps cost right answers (docs/structured.md).

        Raises RequestError if a schema cannot be held, CapabilityError if llguidance is not installed.
        """
        params, positions = request.params, request.positions
        if problem := complaint(_checks(params)):
            raise RequestError(problem)
        if params.schema is None and not params.calls:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self._vocabulary) if self._masks else ByteGrammars(self._vocabulary)
        interpreter: FieldInterpreter | CallInterpreter
        interpreter = fields = self._fields(self._grammars, params, limits)
        if params.calls and params.tool_choice == "auto":
            text = Interpreter(self._vocabulary, params, len(request.prompt_token_ids), limits)
            interpreter = CallInterpreter(text, fields)
        else:
            positions = "overlap" if "overlap" in self._positions else positions
        if not self._masks:
            return interpreter, replace(request, positions=positions, guide=interpreter.guide)
        params = replace(params, processors=(*(params.processors or ()), interpreter))
        return interpreter, replace(request, params=params, positions=positions)

    def _fields(self, grammars: Grammars, params: SamplingParams, limits: Limits) -> FieldInterpreter:
        """The answer in threads; in one thread where it is asked for, or where max_tokens is enough for that alone."""
        parts = plan_of(replace(params, parallelism=1.0))
        if params.parallelism > 0:
            try:
                return self._threads(parts, grammars, params, limits)
            except TooFewTokens:
                pass
        return self._threads(plan_of(replace(params, parallelism=0.0)), grammars, params, limits, parts=parts)

    def _threads(
        self,
        node: plan.Node,
        grammars: Grammars,
        params: SamplingParams,
        limits: Limits,
        *,
        parts: plan.Node | None = None,
    ) -> FieldInterpreter:
        if self._masks:
            return FieldInterpreter(node, grammars, params, limits, parts=parts)
        return CheckedFields(node, grammars, params, limits, parts=parts, guides=self._guides)


def _checks(params: SamplingParams) -> Iterator[tuple[bool, str]]:
    tools, schema = params.tools or (), params.schema
    yield isinstance(schema or {}, Mapping), "schema must be a JSON Schema: an object"
    yield isinstance(params.depends or {}, Mapping), "depends must map fields to lists of fields"
    yield not params.depends or schema is not None, "depends needs a schema"
    named = isinstance(tools, list | tuple) and all(isinstance(t, Mapping) and t.get("name") for t in tools)
    yield named, "tools must be a list of objects, each with a name"
    names = [tool["name"] for tool in tools] if named else []
    yield len(set(names)) == len(names), "the names of tools must differ"
    yield schema is None or not params.calls, "give a schema or tools, not both"
    known = params.tool_choice in ("auto", "none", *names) or (params.tool_choice == "required" and bool(names))
    yield known, f"tool_choice must be auto, none, required or the name of a tool, not {params.tool_choice!r}"
    free = schema is None and not params.calls
    yield free or params.min_tokens == 0, "min_tokens does not go with a schema or tools: leave it out"
    other = free or (not params.ignore_eos and not params.stop_token_ids)
    yield other, "the schema says where an answer ends: leave out ignore_eos and stop_token_ids"


def plan_of(params: SamplingParams) -> plan.Node:
    """The plan of a schema or of tool calls; with parallelism 0 in one thread. Raises RequestError."""
    parallel = params.parallelism > 0
    if params.schema is not None:
        return plan.plan(params.schema, params.depends, parallel=parallel)
    if params.tool_choice in ("auto", "required"):
        return plan.tool_calls(params.tools or (), parallel=parallel)
    return plan.tool_calls([t for t in params.tools or () if t["name"] == params.tool_choice], parallel=parallel)


def instructions(params: SamplingParams, *, tools_rendered: bool = False) -> str | None:
    """What the system message says about the form of the answer; None if it is free.

    tools_rendered: whether the chat template names the tools itself.
    """
    if params.schema is not None:
        told = json.dumps(without(params.schema, plan.OURS))
        return f"Answer with JSON that fits this schema, and with nothing else: {told}"
    if not params.calls or tools_rendered:
        return None
    listed = "\n".join(json.dumps(_plain(tool)) for tool in params.tools or ())
    if params.tool_choice == "auto":
        how = f"If one of them helps, answer with {plan.CALL_OPEN.strip()} and a JSON object"
    else:
        how = "Call one of them: answer with a JSON object"
    return f'You have these tools:\n{listed}\n{how} with its "name" and its "arguments", and with nothing else.'


def _plain(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool without what its schema says to us."""
    parameters = without(tool.get("parameters"), plan.OURS)
    return {key: parameters if key == "parameters" else value for key, value in tool.items()}
