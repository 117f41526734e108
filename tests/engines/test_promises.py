"""Guesses that know the form of a promise, and guesses that are never worth their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.events import Decoded, Forked, Path
from pastalm.core.layout import Placed, Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.core.vocabulary import Tags
from pastalm.engines.drafts.base import Context, Drafter, Evidence, SilentDrafter
from pastalm.engines.drafts.drafting import Drafting
from pastalm.engines.drafts.lookup import Lookup
from pastalm.engines.drafts.ngrams import NGrams
from pastalm.engines.drafts.promises import Promises
from pastalm.engines.drafts.response import Rates, ResponseDrafts
from pastalm.engines.scripted import byte_vocabulary
from pastalm.records.documents import parse
from pastalm.train.packing import unroll

VOCABULARY = byte_vocabulary()
assert VOCABULARY.tags is not None
TAGS: Tags = VOCABULARY.tags
REQUEST = Request(id="a", prompt_token_ids=(1, 2), params=SamplingParams(), vocabulary=VOCABULARY)

LIST = """Tips: <promise topic="1. Eat" tokens="40"/><async>1. Eat more.</async>\
<promise topic="2. Run" tokens="40"/><async>2. Run far.</async><sync/>Done."""


def told(text: str) -> Iterator[tuple[Path, int, int | None]]:
    """Thread and id of each token of a text in linear order, and what is guessed before it."""
    drafter = Promises(VOCABULARY)
    contexts: dict[Path, Context] = {}
    for event in unroll(parse(text), VOCABULARY, eos=min(VOCABULARY.eos)):
        path = event.path
        if isinstance(event, Forked):
            contexts[path] = replace(contexts[path[:-1]], path=path, index=0) if path else Context((), (), 0, 0)
        for token in (event.token,) if isinstance(event, Decoded) else event.forced:
            guess = drafter.guess(contexts[path])
            yield path, token, None if guess is None else guess[0]
            drafter.write(contexts[path], token, 0)
            contexts[path] = contexts[path].then(token)


def test_the_next_promise_and_the_beginning_of_a_chunk_are_guessed() -> None:
    right: dict[Path, list[int]] = {}
    for path, token, guess in told(LIST):
        if guess == token:
            right.setdefault(path, []).append(token)
    assert right[0,] == list(b"1. E") and right[1,] == list(b"2. R"), "as far as a tail reaches"
    assert right[()] == [TAGS.tokens, TAGS.promise, *b"2.", TAGS.tokens, *b"40", TAGS.promise_end]


def test_a_list_goes_on_with_its_next_number_after_a_text_too() -> None:
    text = LIST.replace("Done.", 'Then <promise topic="3. Rest" tokens="20"/><async>3. Rest.</async><sync/>')
    tokens = [(token, guess) for path, token, guess in told(text) if not path]
    third = [i for i, (token, _) in enumerate(tokens) if token == TAGS.promise][2]
    assert tokens[third + 1] == (ord("3"), ord("3"))


@pytest.mark.parametrize("topic", ["Eat well", "999. Eat", "x", "12"])
def test_a_topic_with_no_number_or_a_strange_one_is_no_fault(topic: str) -> None:
    pieces = [f'<promise topic="{topic} {i}" tokens="10"/><async>x</async>' for i in range(3)]
    assert list(told("".join(pieces) + "<sync/>"))


def test_nothing_is_guessed_without_tags() -> None:
    for vocabulary in (None, byte_vocabulary(prepared=False)):
        drafter, context = Promises(vocabulary), Context((), (), 0, 0)
        for token in (TAGS.promise, 49, 46, 50, 51, TAGS.tokens, 52, 48, TAGS.promise_end):
            assert drafter.guess(context) is None
            drafter.write(context, token, 0)
            context = context.then(token)


@given(st.lists(st.tuples(st.sampled_from([(), (0,), (1,), (0, 0)]), st.sampled_from([*TAGS, *b"12. a\xff", 256]))))
def test_any_tokens_may_come(written: Sequence[tuple[Path, int]]) -> None:
    """As from a model that keeps to no form. A guess is a token, and the same if asked again."""
    drafter = Promises(VOCABULARY)
    contexts = {path: Context(path, (), 0, 0) for path in [(), (0,), (1,), (0, 0)]}
    for path, token in written:
        drafter.write(contexts[path], token, 0)
        contexts[path] = contexts[path].then(token)
        for context in contexts.values():
            guess = drafter.guess(context)
            assert guess == drafter.guess(context) and (guess is None or 0 <= guess[0] < VOCABULARY.size)


# ------------------------------------------------------------------------------ all drafters together


def drafts(request: Request, drafter: Drafter | None = None) -> ResponseDrafts:
    written = NGrams()
    made = ResponseDrafts(request, written, [drafter or Lookup(written)], Rates())
    made.begin(())
    return made


def written(made: ResponseDrafts, tokens: Sequence[int]) -> Context:
    """Where the main thread stands that writes these."""
    for place, token in enumerate(tokens, len(REQUEST.prompt_token_ids)):
        made.write(Placed((), token, place, place, 0))
    return made.context((), -1)


@pytest.mark.parametrize("name", ["async_open", "async_close", "sync", "eos"])
@pytest.mark.parametrize("names", ["lookup", "answers"])
def test_a_token_behind_which_nothing_is_sampled_is_no_guess(name: str, names: str) -> None:
    """Nor does it take the place of one that may be right."""
    last = min(VOCABULARY.eos) if name == "eos" else getattr(TAGS, name)
    seen = [*b"abc", *b"ab", last, *b"ab"]
    for vocabulary, expected in ((VOCABULARY, ord("c")), (None, last)):
        request = replace(REQUEST, params=SamplingParams(drafts=names), vocabulary=vocabulary)
        drafting = Drafting(learns=True)
        for _ in range(2):  # the second answer is drafted from the first
            made = drafting.of(request)
            assert made is not None
            made.begin(())
            guess = made.best(written(made, seen))
            made.close()
        assert guess is not None and guess.token == expected


def test_no_drafter_may_guess_such_a_token() -> None:
    made = drafts(REQUEST, Constant(TAGS.async_close))
    assert made.best(made.context((), -1)) is None


@pytest.mark.parametrize(("positions", "goes_on"), [("promised", False), ("overlap", True)])
def test_no_guess_stands_behind_a_jump_of_positions(positions: Policy, goes_on: bool) -> None:
    made = drafts(replace(REQUEST, positions=positions))
    guess = made.best(written(made, [*b"ab", TAGS.promise_end, *b"ab"]))
    assert guess is not None and guess.token == TAGS.promise_end
    assert made.goes_on(guess) is goes_on


class Constant(SilentDrafter):
    """Always guesses the same; how far the thread has come is the evidence."""

    name = "constant"

    def __init__(self, token: int) -> None:
        self._token = token

    def guess(self, context: Context) -> tuple[int, Evidence]:
        return self._token, (1, context.index)


def test_guesses_behind_guesses_tell_their_hit_rates() -> None:
    """Those that a thread never comes to do not count."""
    made = drafts(REQUEST, Constant(7))
    context = made.context((), -1)
    for _ in range(4):
        guess = made.best(context)
        assert guess is not None
        context = context.then(guess.token)
    written(made, [7, 7, 8, 7])
    counts = made._rates.counts
    assert counts == {("constant", (1, 0)): [1, 1], ("constant", (1, 1)): [1, 1], ("constant", (1, 2)): [0, 1]}
