"""The annotator that asks a model: its examples are sound, and whatever a model writes keeps the text or is dropped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.language import MAX_TOPIC_WORDS, Promise, Sync, round_length, topic_key
from pastalm.records.documents import Async, linearize, parse, render, strip
from pastalm.train.annotate import PlainAnswer
from pastalm.train.annotate_remote import question, read
from pastalm.train.annotation_prompt import EXAMPLES, SYSTEM
from tests.strategies import documents
from tests.train.test_structure import words

PLAIN = "Two tips:\n\n1. Sleep well every night.\n2. Eat more greens and beans.\n\nBoth take time."
GOOD = (
    "Two tips:\n\n"
    '<promise topic="sleep" tokens="10"/><async>1. Sleep well every night.\n</async>'
    '<promise topic="food" tokens="10"/><async>2. Eat more greens and beans.\n\n</async>'
    "<sync/>Both take time."
)


def test_the_seven_examples_are_sound() -> None:
    assert len(EXAMPLES) == 7
    marked = [parse(annotated) for _, annotated in EXAMPLES]
    assert sorted(sum(isinstance(n, Promise) for n in d) for d in marked) == [0, 0, 2, 3, 3, 3, 4]
    assert sum(isinstance(n, Sync) for n in marked[-1]) == 2, "a sync in the middle"
    for (_, annotated), document in zip(EXAMPLES, marked, strict=True):
        assert read(annotated, strip(document), words) is not None
        again = read(annotated, strip(document), words)
        assert not isinstance(again, str), again
        assert strip(again) == strip(document)
        assert [n.topic for n in again if isinstance(n, Promise)] == [
            n.topic for n in document if isinstance(n, Promise)
        ]


def test_a_question_shows_the_language_the_examples_and_the_answer() -> None:
    messages = question(PlainAnswer("a", "Tips?", PLAIN))
    assert messages[0] == {"role": "system", "content": SYSTEM}
    assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * 7 + ["user"]
    assert PLAIN in messages[-1]["content"]
    assert "Tips?" in messages[-1]["content"]


@pytest.mark.parametrize(
    "said",
    [
        GOOD,
        f"```xml\n{GOOD}\n```",
        f"<answer>{GOOD}</answer>",
        GOOD.replace("<sync/>", "<sync></sync>"),
        GOOD.replace('topic="sleep" tokens="10"', "tokens='7' topic='sleep'"),
        GOOD.replace('topic="sleep"', 'topic="sleep" title="x"').replace('tokens="10"', 'tokens="about ten"'),
        GOOD.replace("/><async>", "/>\n<async>"),
        GOOD + "<sync/>",
        GOOD.replace("\n\n<promise", "<promise"),
        GOOD.replace("night.\n</async>", "night.</async>\n"),
        "\n" + GOOD + "\n",
    ],
)
def test_what_is_mechanical_is_repaired(said: str) -> None:
    document = read(said, PLAIN, words)
    assert not isinstance(document, str), document
    assert strip(document) == PLAIN
    assert [n.topic for n in document if isinstance(n, Promise)] == ["sleep", "food"]
    assert isinstance(document[-2], Sync)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (GOOD.replace("</async>", "", 1), "malformed tags"),
        (GOOD.replace("greens", "vegetables"), "text changed"),
        (GOOD.removesuffix("Both take time."), "text changed"),
        (GOOD.replace("food", "Sleep"), "topics alike"),
        (GOOD.replace("1. Sleep well every night.\n</async>", "</async>1. Sleep well every night.\n"), "empty chunk"),
        ("I cannot do that.", "text changed"),
        ("", "text changed"),
    ],
)
def test_what_is_not_is_dropped_with_its_reason(said: str, why: str) -> None:
    assert read(said, PLAIN, words) == why


def test_an_answer_about_the_language_itself_is_dropped() -> None:
    assert read("a <sync/> b", "a <sync/> b", words) == "response looks like PASTA-LANG"


def test_lengths_are_counted_and_topics_cut() -> None:
    document = read(GOOD.replace("food", "what to eat each day"), PLAIN, words)
    assert not isinstance(document, str)
    for promise, chunk in zip(document, document[1:], strict=False):
        if isinstance(promise, Promise):
            assert isinstance(chunk, Async)
            assert promise.tokens == round_length(words(strip(chunk.body)))
    assert "what to eat" in [n.topic for n in document if isinstance(n, Promise)]


@given(documents(1), st.data())
def test_any_annotation_is_kept_true_or_dropped(document: object, data: st.DataObject) -> None:
    """Of a true annotation with white space lost or doubled and a piece cut out: the text is kept or it is dropped."""
    said = render(document)  # type: ignore[arg-type]
    response = strip(document)  # type: ignore[arg-type]
    cut = data.draw(st.integers(0, len(said)))
    width = data.draw(st.integers(0, 3))
    for changed in (said, said.replace(" ", "  "), said[:cut] + said[cut + width :]):
        found = read(changed, response, words)
        if isinstance(found, str):
            continue
        assert strip(found) == response
        assert parse(render(found)) == found
        group: set[str] = set()
        for node in found:
            if isinstance(node, Promise):
                assert len(node.topic.split()) <= MAX_TOPIC_WORDS
                assert topic_key(node.topic) not in group
                group.add(topic_key(node.topic))
            elif isinstance(node, Sync):
                group.clear()
        assert list(linearize(found))
