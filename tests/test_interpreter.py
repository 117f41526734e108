"""SPEC "Threads", line by line. `Player` (tests/play.py) also holds every event here to the rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, SampledToken
from pastalm.core.interpreter import CHUNK_SLACK, Limits
from pastalm.core.language import LENGTHS, topic_key
from pastalm.errors import RequestError
from pastalm.records.xml import TAG_LIMIT
from tests.play import PREPARED, XML_BYTES, XML_PIECES, Player

assert PREPARED.tags is not None
TAGS = PREPARED.tags
EOS = 256
XML = '<promise topic="a" tokens="10"/>'


def _allows(player: Player, *tokens: int, path: tuple[int, ...] = ()) -> bool:
    allowed = player.allowed[path]
    assert allowed is not None
    return all(token in allowed for token in tokens)


def _kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


# ------------------------------------------------------------------------------ forks


def test_a_fork_follows_the_promise_and_forces_the_chunk_to_open() -> None:
    player = Player()
    assert player.promise("sleep", 20) == (0,)
    decoded, forked = player.events[-2:]
    assert isinstance(decoded, Decoded)
    assert decoded.token == TAGS.promise_end or decoded.forced[-1] == TAGS.promise_end
    assert isinstance(forked, Forked)
    assert (forked.topic, forked.promised, forked.forced) == ("sleep", 20, (TAGS.async_open,))


def test_the_parent_goes_on_beside_its_child() -> None:
    player = Player()
    child = player.promise()
    assert player.live == [(), child]
    player.say("on")
    player.say("chunk", child)
    assert (player.text(), player.text(child)) == ("on", "chunk")


def test_paths_count_the_promises_of_each_thread() -> None:
    player = Player(max_tokens=600)
    first, second = player.promise("a"), player.promise("b")
    player.sample(TAGS.async_close, first)
    player.sample(TAGS.async_close, second)
    player.sample(TAGS.sync)
    assert (first, second, player.promise("c")) == ((0,), (1,), (2,))


def test_a_child_does_not_see_the_end_that_its_parent_is_forced_to() -> None:
    """Where the grant takes all but the parent's end, the child still forks from the promise."""
    player = Player(max_tokens=600)
    parent = player.promise("a", 100)
    tag, grant, end = 6, 2 * 20 + CHUNK_SLACK, 2
    while player.interpreter.threads[parent].budget > tag + grant + end:
        player.sample(97, parent)
    child = player.promise("b", 20, parent)  # Player holds: forked right after the promise
    assert player.reasons() == {parent: "length"}
    assert player.live == [(), child]


# ------------------------------------------------------------------------------ syncs


def test_a_sync_blocks_until_every_child_has_ended_and_is_fed_then() -> None:
    player = Player(max_tokens=600)
    first, second = player.promise("a"), player.promise("b")
    assert player.sample(TAGS.sync) == [Blocked(path=(), on="sync")]
    assert player.live == [first, second]
    assert _kinds(player.sample(TAGS.async_close, second)) == ["decoded", "finished"]
    _, _, joined = player.sample(TAGS.async_close, first)
    assert isinstance(joined, Joined)
    assert (joined.path, joined.children, joined.forced) == ((), (first, second), (TAGS.sync,))


def test_a_sync_over_finished_children_joins_at_once() -> None:
    player = Player()
    child = player.promise()
    player.sample(TAGS.async_close, child)
    (joined,) = player.sample(TAGS.sync)
    assert isinstance(joined, Joined)
    assert (joined.children, joined.forced) == ((child,), (TAGS.sync,))


def test_several_syncs_join_each_child_once() -> None:
    player = Player(max_tokens=600)
    for k in range(3):
        child = player.promise("again")
        player.sample(TAGS.async_close, child)
        (joined,) = player.sample(TAGS.sync)
        assert isinstance(joined, Joined)
        assert joined.children == ((k,),)


def test_a_sync_needs_unjoined_children() -> None:
    player = Player()
    assert not _allows(player, TAGS.sync)
    assert _kinds(player.sample(TAGS.sync)) == ["decoded"]  # of an engine without masks
    child = player.promise()
    assert _allows(player, TAGS.sync)
    assert not _allows(player, TAGS.sync, path=child)


def test_nested_promises_join_into_the_child() -> None:
    player = Player(max_tokens=900)
    child = player.promise("a", 100)
    inner = player.promise("b", 10, child)
    assert inner == (0, 0)
    player.sample(TAGS.sync, child)
    assert player.live == [(), inner]
    joined = player.sample(TAGS.async_close, inner)[-1]
    assert isinstance(joined, Joined)
    assert (joined.path, joined.children) == (child, (inner,))


# ------------------------------------------------------------------------------ ends


def test_the_end_of_a_thread_joins_nothing_and_waits_for_nobody() -> None:
    player = Player(max_tokens=900)
    child = player.promise("a", 100)
    inner = player.promise("b", 10, child)
    assert _kinds(player.sample(TAGS.async_close, child)) == ["decoded", "finished"]
    joined = player.sample(TAGS.sync)[-1]
    assert isinstance(joined, Joined)
    assert joined.children == (child,)
    player.sample(EOS)
    assert player.live == [inner]
    player.sample(TAGS.async_close, inner)
    assert player.interpreter.finished
    assert set(player.reasons().values()) == {"stop"}


def test_the_response_ends_once_every_thread_has() -> None:
    player = Player()
    child = player.promise()
    assert _kinds(player.sample(EOS)) == ["decoded", "finished"]
    assert not player.interpreter.finished
    player.sample(TAGS.async_close, child)
    assert player.interpreter.finished


def test_a_thread_that_has_ended_or_waits_hears_nothing() -> None:
    player = Player()
    child = player.promise()
    player.sample(TAGS.sync)
    sampled = SampledToken(request_id="r", path=(), token=97)
    for path in ((), (7,)):
        assert player.interpreter.advance(replace(sampled, path=path)) == []
    player.sample(TAGS.async_close, child)
    assert player.interpreter.advance(replace(sampled, path=child)) == []


def test_who_may_end_how() -> None:
    player = Player()
    child = player.promise()
    assert _allows(player, EOS)
    assert not _allows(player, TAGS.async_close)
    assert _allows(player, TAGS.async_close, path=child)
    assert not _allows(player, EOS, path=child)


def test_ignore_eos_forbids_the_end_of_the_main_thread() -> None:
    player = Player(ignore_eos=True, max_tokens=9)
    assert not _allows(player, EOS)
    player.run(lambda p: (p.live[0], EOS))
    assert player.reasons() == {(): "length"}


@pytest.mark.parametrize("reason", ["abort", "stop"])
def test_finish_ends_threads_in_every_state(reason: str) -> None:
    player = Player(max_tokens=900, limits=Limits(max_threads=1))
    player.promise("a")
    player.promise("b")
    player.sample(TAGS.sync)
    assert sorted(player.state.values()) == ["live", "sync", "thread"]
    assert len(player.finish(reason)) == 3  # type: ignore[arg-type]
    assert set(player.reasons().values()) == {reason}
    assert player.interpreter.finished
    assert player.finish() == []


# ------------------------------------------------------------------------------ grammar


def test_a_chunk_is_never_opened_by_sampling() -> None:
    player = Player()
    child = player.promise()
    assert not _allows(player, TAGS.async_open)
    assert not _allows(player, TAGS.async_open, path=child)


def test_inside_a_tag_only_its_next_parts() -> None:
    player = Player()
    player.sample(TAGS.promise)
    assert _allows(player, *range(256))
    assert not any(_allows(player, t) for t in (*TAGS, EOS))  # a topic is not empty
    player.say("x")
    assert _allows(player, TAGS.tokens)
    assert not any(_allows(player, t) for t in (*TAGS, EOS) if t != TAGS.tokens)
    player.sample(TAGS.tokens)
    assert [i for i in range(263) if _allows(player, i)] == [*b"12345678"]  # what 200 can afford
    player.say("2")
    assert player.events[-1].forced == (48, TAGS.promise_end) or _allows(player, 48)


def test_every_length_can_be_promised() -> None:
    for length in LENGTHS:
        player = Player(max_tokens=2000)
        player.promise("a", length)
        forked = player.events[-1]
        assert isinstance(forked, Forked)
        assert forked.promised == length


def test_a_topic_is_cut_at_eight_tokens() -> None:
    player = Player()
    player.sample(TAGS.promise)
    player.say("abcdefgh")
    decoded = player.events[-1]
    assert isinstance(decoded, Decoded)
    assert decoded.forced == (TAGS.tokens,)


def test_a_topic_has_three_words() -> None:
    player = Player()
    player.sample(TAGS.promise)
    player.say("a b c d")
    cut = next(e for e in player.events if isinstance(e, Decoded) and e.token == TAGS.tokens)
    assert cut.text == ""
    forked = next(e for e in [*player.events, *player.say("10")] if isinstance(e, Forked) and e.path)
    assert forked.topic == "a b c"


def test_a_number_is_not_one_of_a_topics_words() -> None:
    player = Player()
    player.sample(TAGS.promise)
    player.say("2. a b c")
    forked = next(e for e in [*player.events, *player.say("10")] if isinstance(e, Forked) and e.path)
    assert forked.topic == "2. a b c"


@pytest.mark.parametrize("again", ["Ab", "aB ", " ab"])
def test_topics_of_unjoined_siblings_are_distinct(again: str) -> None:
    player = Player(max_tokens=600)
    child = player.promise("ab")
    player.sample(TAGS.promise)
    player.say(again)
    assert not _allows(player, TAGS.tokens)
    player.sample(TAGS.tokens)  # of an engine without masks: a digit tells them apart
    assert _allows(player, TAGS.tokens)
    second = player.promised(10, ())
    topics = {e.path: topic_key(e.topic) for e in player.events if isinstance(e, Forked)}
    assert topics[child] == "ab"
    assert topics[second].startswith("ab")
    assert topics[second].endswith("2")


def test_a_number_does_not_make_a_topic_and_a_chunk_does_not_promise_itself() -> None:
    player = Player(max_tokens=600)
    child = player.promise("1. ab")
    player.sample(TAGS.promise)
    player.say("2.")
    assert not _allows(player, TAGS.tokens)
    player.say(" ab")
    assert not _allows(player, TAGS.tokens)
    player.sample(TAGS.promise, child)
    player.say("3) AB", child)
    assert not _allows(player, TAGS.tokens, path=child)


def test_a_promise_opens_only_where_a_chunk_like_the_last_one_fits() -> None:
    player = Player(max_tokens=400)
    player.promise("ab", 100)
    assert not _allows(player, TAGS.promise)
    player = Player(max_tokens=400)
    player.promise("ab", 50)
    assert _allows(player, TAGS.promise)


def test_sixteen_equal_topics_become_sixteen_topics() -> None:
    player = Player(max_tokens=4000)
    while _allows(player, TAGS.promise):
        player.promise("samesame", 10)
    topics = [e.topic for e in player.events if isinstance(e, Forked) and e.path]
    assert len(topics) == len(set(topics)) == 16


def test_a_topic_may_come_again_after_the_sync() -> None:
    player = Player(max_tokens=600)
    player.sample(TAGS.async_close, player.promise("ab"))
    player.sample(TAGS.sync)
    player.say([TAGS.promise, *b"ab"])
    assert _allows(player, TAGS.tokens)


@pytest.mark.parametrize("most", [0, 1, 16])
def test_at_most_so_many_promises_in_a_group(most: int) -> None:
    player = Player(max_tokens=4000, limits=Limits(max_promises=most))
    for k in range(most):
        assert _allows(player, TAGS.promise)
        player.promise(f"t{k}")
    assert not _allows(player, TAGS.promise)
    assert Limits().max_promises == 16


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_promise_at_the_greatest_depth(depth: int) -> None:
    player = Player(max_tokens=4000, limits=Limits(max_depth=depth))
    path: tuple[int, ...] = ()
    for _ in range(depth):
        path = player.promise("abc"[len(path)], 200 // (1 + 4 * len(path)) // 10 * 10, path)
    assert not _allows(player, TAGS.promise, path=path)
    assert _kinds(player.sample(TAGS.promise, path)) == ["decoded"]  # of an engine without masks


@pytest.mark.parametrize("vocabulary", [PREPARED, XML_PIECES])
def test_parallelism_zero_turns_forking_off(vocabulary: object) -> None:
    player = Player(vocabulary, parallelism=0.0)  # type: ignore[arg-type]
    if player.vocabulary.tags:
        assert not _allows(player, TAGS.promise)
        assert not _allows(player, TAGS.sync)
        player.say([TAGS.promise, 97, TAGS.tokens, 49, 48, TAGS.promise_end])
    else:
        player.say(XML + "é<sync/>")
        assert player.text() == XML + "é<sync/>"
    assert list(player.state) == [()]


# ------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(("tokens", "cap"), [(10, 1024), (50, 1024), (50, 40)])
def test_a_child_gets_its_grant_and_its_parent_what_is_left(tokens: int, cap: int) -> None:
    player = Player(max_tokens=400, limits=Limits(max_chunk_tokens=cap))
    grant = min(cap, 2 * tokens + CHUNK_SLACK)
    child = player.promise("a", tokens)
    main = player.interpreter.threads[()]
    assert main.budget == 400 - player.tokens - grant + 1  # the forced <|async|> is the child's
    while child in player.live:
        player.sample(97, child)
    spent = sum(len(e.forced) + isinstance(e, Decoded) for e in player.events if e.path == child)
    assert spent == grant
    assert player.reasons()[child] == "length"


@pytest.mark.parametrize(("said", "newline"), [("a", "\n"), (" ", ""), ("é", "\n"), ("\n", "")])
def test_a_cap_forces_the_end_of_the_chunk(said: str, newline: str) -> None:
    """Behind a newline where it would end in the middle of a line; nothing runs into it in either case."""
    player = Player()
    child = player.promise("a", 10)
    while child in player.live:
        player.sample(said.encode()[player.interpreter.threads[child].budget % len(said.encode())], child)
    finished = next(e for e in player.events if isinstance(e, Finished))
    assert (finished.path, finished.reason) == (child, "length")
    assert finished.forced == (*newline.encode(), TAGS.async_close)
    assert finished.text == newline


def test_a_chunk_that_ends_inside_a_line_ends_it() -> None:
    player = Player(max_tokens=600)
    first, second = player.promise("a", 20), player.promise("b", 20)
    player.say("3. Venmo", first)
    decoded, finished = player.sample(TAGS.async_close, first)
    assert isinstance(decoded, Decoded)
    assert isinstance(finished, Finished)
    assert (decoded.token, decoded.forced, decoded.replaced) == (10, (TAGS.async_close,), True)
    assert (decoded.text, decoded.logprob, finished.text) == ("", None, "\n")
    player.say("4. Zelle ", second)
    assert player.sample(TAGS.async_close, second)[0].forced == ()
    assert (player.text(first), player.text(second)) == ("3. Venmo\n", "4. Zelle ")


def test_the_newline_of_a_chunk_in_xml_stands_behind_the_tag_that_was_written() -> None:
    player = Player(XML_BYTES)
    player.say(XML)
    *_, finished = player.say("b</async>", (0,))
    assert isinstance(finished, Finished)
    assert (finished.forced, finished.text) == ((10,), "\n")


def test_a_chunk_that_ends_in_a_chunk_needs_no_newline_of_its_own() -> None:
    player = Player(max_tokens=900)
    child = player.promise("a", 100)
    player.say("b", child)
    inner = player.promise("b", 10, child)
    assert _kinds(player.sample(TAGS.async_close, child)) == ["decoded", "finished"]
    player.sample(TAGS.async_close, inner)
    assert (player.text(child), player.text(inner)) == ("b", "\n")


def test_an_empty_chunk_gets_a_newline_only_inside_a_line() -> None:
    player = Player(max_tokens=900)
    first = player.promise("a", 20)
    player.say("b ")
    second = player.promise("b", 20)
    player.say("c")
    third = player.promise("c", 20)
    assert [player.sample(TAGS.async_close, path)[-1].forced for path in (first, second, third)] == [()] * 3
    assert [player.text(path) for path in (first, second, third)] == ["", "", "\n"]


def test_what_a_child_leaves_returns_at_the_join() -> None:
    player = Player(max_tokens=200)
    child = player.promise("a", 50)
    player.sample(TAGS.async_close, child)
    player.sample(TAGS.sync)
    assert player.interpreter.threads[()].budget == 200 - player.tokens


def test_a_thread_whose_children_hold_the_rest_joins_them_before_it_is_cut_off() -> None:
    player = Player(max_tokens=200)
    child = player.promise("a", 50)
    while () in player.live and _allows(player, 97):
        player.sample(97)
    assert [i for i in range(263) if _allows(player, i)] == [TAGS.sync]
    player.sample(TAGS.sync)
    player.sample(TAGS.async_close, child)
    player.run(lambda p: (p.live[0], 97))
    assert player.tokens == 200
    assert player.reasons() == {(0,): "stop", (): "length"}


def test_an_unprepared_model_is_made_to_join_them() -> None:
    """What it has begun of a tag is text then."""
    player = Player(XML_BYTES, max_tokens=200)
    player.say(XML)
    left = player.interpreter.threads[()].budget - len("<sync/>")
    player.say("x" * (left - 4) + "<pro")
    assert player.events[-1] == Blocked(path=(), on="sync")
    *_, joined = player.sample(EOS, (0,))
    assert isinstance(joined, Joined)
    assert bytes(joined.forced) == b"<sync/>"
    player.run(lambda p: (p.live[0], 97))
    assert player.tokens == 200
    assert player.text() == "x" * (left - 4) + "<pro" + "a" * (199 - len(XML) - left - len("<async><sync/>"))
    assert player.reasons() == {(0,): "stop", (): "length"}


def test_every_token_may_be_used_and_no_more() -> None:
    player = Player(max_tokens=77)
    player.sample(TAGS.async_close, player.promise("a", 10))
    player.sample(TAGS.sync)
    player.run(lambda p: (p.live[0], 97))
    assert player.tokens == 77
    assert player.reasons() == {(0,): "stop", (): "length"}


def test_a_fork_that_the_rest_cannot_afford_is_not_offered() -> None:
    for budget in range(1, 90):
        player = Player(max_tokens=budget)
        if _allows(player, TAGS.promise):
            player.sample(TAGS.promise)
            player.say("abcdefgh")
            while () in player.live and not any(e.path for e in player.events):
                player.sample(49)
            assert player.interpreter.threads[()].budget >= 0
            break
    assert budget == 3 + 8 + 4 + 3 + 2 * 10 + CHUNK_SLACK + 1


def test_a_length_that_the_rest_cannot_afford_is_not_offered() -> None:
    player = Player(max_tokens=100)
    player.say([TAGS.promise, 97, TAGS.tokens])
    assert not _allows(player, 53)
    assert _allows(player, 49)


def test_no_fork_beyond_the_positions_of_the_model() -> None:
    assert not _allows(Player(max_tokens=500, limits=Limits(max_position=40)), TAGS.promise)
    player = Player(max_tokens=4000, limits=Limits(max_position=100))
    assert _allows(player, TAGS.promise)  # max_tokens alone takes no fork away
    player.promise("a", 10)
    player.run(lambda p: (p.live[0], 97))
    assert set(player.reasons().values()) == {"length"}
    assert max(player.positions("promised")) < 100


def test_an_unfinished_tag_at_a_cap_is_dropped() -> None:
    player = Player(XML_BYTES, max_tokens=12)
    player.say("Hi <promise ")
    assert player.text() == "Hi "
    assert player.reasons() == {(): "length"}


@pytest.mark.parametrize("bad", [{"max_threads": 0}, {"max_depth": -1}, {"max_chunk_tokens": 7}])
def test_bounds_that_make_no_sense_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        Limits(**bad)


# ------------------------------------------------------------------------------ places


def test_a_child_beyond_the_places_queues_until_a_thread_ends() -> None:
    player = Player(max_tokens=600, limits=Limits(max_threads=2))
    first, second = player.promise("a"), player.promise("b")
    assert player.events[-1] == Blocked(path=second, on="thread")
    assert player.live == [(), first]
    begun = player.sample(TAGS.async_close, first)[-1]
    assert isinstance(begun, Joined)
    assert (begun.path, begun.children, begun.forced) == (second, (), (TAGS.async_open,))


def test_blocked_threads_take_no_place() -> None:
    player = Player(max_tokens=900, limits=Limits(max_threads=1))
    child = player.promise("a", 100)
    assert player.live == [()]
    player.sample(TAGS.sync)
    assert player.live == [child]
    inner = player.promise("b", 10, child)
    player.sample(TAGS.sync, child)
    assert player.live == [inner]
    player.sample(TAGS.async_close, inner)
    player.sample(TAGS.async_close, child)
    assert player.live == [()]


def test_a_parent_whose_children_are_done_waits_for_a_place_too() -> None:
    player = Player(max_tokens=900, limits=Limits(max_threads=2))
    first, second = player.promise("a", 100), player.promise("b")
    player.sample(TAGS.sync)
    assert player.live == [first, second]
    inner = player.promise("c", 10, first)
    assert player.state[inner] == "thread"
    player.sample(TAGS.async_close, first)
    player.sample(TAGS.async_close, second)
    assert sorted(player.live) == [(), inner]


# ------------------------------------------------------------------------------ text and XML


def test_a_character_split_across_tokens_is_one_character() -> None:
    player = Player()
    player.say("漢é")
    assert [e.text for e in player.events if isinstance(e, Decoded)] == ["", "", "漢", "", "é"]
    player.say([0xE6, EOS])
    assert player.text() == "漢é\ufffd"


@pytest.mark.parametrize("vocabulary", [XML_BYTES, XML_PIECES])
def test_an_unprepared_model_forks_syncs_and_ends(vocabulary: object) -> None:
    player = Player(vocabulary, max_tokens=400)  # type: ignore[arg-type]
    player.say("Two: " + XML)
    assert player.live == [(), (0,)]
    forked = player.events[-1]
    assert isinstance(forked, Forked)
    assert player.vocabulary.text(forked.forced) == "<async>"
    player.say("on<sync/>")
    assert player.live == [(0,)]
    player.say("child</async>", (0,))
    joined = player.events[-1]
    assert isinstance(joined, Joined)
    player.say("end")
    player.sample(EOS)
    assert (player.text(), player.text((0,))) == ("Two: onend", "child\n")
    assert set(player.reasons().values()) == {"stop"}


@pytest.mark.parametrize("cut", range(1, len(XML)))
def test_a_tag_is_found_wherever_tokens_split_it(cut: int) -> None:
    pieces = [b"a " + XML[:cut].encode(), XML[cut:].encode() + b" b"]
    vocabulary = replace(XML_BYTES, size=259, piece=lambda i: pieces[i - 257] if i > 256 else bytes([i]))
    player = Player(vocabulary)
    player.say([257, 258, 33])
    forked = [e for e in player.events if isinstance(e, Forked) and e.path]
    assert [(f.topic, f.promised) for f in forked] == [("a", 10)]
    assert player.text() == "a  b!"
    after = player.events[player.events.index(forked[0]) + 1]
    assert isinstance(after, Decoded)
    assert after.text == " b!", "what the token holds beyond the tag stands behind the chunk"


def test_a_tag_may_end_inside_a_token() -> None:
    player = Player(XML_PIECES)
    player.say(XML + "\n")
    assert (0,) in player.live
    player.say("b")
    assert player.text() == "\nb"


def test_a_sync_inside_a_token_keeps_the_text_around_it() -> None:
    player = Player(XML_PIECES)
    player.say(XML)
    player.say("x. <sync/>Now")
    player.say("y</async>", (0,))
    player.say("b")
    player.sample(EOS)
    assert player.text() == "x. Nowb"


def test_a_chunk_may_end_in_the_token_that_promises() -> None:
    player = Player(XML_PIECES, max_tokens=600)
    player.say('<promise topic="a" tokens="100"/>')
    player.say('<promise topic="b" tokens="10"/></async>', (0,))
    assert player.reasons() == {(0,): "stop"}
    assert player.live == [(), (0, 0)]
    assert player.text((0,)) == ""


def test_the_end_token_ends_a_child_of_an_unprepared_model() -> None:
    player = Player(XML_BYTES)
    player.say(XML)
    player.say("some <b", (0,))
    player.sample(EOS, (0,))
    assert player.reasons() == {(0,): "stop"}
    assert player.text((0,)) == "some <b\n"


@pytest.mark.parametrize(
    "malformed",
    ['<promise topic="a">', '<promise tokens="1"/>', "<promise", "<asyncx>", "<sync>", "a < b <p> </", "<pro"]
    + ['<promise topic="a\n" tokens="10"/>', "<promise " + "x" * TAG_LIMIT],
)
def test_malformed_tags_stay_text(malformed: str) -> None:
    for vocabulary in (XML_BYTES, XML_PIECES):
        player = Player(vocabulary, max_tokens=400)
        player.say(malformed)
        player.sample(EOS)
        assert player.text() == malformed
        assert list(player.state) == [()]


@pytest.mark.parametrize("limits", [Limits(max_depth=0), Limits(max_promises=0), Limits(max_chunk_tokens=15)])
def test_a_promise_that_cannot_be_kept_stays_text(limits: Limits) -> None:
    """Of 15 tokens a chunk needs 15 for its tags alone, in bytes."""
    player = Player(XML_BYTES, limits=limits)
    player.say(XML + "b")
    assert player.text() == XML + "b"
    assert list(player.state) == [()]


def test_a_second_equal_topic_stays_text() -> None:
    player = Player(XML_BYTES, max_tokens=400)
    player.say(XML + XML)
    assert player.text() == XML
    assert list(player.state) == [(), (0,)]


def test_stray_chunk_tags_are_left_out() -> None:
    player = Player(XML_BYTES)
    player.say("a<async>b</async>c<sync/>d")
    assert player.text() == "abcd"


def test_what_would_repeat_a_siblings_topic_is_not_offered() -> None:
    player = Player(max_tokens=600)
    player.promise("1. ab")
    player.sample(TAGS.promise)
    player.say("2. ")
    assert _allows(player, *b"aAb")  # a byte is a token here: "ab" is not repeated by its "a"
    player.say("A")
    assert not _allows(player, *b"b")
    assert not _allows(player, *b"B")
    assert _allows(player, *b"c", TAGS.tokens)
    player.say("B")  # of an engine without masks
    assert not _allows(player, TAGS.tokens)
    assert not _allows(player, *b"7")
    assert _allows(player, *b"c")
