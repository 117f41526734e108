"""From a JSON Schema to a plan: which parts of the answer are written by threads of their own, and what is not sampled.

A plan is a tree. A `Leaf` is a value that one thread writes under a grammar. A `Group` is an object, or an array of a
fixed length: its brackets are never sampled, and each of its children is a thread. What has no such form, because the
schema leaves open which keys it has, how long it is or which of several forms it takes, is a leaf as a whole.

Order. A child that needs others waits until they have ended, and then sees them:

    "x-depends-on": ["a", "b"]     in the schema of a field: names of fields of the same object
    depends={"c": ["a", "b"]}      the same from outside; "person.name" names a field of an inner object
    SUMMARIES                      a text field with such a name waits for the fields declared before it, unless the
                                   schema or `depends` says what it needs
    choices                        an enum or a boolean waits for one free value of its object, unless they say so: what
                                   a small model chooses first of all is often the first or `true`

Everything here is pure: no grammar, no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pastalm.errors import RequestError
from pastalm.structured import formats, numbers, patterns
from pastalm.structured.schemas import Schema, hidden, kinds, rebuilt, references, without

SUMMARIES = frozenset({"summary", "conclusion", "abstract", "overview", "title", "headline", "verdict"})
"""Names of fields that are said about the others. A field whose name is one of these words, or ends in one behind an
underscore, waits for the fields declared before it."""
DEPENDS = "x-depends-on"
COUNT_FIRST = "x-count-first"
"""In the schema of an array: how many items it has is decided first, then each is a thread."""
CALL_OPEN, CALL_CLOSE = "<tool_call>\n", "\n</tool_call>"
"""Around the call of a tool in an answer that may also be text (as in the Hermes and Qwen templates)."""
OURS = frozenset({DEPENDS, COUNT_FIRST})
"""Keywords that are said to us alone."""
MOST_ITEMS = 32
"""Longer arrays are leaves."""
DEEPEST = 64

_NOTES = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"})
_DEFINITIONS = frozenset({"$defs", "definitions", "$schema", "$id", "id", "strict"})
_OBJECT = _NOTES | _DEFINITIONS | {"type", "properties", "required", "additionalProperties", DEPENDS}
_ARRAY = _NOTES | _DEFINITIONS | {"type", "items", "prefixItems", "minItems", "maxItems", DEPENDS, COUNT_FIRST}
_DEFINITION = re.compile(r"#/(\$defs|definitions)/[^/]+")
"""What a reference may be: other parts of the schema are not there for a thread that writes one field."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value that one thread writes. schema: of the value, with the definitions that it refers to. optional: null may
    stand for leaving the field out."""

    schema: Schema
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """An object or an array whose children are threads. open, close: its brackets. lead: what every child begins with,
    fed once behind the opening bracket, as tokens begin there."""

    open: str
    children: tuple[Child, ...]
    close: str
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Counted:
    """An array of `least` to `most` items: the number is decided first, then it is a group."""

    item: Node
    least: int
    most: int

    def items(self, n: int) -> Group:
        return Group("[", tuple(Child(self.item, f"item {i + 1}", hint=hint(i, n)) for i in range(n)), "]")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several objects, told apart by their first value: a tool call. `open` stands before that value, `between`
    behind it, then the chosen node, then `close`."""

    open: str
    options: Mapping[str, Node]
    between: str
    close: str


Node: TypeAlias = Leaf | Group | Counted | Choice


@dataclass(frozen=True, slots=True)
class Child:
    """One child of a group.

    name: for people.
    key: what stands before its value, as JSON ("" in an array).
    needs: the children, by index, that it waits for.
    hint: what its thread sees before it and nobody reads.
    """

    node: Node
    name: str
    key: str = ""
    needs: tuple[int, ...] = ()
    hint: str = ""


def hint(index: int, count: int) -> str:
    """What tells an item of an array from its siblings, which it does not see."""
    return f"/* item {index + 1} of {count} */ "


def quoted(value: Any) -> str:
    """A value as JSON, in the form that leaves have too."""
    return json.dumps(value, ensure_ascii=False)


def plan(schema: Schema, depends: Mapping[str, Sequence[str]] | None = None, *, parallel: bool = True) -> Node:
    """The plan of a schema.

    depends: names of fields -> names of those that they wait for.
    parallel: False: the whole answer is one leaf.

    Raises RequestError if names do not fit, if fields wait for each other, or if the schema is no schema.
    """
    schema = _held(schema)
    planner = _Planner(schema, depends or {})
    parallel = parallel and all(map(_DEFINITION.fullmatch, references(schema)))
    node = planner.node(schema, (), frozenset()) if parallel else planner.leaf(schema)
    if parallel and (unknown := sorted(set(depends or {}) - planner.known)):
        raise RequestError(f"depends names {unknown[0]!r}, which is not a field with a thread of its own")
    return node


class _Planner:
    """known: names of the fields that are threads."""

    def __init__(self, root: Schema, depends: Mapping[str, Sequence[str]]) -> None:
        self._root, self._depends = root, depends
        self.known: set[str] = set()
        if not isinstance(root, Mapping | bool):
            raise RequestError(f"a schema is an object, not {type(root).__name__}")
        defined = {key: _get(root, key) for key in ("$defs", "definitions") if isinstance(_get(root, key), Mapping)}
        self._definitions = without(defined, OURS)

    def node(self, schema: Schema, path: tuple[str, ...], within: frozenset[str]) -> Node:
        """The plan of a part. path: names of the fields that lead to it. within: the references that do."""
        schema, within = self._resolved(schema, within)
        if isinstance(schema, Mapping) and len(path) < DEEPEST:
            if (fields := self._fields(schema)) is not None:
                return self._object(schema, fields, path, within)
            if (items := _items(schema)) is not None:
                children = tuple(
                    Child(self.node(item, (*path, str(i)), within), f"item {i + 1}", hint=hint(i, len(items)))
                    for i, item in enumerate(items)
                )
                return Group("[", children, "]")
            if (bounds := _counts(schema)) is not None:
                return Counted(self.node(schema["items"], (*path, "0"), within), *bounds)
        return self.leaf(schema)

    def leaf(self, schema: Schema, *, optional: bool = False) -> Leaf:
        plain = without(schema, OURS)
        return Leaf({**plain, **self._definitions} if any(references(plain)) else plain, optional)

    def _resolved(self, schema: Schema, within: frozenset[str]) -> tuple[Schema, frozenset[str]]:
        """What a reference to a definition stands for, unless it is inside of what it refers to."""
        while isinstance(schema, Mapping) and set(schema) - _NOTES - {DEPENDS} == {"$ref"}:
            ref = schema["$ref"]
            if ref in within or (target := self._target(ref)) is None:
                return schema, within
            schema, within = target, within | {ref}
        return schema, within

    def _target(self, ref: Any) -> Schema | None:
        parts = str(ref).split("/")
        if len(parts) != 3 or parts[0] != "#" or parts[1] not in ("$defs", "definitions"):
            return None
        found = self._root.get(parts[1], {}).get(parts[2].replace("~1", "/").replace("~0", "~"))
        return found if isinstance(found, Mapping) else None

    def _fields(self, schema: Mapping[str, Any]) -> list[str] | None:
        """Names of an object's fields, if each can be a thread: one that is always there comes first, in which no comma
        is written."""
        properties, required = schema.get("properties"), schema.get("required")
        if schema.get("type", "object") != "object" or set(schema) - _OBJECT:
            return None
        if not isinstance(properties, Mapping) or not isinstance(required, list) or not properties:
            return None
        names, always = list(properties), set(map(str, required))
        if not always or not always <= set(names):
            return None
        first = next(name for name in names if name in always)
        return [first, *(name for name in names if name != first)] if names[0] != first else names

    def _object(
        self, schema: Mapping[str, Any], names: list[str], path: tuple[str, ...], within: frozenset[str]
    ) -> Group:
        properties, required = schema["properties"], set(schema["required"])
        needs = self._needs(properties, names, path, required)
        children = []
        for name in names:
            at = (*path, name)
            self.known.add(".".join(at))
            if name in required:
                node = self.node(properties[name], at, within)
            else:
                node = self.leaf(properties[name], optional=True)
            children.append(Child(node, name, f"{quoted(name)}: ", needs[name]))
        return Group("{", tuple(children), "}", lead="" if any(child.needs for child in children) else '"')

    def _needs(
        self, properties: Mapping[str, Schema], names: list[str], path: tuple[str, ...], required: Collection[str]
    ) -> dict[str, tuple[int, ...]]:
        """For each field the fields that it waits for, by index. Raises RequestError."""
        needs: dict[str, tuple[int, ...]] = {}
        usual: list[str] = []
        for name in names:
            full = ".".join((*path, name))
            asked = self._depends.get(full, _get(properties[name], DEPENDS))
            if asked is None:
                usual.append(name)
                asked = []
            listed = isinstance(asked, Sequence) and not isinstance(asked, str)
            if not listed or not all(isinstance(other, str) for other in asked):
                raise RequestError(f"what {full!r} depends on is a list of names of fields")
            if unknown := [other for other in asked if other not in names or other == name]:
                raise RequestError(f"{full!r} depends on {unknown[0]!r}, which is not another field of its object")
            needs[name] = tuple(dict.fromkeys(names.index(other) for other in asked))
        for name in names:
            if names.index(name) in _reached(needs, names, needs[name]):
                raise RequestError(f"{'.'.join((*path, name))!r} depends on itself through others: break the circle")
        parts = {name: self._resolved(properties[name], frozenset())[0] for name in names}
        for name in usual:
            for other in _usual_needs(name, names, parts, required):
                if names.index(name) not in _reached(needs, names, [names.index(other)]):
                    needs[name] = (*needs[name], names.index(other))
        return needs


def _reached(needs: Mapping[str, tuple[int, ...]], names: list[str], begin: Sequence[int]) -> set[int]:
    reached: set[int] = set()
    todo = list(begin)
    while todo:
        if (index := todo.pop()) not in reached:
            reached.add(index)
            todo += needs[names[index]]
    return reached


def _get(schema: Schema, key: str) -> Any:
    return schema.get(key) if isinstance(schema, Mapping) else None


def _usual_needs(
    name: str, names: Sequence[str], properties: Mapping[str, Schema], required: Collection[str]
) -> list[str]:
    """What a field waits for of which nobody says what it needs: a summary for the fields declared before it, a choice
    for one free value of its object, a number or else a text."""
    if _summarises(name, properties[name]):
        return list(names[: names.index(name)])
    if _chooses(properties[name]):
        for types in (("integer", "number"), ("string",)):
            for other in names:
                part = properties[other]
                free = not _chooses(part) and not _summarises(other, part) and _get(part, "const") is None
                if other in required and free and _get(part, "type") in types:
                    return [other]
    return []


def _chooses(schema: Schema) -> bool:
    """Whether a value is one of a few."""
    return _get(schema, "enum") is not None or all(kind in ("boolean", "null") for kind in kinds(schema))


def _summarises(name: str, schema: Schema) -> bool:
    return name.casefold().rsplit("_", 1)[-1] in SUMMARIES and _get(schema, "type") == "string"


def _items(schema: Mapping[str, Any]) -> list[Schema] | None:
    """The schemas of the items of an array whose length is fixed."""
    if schema.get("type") != "array" or set(schema) - _ARRAY:
        return None
    prefix, least, most = schema.get("prefixItems") or [], schema.get("minItems", 0), schema.get("maxItems")
    if not isinstance(prefix, list) or not isinstance(least, int):
        return None
    rest = schema.get("items", True)
    if rest is False:
        most = len(prefix) if most is None else min(most, len(prefix))
    if most != least or not 0 < least <= MOST_ITEMS or (least > len(prefix) and not isinstance(rest, Mapping)):
        return None
    return [*prefix[:least], *[rest] * (least - len(prefix))]


def _counts(schema: Mapping[str, Any]) -> tuple[int, int] | None:
    """The smallest and largest length of an array whose length is to be decided first."""
    if schema.get("type") != "array" or set(schema) - _ARRAY or not schema.get(COUNT_FIRST):
        return None
    least, most = schema.get("minItems", 0), schema.get("maxItems", 9)
    fits = "prefixItems" not in schema and isinstance(schema.get("items"), Mapping)
    return (least, most) if fits and isinstance(least, int) and 0 <= least <= most <= MOST_ITEMS else None


def _held(schema: Schema) -> Schema:
    """The schema in a form that can be held. Raises RequestError."""

    def change(part: Mapping[str, Any], at: str) -> Mapping[str, Any]:
        part = {key: value for key, value in part.items() if not _says_nothing(key, value)}
        held = patterns.held(numbers.held(formats.held(part, at), at), at)
        _check_keys(held, at)
        return held

    try:
        return rebuilt(schema, change, also=hidden(schema))
    except RecursionError:
        raise RequestError("the schema is nested too deep") from None


def _says_nothing(keyword: str, value: Any) -> bool:
    """Whether a keyword that a grammar cannot hold leaves everything open."""
    return keyword == "uniqueItems" and value is False or keyword == "propertyNames" and value in (True, {})


def _check_keys(schema: Mapping[str, Any], at: str) -> None:
    """Raises RequestError if an object needs several keys that have no names: a grammar does not see that two are the
    same."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
        most = "it may ask for one key more than `required` names"
        raise RequestError(f"the schema cannot be held: minProperties {least} at {at} is not supported: {most}")


def tool_calls(tools: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> Node:
    """The plan of a call of one of some tools: its name is decided first, then each argument is a thread."""
    arguments = {quoted(tool["name"]): _arguments(tool, parallel) for tool in tools}
    if len(arguments) > 1:
        return Choice('{"name": ', arguments, ', "arguments": ', "}")
    ((name, node),) = arguments.items()
    if isinstance(node, Group):
        return replace(node, open=f'{{"name": {name}, "arguments": {node.open}', close=f"{node.close}}}")
    return Group("{", (Child(node, "arguments", f'"name": {name}, "arguments": '),), "}")


def _arguments(tool: Mapping[str, Any], parallel: bool) -> Node:
    schema = tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        return plan(schema, parallel=parallel)
    except RequestError as error:
        raise RequestError(f"tool {tool['name']!r}: {error}") from None
