"""Plans: which parts of a schema are threads, in which order, and what is refused. Pure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.errors import RequestError
from pastalm.structured.plan import Choice, Counted, Group, Leaf, plan, tool_calls
from tests.structured.examples import fields

TEXT = {"type": "string"}


def needs(schema: Any, depends: Any = None) -> dict[str, list[str]]:
    node = plan(schema, depends)
    assert isinstance(node, Group)
    names = [child.name for child in node.children]
    return {child.name: [names[i] for i in child.needs] for child in node.children}


def test_each_field_of_an_object_is_a_child_and_inner_objects_are_groups() -> None:
    node = plan(fields(a=TEXT, b=fields(c=TEXT, d={"type": "integer"})))
    assert isinstance(node, Group)
    inner = node.children[1].node
    assert [child.key for child in node.children] == ['"a": ', '"b": ']
    assert isinstance(node.children[0].node, Leaf) and isinstance(inner, Group)
    assert [child.name for child in inner.children] == ["c", "d"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {"a": TEXT}},  # no field is always there
        fields(a=TEXT) | {"patternProperties": {"^x": TEXT}},
        fields(a=TEXT) | {"required": ["a", "z"]},
        {"anyOf": [TEXT, {"type": "null"}]},
        {"type": "array", "items": TEXT},
        {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 3},
        fields(a={"$ref": "#/properties/b"}, b=TEXT),
        TEXT,
        {},
    ],
)
def test_what_is_open_is_one_leaf(schema: Any) -> None:
    assert isinstance(plan(schema), Leaf)


def test_in_one_thread_all_is_a_leaf() -> None:
    assert isinstance(plan(fields(a=TEXT, b=TEXT), parallel=False), Leaf)


def test_a_field_that_may_be_left_out_stands_behind_one_that_may_not() -> None:
    schema = {"type": "object", "properties": {"a": TEXT, "b": TEXT, "c": TEXT}, "required": ["b"]}
    node = plan(schema)
    assert isinstance(node, Group)
    assert [child.name for child in node.children] == ["b", "a", "c"]
    assert [isinstance(child.node, Leaf) and child.node.optional for child in node.children] == [False, True, True]


def test_a_definition_is_looked_up_but_not_inside_of_itself() -> None:
    schema = fields(a={"$ref": "#/$defs/node"}) | {"$defs": {"node": fields(v=TEXT, next={"$ref": "#/$defs/node"})}}
    node = plan(schema)
    assert isinstance(node, Group)
    inner = node.children[0].node
    assert isinstance(inner, Group)
    again = inner.children[1].node
    assert isinstance(again, Leaf) and "$defs" in again.schema


@pytest.mark.parametrize(
    "schema, count",
    [
        ({"type": "array", "items": TEXT, "minItems": 3, "maxItems": 3}, 3),
        ({"type": "array", "prefixItems": [TEXT, {"type": "integer"}], "items": False, "minItems": 2}, 2),
    ],
)
def test_items_of_an_array_of_fixed_length_are_children(schema: Any, count: int) -> None:
    node = plan(schema)
    assert isinstance(node, Group) and len(node.children) == count
    assert len({child.hint for child in node.children}) == count


def test_the_length_is_decided_first_where_the_schema_says_so() -> None:
    node = plan({"type": "array", "items": TEXT, "maxItems": 5, "x-count-first": True})
    assert isinstance(node, Counted) and (node.least, node.most) == (0, 5)
    assert len(node.items(4).children) == 4


def test_fields_wait_for_those_they_name() -> None:
    schema = fields(a=TEXT, b=TEXT | {"x-depends-on": ["a", "c"]}, c=TEXT)
    assert needs(schema) == {"a": [], "b": ["a", "c"], "c": []}
    assert needs(fields(a=TEXT, b=TEXT), {"a": ["b"]}) == {"a": ["b"], "b": []}


def test_a_summary_waits_for_what_stands_before_it_unless_told_otherwise() -> None:
    assert needs(fields(title=TEXT, a=TEXT, short_summary=TEXT)) == {
        "title": [],
        "a": [],
        "short_summary": ["title", "a"],
    }
    assert needs(fields(a=TEXT, summary=TEXT | {"x-depends-on": []})) == {"a": [], "summary": []}
    assert needs(fields(a=TEXT, summary={"type": "integer"}))["summary"] == []


@pytest.mark.parametrize(
    "schema, depends",
    [
        (fields(a=TEXT, b=TEXT), {"a": ["b"], "b": ["a"]}),
        (fields(a=TEXT), {"a": ["a"]}),
        (fields(a=TEXT), {"a": ["z"]}),
        (fields(a=TEXT), {"z": ["a"]}),
        (fields(a=TEXT), {"a": "b"}),
        (fields(a=TEXT | {"x-depends-on": ["nothing"]}), None),
    ],
)
def test_what_cannot_wait_is_refused_in_one_line(schema: Any, depends: Any) -> None:
    with pytest.raises(RequestError) as refused:
        plan(schema, depends)
    assert len(str(refused.value).splitlines()) == 1


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.lists(st.integers(0, 7), max_size=4), min_size=1, max_size=8)
)
def test_fields_that_wait_can_always_begin_or_are_refused(waits: dict[str, list[int]]) -> None:
    names = list(waits)
    schema = fields(
        **{name: TEXT | {"x-depends-on": [names[i % len(names)] for i in each]} for name, each in waits.items()}
    )
    try:
        asked = needs(schema)
    except RequestError:
        return
    begun: set[str] = set()
    while ready := {name for name in names if name not in begun and set(asked[name]) <= begun}:
        begun |= ready
    assert begun == set(names)


def test_tools_are_chosen_by_name() -> None:
    tools = [{"name": "one", "parameters": fields(a=TEXT)}, {"name": "two"}]
    node = tool_calls(tools)
    assert isinstance(node, Choice) and list(node.options) == ['"one"', '"two"']
    only = tool_calls(tools[:1])
    assert isinstance(only, Group) and only.open == '{"name": "one", "arguments": {' and only.close == "}}"


NUMBER = {"type": "integer"}
CHOICE: dict[str, Any] = {"enum": ["a", "b"]}
YES_OR_NO: dict[str, Any] = {"type": "boolean"}


@pytest.mark.parametrize(
    ("schema", "waits"),
    [
        (fields(kind=CHOICE, name=TEXT, age=NUMBER, open=YES_OR_NO), {"kind": ["age"], "open": ["age"]}),
        (fields(kind=CHOICE, name=TEXT, more=TEXT), {"kind": ["name"]}),
        (fields(kind=CHOICE, open=YES_OR_NO), {}),
        (fields(kind=CHOICE, title=TEXT), {"title": ["kind"]}),  # a summary is no value to begin from
        (fields(kind=CHOICE | {"x-depends-on": []}, age=NUMBER), {}),
        (fields(kind=CHOICE, age=NUMBER | {"x-depends-on": ["kind"]}), {"age": ["kind"]}),
        (fields(kind=CHOICE, age=NUMBER) | {"required": ["kind"]}, {}),
        (fields(kind={"$ref": "#/$defs/k"}, age=NUMBER) | {"$defs": {"k": CHOICE}}, {"kind": ["age"]}),
        (fields(kind=CHOICE, always={"const": 1}), {}),
        (
            fields(summary=TEXT, kind=CHOICE, age=NUMBER | {"x-depends-on": ["summary"]}),
            {"age": ["summary"], "kind": ["age"]},
        ),
        (fields(age=NUMBER | {"x-depends-on": ["summary"]}, summary=TEXT), {"age": ["summary"]}),
    ],
)
def test_a_choice_waits_for_one_free_value_unless_somebody_says_otherwise(
    schema: Any, waits: dict[str, list[str]]
) -> None:
    assert {name: needed for name, needed in needs(schema).items() if needed} == waits


def test_what_fields_usually_need_never_makes_them_wait_for_each_other() -> None:
    parts = {"one": CHOICE, "two": NUMBER, "summary": TEXT, "four": YES_OR_NO, "title": TEXT}
    for name in parts:
        for other in parts:
            if other != name:
                needs(
                    fields(**{n: part | ({"x-depends-on": [other]} if n == name else {}) for n, part in parts.items()})
                )


def test_a_type_that_is_none_makes_a_leaf_which_the_grammar_refuses() -> None:
    assert isinstance(plan(fields(a={"type": {}}, b={"type": [[]]})), Group)
