"""Law 5: any stream of sampled tokens ends every thread within its budgets; no transcript raises."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pastalm.core.events import Decoded, Event, Finished, Forked, Path
from pastalm.core.interpreter import Limits
from pastalm.core.language import AsyncClose, Sync, Text
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary
from pastalm.records.documents import Document, linearize, nest, parse, strip
from pastalm.records.transcripts import linear_tokens, summary
from tests.fuzz_interpreter import play
from tests.play import PREPARED, XML_BYTES, XML_PIECES, Player

assert PREPARED.tags is not None
TAGS = PREPARED.tags
PROMISE = (TAGS.promise, 97, TAGS.tokens, 49, 48, TAGS.promise_end)

limits = st.builds(
    Limits,
    max_threads=st.integers(1, 5),
    max_depth=st.integers(0, 3),
    max_promises=st.integers(0, 18),
    max_chunk_tokens=st.sampled_from([8, 9, 20, 36, 200]),
    max_position=st.none() | st.integers(40, 400),
)
"""`max_position` starts above the prompt, as an engine makes sure."""


def _streams(vocabulary: Vocabulary) -> st.SearchStrategy[list[tuple[int, int]]]:
    """(which live thread, token) again and again; tags far likelier than chance would have them."""
    likely = [*PROMISE, 98, 32, 0xC3, 50, 53, 65, 256, TAGS.sync, TAGS.async_close, TAGS.async_open]
    if vocabulary.tags is None:
        likely = [*range(256, vocabulary.size)] + [*b'<promise topic="a" tokens="10"/></>']
    token = st.sampled_from(likely) | st.integers(0, vocabulary.size - 1)
    return st.lists(st.tuples(st.integers(0, 9), token), min_size=1, max_size=80)


def _play(player: Player, stream: list[tuple[int, int]], honour: bool, stop: int = 10**6) -> None:
    turn = 0

    def choose(player: Player) -> tuple[Path, int]:
        nonlocal turn
        which, token = stream[turn % len(stream)]
        turn += 1
        path = player.live[which % len(player.live)]
        allowed = player.allowed[path]
        if honour and allowed is not None and token not in allowed:
            choices = [i for i in range(player.vocabulary.size) if i in allowed]
            assert choices, "a thread that lives may sample something"
            token = choices[token % len(choices)]
        return path, token

    while player.live and turn < stop:
        path, token = choose(player)
        _obeyed(player, player.allowed[path], player.sample(token, path), honour)
    if player.live:
        player.finish()
        assert {r for p, r in player.reasons().items() if player.events[-1].path == p} == {"abort"}


def _obeyed(player: Player, allowed: object, events: list[Event], honour: bool) -> None:
    """A stream that keeps to the masks gets only tokens that the masks allow."""
    if honour and events and isinstance(events[0], Decoded) and player.vocabulary.tags:
        assert allowed is None or events[0].token in allowed  # type: ignore[operator]
        assert events[0].token != TAGS.async_open


def _ended(player: Player) -> None:
    assert player.interpreter.finished
    ends = [event.path for event in player.events if isinstance(event, Finished)]
    assert sorted(ends) == sorted(player.state)
    assert player.interpreter.finish("abort") == []
    limit = player.limits.max_position
    if limit is not None:
        for policy in ("promised", "overlap"):
            assert max(player.positions(policy), default=0) < limit


def _apart(document: Document) -> None:
    """Nothing runs into a chunk: where one ends, the text so far ends in white space."""
    last = " "
    for mark in linearize(document):
        last = mark.text[-1] if isinstance(mark, Text) else last
        assert not isinstance(mark, AsyncClose) or last.isspace()


def _told(player: Player) -> None:
    """The transcript of it holds together."""
    transcript = Transcript(player.events)
    if "abort" not in player.reasons().values():
        _apart(nest(transcript.marks()))
    assert parse(transcript.annotated) == nest(transcript.marks())
    assert strip(nest(transcript.marks())) == transcript.text == transcript.settled
    assert transcript.tokens == player.tokens == len(list(linear_tokens(transcript)))
    assert transcript.critical_path <= transcript.tokens
    assert transcript.finished
    assert transcript.finish_reason in player.reasons().values()
    summary(transcript)
    length = len(transcript.text)
    for cut in {0, length // 3, length // 2, length - 1, length} - {-1}:
        transcript.cut = cut
        assert strip(parse(transcript.annotated)) == transcript.text


def _fair(vocabulary: Vocabulary) -> st.SearchStrategy[Player]:
    return st.builds(
        Player,
        st.just(vocabulary),
        st.integers(1, 300),
        limits,
        parallelism=st.sampled_from([1.0, 1.0, 1.0, 0.0]),
        ignore_eos=st.booleans(),
    )


@settings(max_examples=200)
@given(_fair(PREPARED), _streams(PREPARED), st.booleans())
@example(Player(max_tokens=116, limits=Limits(max_chunk_tokens=8)), [(0, 32), (0, 257), (0, 125)], True)
def test_a_prepared_model_ends(player: Player, stream: list[tuple[int, int]], honour: bool) -> None:
    _play(player, stream, honour)
    _ended(player)
    _told(player)


@settings(max_examples=200)
@given(_fair(PREPARED), _streams(PREPARED), st.booleans())
@example(Player(max_tokens=200), [*((0, token) for token in PROMISE), (1, TAGS.async_close), *[(0, 97)] * 74], False)
def test_no_thread_is_cut_off_while_its_children_hold_its_budget(
    player: Player, stream: list[tuple[int, int]], honour: bool
) -> None:
    """It joins them first, unless its last promise took all but its end."""
    _play(player, stream, honour)
    for path, reason in player.reasons().items():
        thread = player.interpreter.threads[path]
        if reason == "length" and player.limits.max_position is None:
            end = next(i for i, e in enumerate(player.events) if isinstance(e, Finished) and e.path == path)
            before = player.events[end - 1]
            assert not thread.group or isinstance(before, Forked) and before.path[:-1] == path


@settings(max_examples=200)
@given(st.sampled_from([XML_BYTES, XML_PIECES]).flatmap(lambda v: st.tuples(_fair(v), _streams(v))))
def test_an_unprepared_model_ends(drawn: tuple[Player, list[tuple[int, int]]]) -> None:
    player, stream = drawn
    assert player.allowed[()] is None
    _play(player, stream, honour=False)
    _ended(player)
    _told(player)


@given(
    st.sampled_from([PREPARED, XML_PIECES]).flatmap(lambda v: st.tuples(_fair(v), _streams(v))),
    st.integers(0, 100),
)
def test_an_early_stop_aborts_every_thread(drawn: tuple[Player, list[tuple[int, int]]], stop: int) -> None:
    player, stream = drawn
    _play(player, stream, honour=True, stop=stop)
    _ended(player)
    _told(player)


@given(st.integers(0, 4), st.integers(1, 3), st.sampled_from([10, 40, 200]))
def test_greedy_promisers_end(depth: int, threads: int, cap: int) -> None:
    """A model that only ever promises, in every thread, as wide and as deep as it may."""
    player = Player(max_tokens=900, limits=Limits(max_depth=depth, max_threads=threads, max_chunk_tokens=cap))
    _play(player, [(i, token) for i in range(3) for token in (*PROMISE, TAGS.sync)], honour=True)
    _ended(player)
    _told(player)
    assert any(isinstance(node, Sync) for node in nest(Transcript(player.events).marks())) <= (depth > 0)


@given(st.integers(0, 2**63))
def test_random_streams_end(seed: int) -> None:
    """The streams of tests/fuzz_interpreter.py, a few of them."""
    assert play(seed)["streams"] == 1
