"""A walk over a JSON Schema. It knows which keywords hold schemas: names of properties and values are no keywords.

Source: JSON Schema 2020-12 (core, sections 10 and 11), with the keywords that the earlier drafts had.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import unquote

Schema: TypeAlias = Any
"""A JSON Schema: a mapping, or a boolean."""
Change: TypeAlias = "Callable[[Mapping[str, Any], str], Mapping[str, Any]]"
"""From a part of a schema and its JSON pointer to what stands in its place."""

_BY_NAME = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"},
)
"""Keywords whose value has a schema for each name."""
_IN_A_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_SINGLE = frozenset(
    {
        "items",
        "additionalItems",
        "unevaluatedItems",
        "contains",
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "not",
        "if",
        "then",
        "else",
        "contentSchema",
    }
)


def rebuilt(schema: Schema, change: Change, at: str = "#", also: Collection[str] = ()) -> Schema:
    """The schema with each of its parts changed, the innermost first. It is not changed itself.

    at: JSON pointer of the schema.
    also: pointers of further parts that are schemas, though no keyword says so: references lead there.
    """
    if isinstance(schema, Mapping):
        return change(
            {key: _rebuilt(key, value, change, f"{at}/{_escaped(key)}", also) for key, value in schema.items()}, at
        )
    return schema


def _rebuilt(key: str, value: Any, change: Change, at: str, also: Collection[str]) -> Any:
    """The value of a keyword with the schemas in it changed."""
    if key in _BY_NAME and isinstance(value, Mapping):
        return {name: rebuilt(each, change, f"{at}/{_escaped(name)}", also) for name, each in value.items()}
    if key in _IN_A_LIST and isinstance(value, list):
        return [rebuilt(each, change, f"{at}/{i}", also) for i, each in enumerate(value)]
    if key in _SINGLE or at in also:
        return rebuilt(value, change, at, also)
    if isinstance(value, Mapping) and any(pointer.startswith(f"{at}/") for pointer in also):
        return {name: _rebuilt(name, each, change, f"{at}/{_escaped(name)}", also) for name, each in value.items()}
    return value


def parts(schema: Schema, also: Collection[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each part of a schema that is an object, itself first, with its JSON pointer."""
    found: list[tuple[str, Mapping[str, Any]]] = []

    def keep(part: Mapping[str, Any], at: str) -> Mapping[str, Any]:
        found.append((at, part))
        return part

    rebuilt(schema, keep, also=also)
    yield from reversed(found)


def hidden(schema: Schema) -> frozenset[str]:
    """Pointers of the parts to which references lead, where no keyword says that there is a schema: as in
    `#/components/schemas/…`."""
    also: frozenset[str] = frozenset()
    while True:
        seen = dict(parts(schema, also))
        lead = {unquote(ref) for ref in map(reference, seen.values()) if ref and ref.startswith("#/")}
        if not (more := lead - set(seen) - also):
            return also
        also |= more


def reference(schema: Schema) -> str | None:
    """Where a schema refers to, if it does."""
    ref = schema.get("$ref") if isinstance(schema, Mapping) else None
    return ref if isinstance(ref, str) else None


def references(schema: Schema) -> Iterator[str]:
    """Where the parts of a schema refer to."""
    return (ref for _, part in parts(schema) if (ref := reference(part)) is not None)


def kinds(schema: Schema) -> Sequence[Any]:
    """The types that a schema names; (None,) where it names none."""
    named = schema.get("type") if isinstance(schema, Mapping) else None
    return named if isinstance(named, list) else (named,)


def scalars(value: Any) -> Iterator[Any]:
    """The texts, numbers and other values without parts that are in a value. Keys are none."""
    if isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from scalars(each)
    else:
        yield value


def takes_other_keys(schema: Mapping[str, Any]) -> bool:
    """Whether a part of a schema says something of some keys of an object, and lets it have others."""
    says = {"properties", "patternProperties", "required", "minProperties"} & set(schema)
    return "patternProperties" in says or bool(says) and schema.get("additionalProperties", True) is not False


def without(schema: Schema, keywords: Collection[str]) -> Schema:
    """The schema without some keywords. Properties of these names stay."""
    return rebuilt(schema, lambda part, _: {key: value for key, value in part.items() if key not in keywords})


def _escaped(name: str) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")
