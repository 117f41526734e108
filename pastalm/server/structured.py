"""What a request asks of its answer's form: `response_format`, `structured_outputs`, `tools`, `tool_choice`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, Field, model_validator

from pastalm.server.errors import BadValue
from pastalm.server.messages import Checked, Object, Text

DEEPEST, MOST_VALUES, MOST_CHARACTERS = 64, 5_000, 120_000
"""Of a schema: levels, values of any kind, and characters of all names and texts together."""
MOST_EXPANDED = 20_000
"""Values of a schema once its references are followed and the least lengths of its arrays and texts are written out: so
much is there to be decoded at least."""
DEEPEST_FOLLOWED = 200
"""Levels of a schema once its references are followed."""
MOST_TOOLS = 128
ANY_OBJECT: Object = {"type": "object"}
NO_ARGUMENTS: Object = {"type": "object", "properties": {}, "additionalProperties": False}


def _values(value: Any, depth: int = 1) -> Iterator[str | None]:
    """The text of each value and each name of a schema. Raises ValueError if it is not JSON, or is too deep."""
    if depth > DEEPEST:
        raise ValueError(f"the schema is nested more than {DEEPEST} levels deep: make it flatter")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the schema contains {value}, which is not JSON")
    yield value if isinstance(value, str) else None
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values(item, depth + 1)


def _within_bounds(schema: Object) -> Object:
    count = characters = 0
    for text in _values(schema):
        count, characters = count + 1, characters + len(text or "")
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("half a character (a lone surrogate) is no text")
        if count > MOST_VALUES or characters > MOST_CHARACTERS:
            most = f"{MOST_VALUES} names and values, of {MOST_CHARACTERS} characters together"
            raise ValueError(f"the schema is too large: at most {most}")
    if _expanded(schema, schema, {}) > MOST_EXPANDED:
        raise ValueError("the schema asks for too much: lower minItems or minLength, or use fewer references")
    return schema


def _expanded(value: Any, root: Object, sizes: dict[str, int], depth: int = 1) -> int:
    """Values of a part of a schema, see MOST_EXPANDED. sizes: of the references followed so far. Raises ValueError if
    it is too deep."""
    if depth > DEEPEST_FOLLOWED:
        raise ValueError(f"the schema's references lead more than {DEEPEST_FOLLOWED} levels deep: make it flatter")
    if isinstance(value, list):
        return 1 + sum(_expanded(item, root, sizes, depth + 1) for item in value)
    if not isinstance(value, dict):
        return 1
    parts = [part for name, part in value.items() if name not in ("$defs", "definitions")]
    size = 1 + sum(_expanded(part, root, sizes, depth + 1) for part in parts)
    reference = value.get("$ref")
    if isinstance(reference, str):
        if reference not in sizes:
            sizes[reference] = 0  # a definition within itself is followed once
            sizes[reference] = _expanded(_target(root, reference), root, sizes, depth + 1)
        size += sizes[reference]
    return size * _least(value, "minItems") + _least(value, "minLength")


def _least(schema: Object, keyword: str) -> int:
    length = schema.get(keyword)
    return max(1, int(length)) if isinstance(length, int | float) else 1


def _target(root: Object, reference: str) -> Any:
    """What a reference leads to; None if it leads nowhere."""
    value: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        value = value.get(name) if isinstance(value, dict) else None
    return value if reference.startswith("#") else None


Schema = Annotated[Object, AfterValidator(_within_bounds)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Letters, digits, _ and -: at most 64.")]


class JsonSchema(Checked):
    """A schema for the answer. `strict` changes nothing: the answer always fits the schema."""

    name: Name
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Checked):
    """The form of the answer: free text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            needs = "needs a json_schema" if self.json_schema is None else "has no json_schema: leave it out"
            raise BadValue("json_schema", f"the type {self.type} {needs}")
        return self

    @property
    def answer_schema(self) -> Object | None:
        """Of the answer; None for free text."""
        if self.json_schema is not None:
            return self.json_schema.json_schema
        return ANY_OBJECT if self.type == "json_object" else None


def _parsed(value: Any) -> Any:
    """A schema that is given as text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError("the schema is not JSON") from None


class StructuredOutputs(Checked):
    """vLLM's field for the form of the answer, as far as it is JSON."""

    neutral = {
        "disable_fallback": [False, True],
        "disable_any_whitespace": [False, True],
        "disable_additional_properties": [False],
    }
    json_value: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return {**value, "json": _parsed(value["json"])} if isinstance(value, dict) and "json" in value else value

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if (self.json_value is None) == (not self.json_object):
            raise BadValue("json", "give json, a schema, or json_object: true")
        return self

    @property
    def answer_schema(self) -> Object:
        return ANY_OBJECT if self.json_value is None else self.json_value


class Function(Checked):
    """A function that the model may call. Without `parameters` it takes none. `strict` changes nothing: the arguments
    always fit `parameters`."""

    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> Function:
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise BadValue("parameters", f"the arguments of a function are an object, not {str(kind)[:40]!r}")
        return self

    def tool(self) -> Object:
        """As `SamplingParams.tools` has it."""
        parameters = NO_ARGUMENTS if self.parameters is None else {"type": "object", **self.parameters}
        return {"name": self.name, "description": self.description or "", "parameters": parameters}


class Tool(Checked):
    """A tool: always a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Checked):
    """The function that is to be called."""

    name: Text


class NamedTool(Checked):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


_CHOICES = ("auto", "none", "required")
"""A tool with such a name is chosen by being the only one."""


class ToolUse(Checked):
    """The tools of a request, and whether the answer is to call one."""

    tools: list[Tool] | None = Field(default=None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="Has no effect: an answer makes one call.")

    @model_validator(mode="after")
    def _known(self) -> ToolUse:
        names = [tool.function.name for tool in self.tools or ()]
        if (again := next((i for i, name in enumerate(names) if name in names[:i]), None)) is not None:
            raise BadValue(f"tools[{again}].function.name", f"two tools are named {names[again]!r}: rename one")
        if self.tool_choice == "required" and not names:
            raise BadValue("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and (name := self.tool_choice.function.name) not in names:
            listed = ", ".join(names) or "no tools"
            raise BadValue("tool_choice", f"there is no tool {name[:64]!r}, but {listed}")
        return self

    @property
    def _named(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def callable_tools(self) -> list[Object]:
        """The tools that the answer may call, as `SamplingParams.tools` has them."""
        tools = [] if self.tool_choice == "none" else [tool.function.tool() for tool in self.tools or ()]
        return [tool for tool in tools if tool["name"] == self._named] if self._named in _CHOICES else tools

    @property
    def choice(self) -> str:
        """As `SamplingParams.tool_choice` has it."""
        if isinstance(self.tool_choice, NamedTool):
            return "required" if self._named in _CHOICES else self.tool_choice.function.name
        return self.tool_choice or "auto"

    @property
    def tool_params(self) -> dict[str, Any]:
        """The sampling parameters of the tools; none if no tool may be called."""
        tools = self.callable_tools
        return {"tools": tools, "tool_choice": self.choice} if tools else {}
