"""What the interpreter knows of a tokenizer; tags come from values, never from text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.language import LENGTHS, AsyncClose, AsyncOpen, Promise, Sync
from pastalm.core.vocabulary import TAG_TOKENS, Vocabulary
from pastalm.engines.scripted import byte_vocabulary
from pastalm.records.documents import Document, encode, linearize, strip
from tests.strategies import documents, texts

PREPARED = byte_vocabulary()
assert PREPARED.tags is not None
TAGS = PREPARED.tags


def test_the_six_tags_have_ids_of_their_own() -> None:
    assert list(TAG_TOKENS) == [
        "promise", "tokens", "promise_end", "async_open", "async_close", "sync"
    ]  # fmt: skip
    assert len({*TAGS, *PREPARED.eos}) == 7
    assert all(PREPARED.piece(token) == b"" for token in (*TAGS, *PREPARED.eos))
    assert byte_vocabulary(prepared=False).tags is None


def test_every_length_has_its_tokens() -> None:
    assert sorted(PREPARED.numbers.values()) == list(LENGTHS)
    assert PREPARED.numbers[tuple(b"120")] == 120


@given(texts)
def test_no_text_encodes_to_a_tag(text: str) -> None:
    assert not {*PREPARED.encode(text)} & {*TAGS, *PREPARED.eos}
    assert PREPARED.text(PREPARED.encode(text)) == text


@given(documents())
def test_a_document_has_as_many_tags_as_marks(document: Document) -> None:
    ids = encode(document, PREPARED)
    marks = linearize(document)
    for tag, kind in (
        (TAGS.promise, Promise),
        (TAGS.tokens, Promise),
        (TAGS.promise_end, Promise),
        (TAGS.async_open, AsyncOpen),
        (TAGS.async_close, AsyncClose),
        (TAGS.sync, Sync),
    ):
        assert ids.count(tag) == sum(isinstance(mark, kind) for mark in marks)


@given(documents())
def test_the_tokens_outside_promises_are_the_reader_text(document: Document) -> None:
    ids, inside = [], False
    for token in encode(document, PREPARED):
        inside = (inside or token == TAGS.promise) and token != TAGS.promise_end
        ids += [] if inside else [token]
    assert PREPARED.text(ids) == strip(document)


@given(st.lists(st.integers(0, 262)))
def test_any_ids_are_text(ids: list[int]) -> None:
    vocabulary: Vocabulary = PREPARED
    assert vocabulary.text(ids) == bytes(i for i in ids if i < 256).decode(errors="replace")
