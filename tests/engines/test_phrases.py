"""The table of phrases: what is kept of some texts, and for which vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pastalm.core.params import Request, SamplingParams
from pastalm.engines.drafts import phrases
from pastalm.engines.drafts.base import Context
from pastalm.engines.drafts.drafting import Drafting
from pastalm.engines.scripted import byte_vocabulary

VOCABULARY = byte_vocabulary()
TEXTS = [VOCABULARY.encode(text) for text in ["it is the same. "] * 6 + ["that is so. "] * 3 + ["is it? "]]


def guess(table: phrases.Table, text: str) -> tuple[str, int] | None:
    found = phrases.Phrases(table).guess(Context((), tuple(VOCABULARY.encode(text))[-4:], 0, 0))
    return None if found is None else (chr(found[0]), found[1][1])


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[phrases.Table]:
    monkeypatch.setattr(phrases, "FOLDER", tmp_path)
    monkeypatch.setattr(phrases, "LEAST", 4)
    phrases.table_of.cache_clear()
    contexts = phrases.write(tmp_path / f"{phrases.fingerprint(VOCABULARY)}.npz", TEXTS)
    assert contexts == len(phrases.table_of(VOCABULARY)) > 0
    yield phrases.table_of(VOCABULARY)
    phrases.table_of.cache_clear()


def test_what_is_frequent_and_sure_is_kept(table: phrases.Table) -> None:
    assert guess(table, "the sa") == ("m", 8), "6 of 6, a little less since few were seen"
    assert guess(table, "it is ") == ("t", 5), "6 of 9"
    assert guess(table, "that i") == guess(table, "it i") == ("s", 8), "3 are too few: a shorter context speaks"
    assert guess(table, "that") is None


def test_a_longer_context_is_there_where_it_says_more(table: phrases.Table) -> None:
    tails = [tuple(VOCABULARY.encode(text)) for text in ("same", "ame", "me")]
    assert [tail in table for tail in tails] == [False, False, True]


def test_a_table_is_for_its_own_vocabulary(table: phrases.Table) -> None:
    other = replace(VOCABULARY, piece=lambda token: bytes([255 - token]) if token < 256 else b"")
    assert table and not phrases.table_of(other)
    assert phrases.fingerprint(replace(VOCABULARY, size=VOCABULARY.size + 6)) == phrases.fingerprint(VOCABULARY)


@pytest.mark.parametrize("learns", [True, False])
def test_they_are_guessed_from_where_there_are_some(table: phrases.Table, learns: bool) -> None:
    request = Request(
        id="a",
        prompt_token_ids=tuple(VOCABULARY.encode("Say: the s")),
        params=SamplingParams(drafts="auto", max_tokens=9),
        vocabulary=VOCABULARY,
    )
    drafts = Drafting(learns=learns).of(request)
    assert drafts is not None
    found = drafts.best(drafts.context((), 0))
    assert found is not None and (found.token, found.drafter) == (ord("a"), "phrases")
    without = Drafting(learns=learns).of(replace(request, vocabulary=None))
    assert without is not None and without.best(without.context((), 0)) is None
