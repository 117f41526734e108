"""Pictures of any response fit the terminal and lose no text; plain output is the text, in order."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from pastalm.cli.view import Live, Plain, View, figures
from pastalm.core.driver import Driver
from pastalm.core.events import Decoded, Event, Forked
from pastalm.core.language import Promise, Sync, Text
from pastalm.core.params import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.records.documents import Async, Document, Node, normalize

WIDTH = 90
PIECES = (
    "One. ",
    "- two\n",
    "a longer sentence that has to be wrapped somewhere. ",
    "漢字 é ",
    "<sync ",
    "\n\n",
)


def random_document(seed: int, depth: int = 2) -> Document:
    """A document with up to four parts, its chunks too."""
    chance = random.Random(seed)
    nodes: list[Node] = []
    for part in range(chance.randint(1, 4)):
        if depth and chance.random() < 0.6:
            body = random_document(chance.getrandbits(32), depth - 1)
            nodes += [Promise(f"topic {part}", 10 * chance.randint(1, 50)), Async(body)]
        elif depth and nodes and chance.random() < 0.3:
            nodes.append(Sync())
        else:
            nodes.append(Text("".join(chance.choices(PIECES, k=1))))
    return normalize(nodes)


random_documents = st.integers(0, 2**32).map(random_document)
few = settings(max_examples=25)


def played(script: Document | str, *, stop: tuple[str, ...] = (), max_tokens: int = 20000) -> list[Event]:
    """The events of a script, its threads in lockstep."""
    driver = Driver(
        ScriptedEngine(byte_vocabulary(), [script]),
        byte_vocabulary(),
    )
    running = driver.submit([1], SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop))
    events = list(running)
    assert running.transcript.finished
    return events


def lines(picture: RenderableType, width: int = WIDTH) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(picture)
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue().splitlines()


@few
@given(random_documents, st.integers(8, 40), st.integers(20, 120), st.data())
def test_a_frame_fits_the_terminal(document: Document, height: int, width: int, data: st.DataObject) -> None:
    events = played(document)
    view = View("a title")
    for event in events[: data.draw(st.integers(1, len(events)))]:
        view.apply(event)
    console = Console(width=width, file=io.StringIO(), color_system=None)
    drawn = console.render_lines(view.frame(console, width, height), pad=False)
    assert len(drawn) <= height
    assert all(sum(segment.cell_length for segment in line) <= width for line in drawn)


@few
@given(random_documents)
def test_the_final_picture_holds_the_whole_text_and_every_thread(document: Document) -> None:
    view = View()
    for event in played(document):
        view.apply(event)
    shown = "".join(c for c in view.answer().plain if c.isprintable())
    assert shown == "".join(c for c in view.transcript.text if c.isprintable())
    rows = lines(view.final(WIDTH))[-len(view.transcript.threads) - 2 :]
    assert [row.split()[0] for row in rows if row][:-1] == [
        ".".join(map(str, path)) or "main" for path in view.transcript.threads
    ]


@few
@given(random_documents, st.lists(st.sampled_from(["<", " ", "\n", "nc/", "é"]), max_size=2))
def test_plain_output_is_the_text_and_never_takes_back(document: Document, stop: list[str]) -> None:
    events = played(document, stop=tuple(stop))
    text = Transcript(events).text
    out = io.StringIO()
    plain = Plain(out, stops=stop)
    for event in events:
        plain.apply(event)
        assert text.startswith(out.getvalue())
    plain.close()
    assert out.getvalue() in (text, text + "\n")


def test_plain_output_comes_while_the_answer_is_decoded() -> None:
    out = io.StringIO()
    plain = Plain(out)
    seen = []
    for event in played("One, two, three."):
        plain.apply(event)
        seen.append(out.getvalue())
    assert "One," in seen and seen[-1] == "One, two, three."


def test_threads_alive_at_once_stand_side_by_side() -> None:
    script = (
        '<promise topic="a" tokens="10"/><async>aaaaaaaaaaaaaaaaaaaaaaaa</async>'
        '<promise topic="b" tokens="10"/><async>bbbbbbbbbbbbbbbbbbbbbbbb</async><sync/>end'
    )
    view = View()
    for event in played(script):
        view.apply(event)
    main, first, second = (row for row in lines(view.final(WIDTH))[-5:-2])
    both = [i for i in range(31, 70) if first[i] == second[i] == "━"]
    assert both, "no column in which both chunks decode"
    assert "·" in main, "the main thread waited"


def test_guessed_tokens_are_thin_and_counted() -> None:
    events = [
        replace(event, drafter="lookup" if 9 <= event.step < 19 else "", drafted=("lookup",) * (event.step == 8) * 12)
        if isinstance(event, Decoded)
        else event
        for event in played("thirty characters are written.", max_tokens=30)
    ]
    view = View()
    for event in events:
        view.apply(event)
    last = view.transcript.steps
    assert view.transcript.passes == last - 10
    row, said = (lines(view.final(3 * WIDTH), 3 * WIDTH)[i] for i in (-3, -1))
    bar = "".join(char for char in row if char in "━─╌·")
    assert bar.strip("━") == "─" * bar.count("─") and 0.9 < bar.count("─") / len(bar) * (last + 1) / 10 < 1.15
    assert f"{view.transcript.tokens / (last - 10):.2f} tokens/pass" in said
    assert "10 of 12 guesses came true (─)" in said
    assert "guesses" not in figures(Transcript(played("thirty")))


def test_a_promise_is_an_outline_before_it_is_kept() -> None:
    view = View()
    view.apply(Forked(path=()))
    view.apply(Forked(path=(0,), topic="sleep", promised=40, step=3))
    row = lines(view.frame(Console(width=WIDTH), WIDTH, 20))[-3]
    assert "sleep" in row and row.count("╌") > 30 and "0/40" in row


def test_control_characters_do_not_reach_the_terminal() -> None:
    view = View()
    view.apply(Forked(path=()))
    view.apply(Decoded(path=(), token=1, text="a\x1b[31mb\x07"))
    assert view.answer().plain.startswith("a[31mb")


@pytest.mark.parametrize(("tokens", "word"), [(4000, "tokens/s"), (12, "cut at the limit")])
def test_the_figures_say_how_it_ended(tokens: int, word: str) -> None:
    events = played("A longer answer in one piece.", max_tokens=tokens)
    assert word in figures(Transcript(events))


def test_live_leaves_the_final_picture() -> None:
    console = Console(width=WIDTH, height=30, file=io.StringIO(), force_terminal=True)
    with Live(console, "title") as live:
        for event in played('<promise topic="a" tokens="10"/><async>chunk</async><sync/> done.'):
            live.apply(event)
        live.close()
    assert isinstance(console.file, io.StringIO)
    left = console.file.getvalue().rsplit("title", 1)[1]
    assert "chunk" in left and "done." in left and "critical path" in left
