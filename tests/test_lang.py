"""Law 4: the language round-trips, and its scanner agrees with its parser wherever the pieces end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.language import (
    LENGTHS,
    MAX_TOPIC_WORDS,
    AsyncClose,
    AsyncOpen,
    Mark,
    Promise,
    Sync,
    Text,
    clip_topic,
    round_length,
    topic_key,
)
from pastalm.errors import LanguageError
from pastalm.records.documents import Async, Document, linearize, nest, normalize, parse, render, strip
from pastalm.records.xml import TAG_LIMIT, Scanner
from tests.strategies import LOOK_ALIKES, documents, texts, topics

nearly_tags = st.lists(st.sampled_from(LOOK_ALIKES), max_size=12).map("".join)


def _scan(pieces: list[bytes]) -> tuple[Mark, ...]:
    """What a scanner finds, in normal form."""
    scanner = Scanner()
    marks = [mark for piece in pieces for mark in scanner.feed(piece)] + scanner.flush()
    assert scanner.held == ""
    return linearize(marks)  # type: ignore[arg-type]  # flat marks stay as they are


@given(documents())
def test_parse_undoes_render(document: Document) -> None:
    assert parse(render(document)) == document


@given(documents())
def test_nest_undoes_linearize(document: Document) -> None:
    assert nest(linearize(document)) == document


@given(documents())
def test_the_reader_text_is_the_same_in_every_form(document: Document) -> None:
    assert strip(linearize(document)) == strip(document) == strip(parse(render(document)))


@given(texts)
def test_plain_text_is_never_taken_for_a_tag(text: str) -> None:
    assert strip(parse(render([Text(text)]))) == text


@given(st.text() | nearly_tags)
def test_any_string_parses_or_says_where_it_does_not(source: str) -> None:
    try:
        document = parse(source)
    except LanguageError as error:
        assert error.position is not None
        assert 0 <= error.position <= len(source)
    else:
        assert parse(render(document)) == document == normalize(document)


@given(st.text() | nearly_tags | documents().map(render), st.data())
def test_a_scanner_fed_in_any_pieces_finds_the_same(source: str, data: st.DataObject) -> None:
    whole = source.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    bounds = [0, *cuts, len(whole)]
    pieces = [whole[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    assert _scan(pieces) == _scan([whole]) == _scan([bytes([b]) for b in whole])


@given(st.binary(), st.data())
def test_bytes_that_are_no_text_are_scanned_too(raw: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(raw)))
    assert _scan([raw[:cut], raw[cut:]]) == _scan([raw])


@given(documents())
def test_the_scanner_agrees_with_the_parser(document: Document) -> None:
    assert _scan([render(document).encode()]) == linearize(parse(render(document)))


@pytest.mark.parametrize("space", ["\n", "\t", " "])
def test_space_inside_a_tag_means_the_same_in_any_pieces(space: str) -> None:
    source = f'<sync{space}/><promise topic="a"{space}tokens="10"{space}/>'
    assert _scan([source.encode()]) == _scan([c.encode() for c in source])


@given(topics, st.integers(0, 999999))
def test_a_scanned_promise_is_clipped_not_refused(topic: str, tokens: int) -> None:
    source = render([Promise(topic, 10), Async(())]).replace('"10"', f'"{tokens}"')
    assert _scan([source.encode()])[0] == Promise.clip(topic, tokens)
    assert round_length(tokens) in LENGTHS


def test_the_attributes_may_stand_in_either_order() -> None:
    assert parse('<promise tokens="20" topic="x y"/><async></async>') == (Promise("x y", 20), Async(()))


def test_a_tag_that_is_too_long_is_text() -> None:
    source = f'<promise topic="{"a" * TAG_LIMIT}" tokens="10"/>'
    assert _scan([source.encode()]) == (Text(source),)


@pytest.mark.parametrize(
    ("source", "position"),
    [
        ("a<promise>", 1),
        ('<promise topic="a" tokens="15"/><async></async>', 0),
        ('<promise topic="a b c d" tokens="10"/><async></async>', 0),
        ('<promise topic="a" tokens="10"/>x<async></async>', 32),
        ('<promise topic="a" tokens="10"/>', 0),
        ("<async></async>", 0),
        ("ab</async>", 2),
        ('<promise topic="a" tokens="10"/><async>b', 39),
        ("<sync>", 0),
    ],
)
def test_errors_say_where(source: str, position: int) -> None:
    with pytest.raises(LanguageError) as caught:
        parse(source)
    assert caught.value.position == position
    assert f"(at character {position})" in str(caught.value)


@pytest.mark.parametrize(
    ("topic", "tokens"),
    [
        ("", 10),
        ("a  b", 10),
        ("a b c d", 10),
        ("1. a b c d", 10),
        ("1.a b c d", 10),
        ("1.  a", 10),
        ("a", 0),
        ("a", 510),
    ],
)
def test_a_promise_outside_its_bounds_is_refused(topic: str, tokens: int) -> None:
    with pytest.raises(LanguageError):
        Promise(topic, tokens)


@given(st.sampled_from(["", "2. ", "12) ", "123. "]), st.lists(st.from_regex("[a-z]{1,9}", fullmatch=True), min_size=1))
def test_a_number_before_a_topic_is_not_one_of_its_words(number: str, words: list[str]) -> None:
    kept = number + " ".join(words[:MAX_TOPIC_WORDS])
    assert Promise.clip(number + " ".join(words), 10) == Promise(kept, 10)
    assert clip_topic(kept) == kept
    assert topic_key(kept) == " ".join(words[:MAX_TOPIC_WORDS])


def test_the_paper_example() -> None:
    source = '<promise topic="sleep" tokens="20"/><async>1. Sleep well.</async><sync/>That is all.'
    assert linearize(parse(source)) == (
        Promise("sleep", 20),
        AsyncOpen(),
        Text("1. Sleep well."),
        AsyncClose(),
        Sync(),
        Text("That is all."),
    )
    assert strip(parse(source)) == "1. Sleep well.That is all."


@pytest.mark.parametrize("piece", ["<", "<a", "<promise", "<sync/>", "<\\sync", '<promise topic="a" tokens="'])
def test_a_long_piece_is_scanned_in_one_pass(piece: str) -> None:
    """Were what is left copied for each tag, 1 MB would take minutes."""
    scanner = Scanner()
    marks = scanner.feed((piece * (1_000_000 // len(piece))).encode()) + scanner.flush()
    assert len(marks) >= 50_000 and scanner.held == ""
