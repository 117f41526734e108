"""What a server is told about the form of a value: a regular expression, or a JSON Schema.

A guide has one key. `regex` is of the rest of a value that has begun, and of the comma behind it: a model that may not
write the comma finds no end of a number. `json` is the schema of the whole value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from pastalm.structured.plan import Leaf, quoted

Guide: TypeAlias = "Mapping[str, Any]"

LONGEST = 200
"""Longer bounds on a text are only checked: as a regular expression they take long to compile."""
_WHOLE = "(0|[1-9][0-9]{0,15})"
_CHARACTER = r'([^"\\\r\n\t]|\\["\\/bfnrt])'
_SPECIAL = re.compile(r"([\\.^$|?*+()\[\]{}])")


def rest_of(leaf: Leaf, begun: str) -> Guide | None:
    """The guide of the rest of a simple value that begins with `begun`; None if it is not simple."""
    body = _body(leaf.schema, begun)
    if body is None:
        return None
    if leaf.optional:
        body = f"({body}|null)"
    return {"regex": f"{body}," if begun else f" ?{body},"}


def one_of(texts: Collection[str], begun: str = "") -> Guide:
    """The guide of the rest of one of some texts."""
    return {"regex": _either(texts, begun)}


def whole(leaf: Leaf) -> Guide | None:
    """The guide of a value that has not begun; None for a text or number of any kind: it is better checked than held,
    since the model writes on behind its end."""
    schema = {} if leaf.schema is True else leaf.schema
    if not leaf.optional:
        return None if _is_plain(schema) else {"json": schema}
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in definitions}
    return {"json": {"anyOf": [rest, {"type": "null"}], **definitions}}


def _is_plain(schema: Mapping[str, Any]) -> bool:
    kind, free = schema.get("type"), not {"enum", "const"} & set(schema)
    return free and (kind in ("integer", "number") or kind == "string" and not {"pattern", "format"} & set(schema))


def _body(schema: Any, begun: str) -> str | None:
    if not isinstance(schema, Mapping) or "$ref" in schema:
        return None
    kind = schema.get("type")
    if "enum" in schema or "const" in schema:
        return _either([quoted(value) for value in schema.get("enum", [schema.get("const")])], begun)
    if kind in ("boolean", "null"):
        return _either(["true", "false"] if kind == "boolean" else ["null"], begun)
    if kind in ("integer", "number"):
        sign = "" if schema.get("minimum", -1) >= 0 else "-?"
        return sign + _WHOLE + (r"(\.[0-9]{1,15})?" if kind == "number" else "")
    if kind != "string" or not _is_plain(schema):
        return None
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    count = "*" if not least else "+"
    if isinstance(most, int) and most <= LONGEST:
        count = f"{{{least},{most}}}"
    return ("" if begun else '"') + _CHARACTER + count + '"'


def _either(texts: Collection[str], begun: str) -> str:
    return "(" + "|".join(_SPECIAL.sub(r"\\\1", text.removeprefix(begun)) for text in texts) + ")"
