"""The page at `/`, in a real browser: what it shows equals what transcript.py says, live, replayed and as a file.

Needs Chromium on PATH (or Playwright's own); without one every test here is skipped.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastalm import Limits, SamplingParams
from pastalm.core.driver import Driver
from pastalm.core.events import Decoded, Event, Forked, SampledToken
from pastalm.core.events import Path as ThreadPath
from pastalm.core.language import Promise, Text
from pastalm.core.transcript import Transcript
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.records.documents import Async, Document, parse
from pastalm.records.traces import from_json, to_json
from pastalm.records.transcripts import summary
from pastalm.server.page import PAGE
from tests.server.serving import TIPS, TIPS_TEXT, Served, curl, eventually, playing, serving
from tests.strategies import documents

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
expect = playwright.expect
expect.set_options(timeout=20_000)

STATIC = Path(__file__).parents[2] / "pastalm" / "server" / "static"
TRACE = Path(__file__).parents[1] / "data" / "trace.jsonl"
EVENTS = [from_json(line) for line in TRACE.read_text().splitlines()]
WHOLE = Transcript(EVENTS)
VOCABULARY = byte_vocabulary()
LONG = "".join(f'<promise topic="tip {i}" tokens="80"/><async>{i}. {"word " * 14}\n</async>' for i in range(1, 4))
FIGURES = """(transcript) => ({
  text: transcript.text, tokens: transcript.tokens, steps: transcript.steps, seconds: transcript.seconds,
  passes: transcript.passes, drafted: transcript.drafted, accepted: transcript.accepted,
  tokens_per_pass: transcript.tokensPerPass,
  critical_path: transcript.criticalPath, parallelism: transcript.parallelism, finish_reason: transcript.finishReason,
  threads: [...transcript.threads.values()].map((t) => ({ id: t.name, parent: t.parent, topic: t.topic,
    promised_tokens: t.promised, tokens: t.tokens.length, start_step: t.startStep, end_step: t.endStep })),
})"""
ANSWER = """() => {
  const copy = document.getElementById("answer").cloneNode(true);
  for (const hint of copy.querySelectorAll(".hint")) hint.remove();
  return copy.textContent;
}"""


def figures(transcript: Transcript) -> dict[str, Any]:
    """What FIGURES gives for the same events, unrounded."""
    exact = ("seconds", "parallelism", "tokens_per_pass")
    told = {**summary(transcript), **{name: getattr(transcript, name) for name in exact}}
    del told["annotated"]
    return told


def as_json(events: Sequence[Event]) -> list[Any]:
    return [json.loads(to_json(event)) for event in events]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next(filter(None, map(shutil.which, names)), None) or driver.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium here: install one (Debian: apt-get install chromium)")
        # there is no sandbox for root in a container; all that is opened is our own
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that must not complain, nor ask anyone but who serves it."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(20_000)
    told: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("console", lambda said: told.append(said.text) if "Failed to load resource" not in said.text else None)
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert not told
    hosts = {re.sub(r"^(\w+://[^/]*).*", r"\1", url) for url in asked if not url.startswith(("blob:", "data:"))}
    assert len(hosts) == 1, hosts


@pytest.fixture
def opened(page: Any) -> Any:
    """The page opened as a file, with the recorded trace in it."""
    page.goto((STATIC / "index.html").as_uri())
    page.set_input_files("#file", TRACE)
    expect(page.locator(".row")).to_have_count(len(WHOLE.threads))
    return page


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(playing(TIPS)) as here:
        yield here
        assert here.becomes_idle()


def drawn(page: Any) -> None:
    """Waits until what is due is drawn."""
    page.evaluate("() => new Promise(requestAnimationFrame)")


def answer(page: Any) -> str:
    """The text that is shown, without the slots' hints."""
    drawn(page)
    return str(page.evaluate(ANSWER))


def figure(page: Any, name: str, column: int = 0) -> str:
    """What stands in the table of numbers."""
    drawn(page)
    return str(page.locator(f"[data-figure={name}] td").nth(column).text_content())


def decoded(page: Any, url: str) -> None:
    """Asks a server, and waits until all is over."""
    page.goto(url)
    expect(page.locator("#model")).to_have_text("played")
    page.fill("[name=max_tokens]", "1000")
    page.click("#send")
    expect(page.locator("#status")).to_have_text("done")


def saved(page: Any, button: str) -> str:
    """What a button makes the browser download."""
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_text()


# ------------------------------------------------------------------------------ the files


def test_the_page_is_served_and_loads_nothing_from_elsewhere(served: Served) -> None:
    for path, name in PAGE.items():
        status, headers, body = curl(f"{served.url}{path}")
        assert (status, body) == (200, (STATIC / name).read_text())
        assert "default-src 'none'" in headers["content-security-policy"]
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+|(?:src|href)=\"//|@import|innerHTML", body), name
    assert {path.name for path in STATIC.iterdir()} == set(PAGE.values())
    assert sum(len(path.read_text().splitlines()) for path in STATIC.glob("*.js")) < 500


# ------------------------------------------------------------------------------ the same as transcript.py


def test_the_recorded_trace_is_folded_as_in_python(opened: Any) -> None:
    folded = opened.evaluate(f"({FIGURES})(state.run.whole)")
    assert folded == figures(WHOLE)
    assert answer(opened) == WHOLE.text
    shown = {name: figure(opened, name) for name in ("tokens", "steps", "critical", "parallelism", "seconds", "rate")}
    assert shown == {
        "tokens": str(WHOLE.tokens),
        "steps": str(WHOLE.steps),
        "critical": str(WHOLE.critical_path),
        "parallelism": f"{WHOLE.parallelism:.2f}",
        "seconds": f"{WHOLE.seconds:.2f} s",
        "rate": f"{WHOLE.tokens / WHOLE.seconds:.1f}",
    }
    assert figure(opened, "length") == str(len(WHOLE.text))


def test_every_beginning_of_it_too(opened: Any) -> None:
    beginning = f"({FIGURES})(new Transcript(state.run.events.slice(0, i)))"
    many = opened.evaluate(f"() => state.run.events.map((_, i) => {beginning})")
    transcript = Transcript()
    assert len(many) == len(EVENTS)
    for event, told in zip(EVENTS, many, strict=True):
        assert told == figures(transcript)
        transcript.apply(event)


def trace_of(script: Document, stop: str, seed: int, limits: Limits, max_tokens: int) -> list[Event]:
    """The events of a script under a random schedule."""
    rng = random.Random(seed)

    def schedule(live: Sequence[tuple[str, ThreadPath]]) -> Sequence[tuple[str, ThreadPath]]:
        return rng.sample(list(live), rng.randint(1, len(live))) if live else []

    engine = ScriptedEngine(VOCABULARY, [script], schedule=schedule)
    driver = Driver(engine, VOCABULARY, limits=limits)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=(stop,) if stop else ())
    return list(driver.submit([65], params))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    documents(pieces=st.text("ab\n é🍝<", max_size=6)), st.sampled_from(("", "", "b", "🍝", "a\n")),
    st.integers(0, 99),
    st.builds(Limits, max_threads=st.sampled_from((1, 16)), max_chunk_tokens=st.sampled_from((8, 99))),
    st.sampled_from((20, 2000)), st.floats(0, 1),
)  # fmt: skip
def test_any_trace_is_folded_and_shown_as_in_python(
    opened: Any, script: Document, stop: str, seed: int, limits: Limits, max_tokens: int, part: float
) -> None:
    events = drafted(trace_of(script, stop, seed, limits, max_tokens), seed)
    for shown in (events[: max(1, int(part * len(events)))], events):
        told = opened.evaluate(
            f"""(events) => {{
              const run = new Run("running");
              for (const event of events) run.take(event);
              show(run, "");
              draw();
              return {{ ...({FIGURES})(run.whole), spans: run.whole.criticalSpans(), answer: ({ANSWER})() }};
            }}""",
            as_json(shown),
        )
        spans, answer = told.pop("spans"), told.pop("answer")
        assert told == figures(Transcript(shown))
        assert answer == told["text"]
        assert sum(span["tokens"] for span in spans) == told["critical_path"]
        assert all(a["to"] <= b["from"] and a["name"] != b["name"] for a, b in zip(spans, spans[1:], strict=False))


def test_no_slot_stands_after_the_cut(opened: Any, tmp_path: Path) -> None:
    events = trace_of(parse(TIPS), "eight", 0, Limits(), 2000)
    (tmp_path / "cut").write_text("\n".join(map(to_json, events)))
    opened.set_input_files("#file", tmp_path / "cut")
    expect(opened.locator(".row")).to_have_count(3)
    assert answer(opened) == TIPS_TEXT.partition("eight")[0]
    expect(opened.locator(".slot")).to_have_count(1)


def drafted(events: Sequence[Event], seed: int = 0) -> list[Event]:
    """The same trace as if some of its tokens had been guessed."""
    rng = random.Random(seed)
    return [
        replace(event, drafter=rng.choice(("", "lookup", "siblings")), drafted=("lookup",) * rng.randrange(3))
        if isinstance(event, Decoded)
        else event
        for event in events
    ]


def test_guessed_tokens_are_cells_of_their_own(opened: Any, tmp_path: Path) -> None:
    events = drafted(EVENTS)
    whole = Transcript(events)
    assert opened.locator(".row .guess").count() == 0 and figure(opened, "guesses") == ""
    assert figure(opened, "pass") == f"{WHOLE.tokens / WHOLE.passes:.2f}"
    (tmp_path / "drafted").write_text("\n".join(map(to_json, events)))
    opened.set_input_files("#file", tmp_path / "drafted")
    expect(opened.locator("#model")).to_have_text("drafted")
    told = opened.evaluate(f"({FIGURES})(state.run.whole)")
    assert told == figures(whole) and told["accepted"] and told["passes"] < WHOLE.passes
    assert figure(opened, "pass") == f"{whole.tokens_per_pass:.2f}"
    assert figure(opened, "guesses") == f"{whole.accepted.total()} of {whole.drafted.total()} came true"
    steps = {event.step for event in events if isinstance(event, Decoded) and event.drafter and not event.path}
    cells = opened.evaluate(
        """() => [...document.querySelectorAll('.row.main .guess')].map((cell) =>
          [parseFloat(cell.style.left), parseFloat(cell.style.width)])"""
    )
    full = max(whole.steps, *(t.start_step + t.promised + 2 for t in whole.threads.values() if t.path))
    ends = [(round(left * full / 100), round((left + width) * full / 100)) for left, width in cells]
    assert {step for before, last in ends for step in range(before + 1, last + 1)} == steps
    expect(opened.locator(".legend .guess")).to_have_count(1)


# ------------------------------------------------------------------------------ live


def test_a_live_answer_and_its_race(page: Any) -> None:
    with serving(playing(LONG, step_seconds=0.02)) as here:
        sent: list[Any] = []
        page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
        page.goto(here.url)
        page.fill("#prompt", "Say <b>it</b>")
        page.fill("[name=max_tokens]", "1000")
        page.press("#prompt", "Enter")
        expect(page.locator(".slot.open")).to_have_count(3)
        expect(page.locator(".hint").first).to_have_text("tip 1")
        at_once = "[...document.querySelectorAll('.slot.open')].filter((slot) => slot.firstChild !== slot.hint).length"
        assert eventually(lambda: page.evaluate(at_once) >= 2), "they fill at once"
        expect(page.locator(".row .promise")).to_have_count(3)
        expect(page.locator("#status")).to_have_text("done", timeout=60_000)
        assert (
            answer(page)
            == here.client.chat.completions.create(
                model="played", messages=[{"role": "user", "content": "x"}], max_tokens=1000
            )
            .choices[0]
            .message.content
        )
        assert [body["pasta"].get("parallelism") for body in sent] == [None, 0]
        assert {body["messages"][0]["content"] for body in sent} == {"Say <b>it</b>"}
        assert all(body["temperature"] == 0 and body["max_tokens"] == 1000 for body in sent)
        kept = []
        for column, which in enumerate(("run", "race")):
            page.check(f"[value={which}]", force=True)
            told = Transcript(map(from_json, saved(page, "#save").splitlines()))
            kept.append(told)
            assert told.finished and told.text == answer(page)
            assert figure(page, "tokens", column) == str(told.tokens)
            assert figure(page, "critical", column) == str(told.critical_path)
            assert figure(page, "seconds", column) == f"{told.seconds:.2f} s"
            assert page.locator(".track").nth(column).text_content().endswith(f"{told.seconds:.2f} s")
            assert float(figure(page, "wall", column).split()[0]) >= round(told.seconds, 2) - 0.01
        assert [len(told.threads) for told in kept] == [4, 1]
        expect(page.locator("#verdict")).to_contain_text(f"{kept[1].seconds / kept[0].seconds:.2f} times as fast")
        expect(page.locator("#verdict")).to_contain_text("1.00 times the text")


def test_without_a_race(page: Any, served: Served) -> None:
    page.goto(served.url)
    page.uncheck("#race")
    page.fill("[name=max_tokens]", "400")
    page.fill("#odds", "0")
    page.click("#send")
    expect(page.locator("#status")).to_have_text("done")
    expect(page.locator(".row")).to_have_count(1)
    expect(page.locator(".raced:visible")).to_have_count(0)
    assert answer(page) == TIPS_TEXT


@pytest.mark.parametrize("how", ["key", "button"])
def test_cancelling_frees_the_server(page: Any, how: str) -> None:
    with serving(playing(LONG, step_seconds=0.05)) as here:
        page.goto(here.url)
        page.fill("[name=max_tokens]", "1000")
        page.click("#send")
        expect(page.locator(".slot.open")).to_have_count(3)
        expect(page.locator("#send")).to_be_hidden()
        if how == "key":
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_have_text("cancelled")
        assert here.becomes_idle(5), "long before it would have ended"
        expect(page.locator("#error")).to_be_hidden()
        assert page.locator('.row[data-name="0"]').get_attribute("aria-label").endswith("stopped")
        expect(page.locator(".slot.open")).to_have_count(0)
        expect(page.locator("#send")).to_be_visible()


def test_what_a_model_writes_is_text(page: Any) -> None:
    evil = '<img src=x onerror="document.title=1">'
    script = (Text(evil), Promise("<b>", 60), Async((Text(evil),)))
    with serving(playing(script)) as here:
        decoded(page, here.url)
        assert answer(page) == f"{evil * 2}\n"  # a chunk ends in white space
    expect(page.locator(".topic").nth(1)).to_have_text("<b>")
    assert page.locator("main img, main b").count() == 0
    assert page.title() != "1"


# ------------------------------------------------------------------------------ what goes wrong


def test_a_key_is_asked_for(page: Any) -> None:
    with serving(playing(TIPS), api_key="s3cret") as here:
        page.goto(here.url)
        expect(page.locator("#error")).to_contain_text("needs its API key")
        page.fill("#key", "s3cret")
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_have_text("played")
        expect(page.locator("#error")).to_be_hidden()
        page.fill("[name=max_tokens]", "400")
        page.click("#send")
        expect(page.locator("#status")).to_have_text("done")
        assert answer(page) == TIPS_TEXT


class Failing(ScriptedEngine):
    """Fails some steps after it began."""

    left = 30

    def step(self) -> list[SampledToken]:
        self.left -= 1
        if not self.left:
            raise RuntimeError("no more")
        return super().step()


def test_errors_are_one_line(page: Any) -> None:
    with serving(playing(LONG, engine=Failing)) as here:
        page.goto(here.url)
        error = page.locator("#error")
        page.fill("[name=max_tokens]", "100000")
        page.click("#send")
        expect(error).to_contain_text("lower one")
        page.fill("[name=max_tokens]", "1000")
        page.click("#send")
        expect(error).to_contain_text("the engine failed (RuntimeError)")
        expect(page.locator(".slot.open")).to_have_count(0)
    page.click("#send")
    expect(error).to_contain_text("cannot be reached")
    assert "\n" not in error.text_content()
    assert error.bounding_box()["height"] < 60
    expect(page.locator("#send")).to_be_visible()


def test_a_file_that_is_no_trace(opened: Any, tmp_path: Path) -> None:
    for name, text, said in (
        ("a", "", "no events"),
        ("b", TRACE.read_text() + "\nwhat\n", "line 205"),
        ("c", to_json(Forked(path=(0,), topic="x", promised=10)), "line 1"),
        ("d", '{"path": [], "kind": "other"}', "line 1"),
    ):
        (tmp_path / name).write_text(text)
        opened.set_input_files("#file", tmp_path / name)
        expect(opened.locator("#error")).to_contain_text(said)
    assert answer(opened) == WHOLE.text, "what was shown stays"


# ------------------------------------------------------------------------------ files


def test_a_trace_dropped_onto_the_served_page_is_shown(page: Any, served: Served) -> None:
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    with page.expect_request("**/v1/models"):
        page.goto(served.url)
    page.evaluate(
        """(text) => {
          const held = new DataTransfer();
          held.items.add(new File([text], "mine.jsonl"));
          for (const kind of ["dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: held, bubbles: true, cancelable: true }));
        }""",
        TRACE.read_text(),
    )
    expect(page.locator("#model")).to_have_text("mine.jsonl")
    held[0].continue_()
    assert eventually(lambda: page.evaluate("state.model") == "played")
    assert page.locator("#model").text_content() == "mine.jsonl", "a late answer leaves it"
    assert answer(page) == WHOLE.text
    assert [from_json(line) for line in saved(page, "#save").splitlines()] == EVENTS


def test_a_trace_opened_before_the_server_answers_stays(page: Any, served: Served) -> None:
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.goto(served.url)
    page.click("#send")
    expect(page.locator("#cancel")).to_be_visible()
    page.set_input_files("#file", TRACE)
    expect(page.locator("#status")).to_have_text("cancelled")
    held[0].continue_()
    assert eventually(lambda: page.evaluate("state.model") == "played")
    assert answer(page) == WHOLE.text
    expect(page.locator("#error")).to_be_hidden()


def test_a_trace_opened_as_the_answer_ends_is_not_raced(page: Any, served: Served) -> None:
    page.goto(served.url)
    page.fill("[name=max_tokens]", "400")
    page.evaluate("""() => {
      const { end } = Run.prototype;
      Run.prototype.end = function (how) {
        end.call(this, how);
        if (how === "done") show(this, "mine", state.abort.abort());
      };
    }""")
    page.click("#send")
    expect(page.locator("#status")).to_have_text("cancelled")
    assert page.evaluate("state.race") is None


def test_of_two_files_the_last_is_shown(opened: Any) -> None:
    opened.evaluate(
        """(text) => {
          load({ name: "slow", text: () => new Promise((done) => { window.read = () => done(text); }) });
          load({ name: "quick", text: async () => text });
        }""",
        TRACE.read_text(),
    )
    expect(opened.locator("#model")).to_have_text("quick")
    opened.evaluate("window.read()")
    drawn(opened)
    assert opened.locator("#model").text_content() == "quick"


def test_the_trace_for_perfetto_marks_guesses(opened: Any, tmp_path: Path) -> None:
    events = drafted(EVENTS)
    (tmp_path / "drafted").write_text("\n".join(map(to_json, events)))
    opened.set_input_files("#file", tmp_path / "drafted")
    expect(opened.locator("#model")).to_have_text("drafted")
    slices = [e for e in json.loads(saved(opened, "#perfetto"))["traceEvents"] if e["ph"] == "X"]
    guesses = [e["args"]["drafter"] for e in slices if e["cat"] == "decode,guess"]
    fed = [name for e in slices for name in e["args"].get("drafted", "").split(", ") if name]
    whole = Transcript(events)
    assert (Counter(guesses), Counter(fed)) == (whole.accepted, whole.drafted) and guesses
    assert not any("drafter" in e["args"] for e in slices if e["cat"] == "decode")


def test_the_trace_for_perfetto(opened: Any) -> None:
    events = json.loads(saved(opened, "#perfetto"))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert [name.split()[0] for name in names.values()] == ["main", *map(str, range(5))]
    slices = [e for e in events if e["ph"] == "X" and e["cat"] == "decode"]
    by_thread = {names[t]: sum(e["args"]["tokens"] for e in slices if e["tid"] == t) for t in names}
    decoded = sum(1 + len(e.forced) for e in EVENTS if e.kind == "decoded")
    assert sum(by_thread.values()) == decoded > 0.9 * WHOLE.tokens
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(WHOLE.seconds * 1e6, abs=1000)
    assert all(e["dur"] > 0 and e["ts"] >= 0 for e in slices)
    assert {e["name"] for e in events if e["ph"] == "X" and e["cat"] == "wait"} == {"waits (sync)"}
    starts, ends = ({(e["name"], e["id"]) for e in events if e["ph"] == ph} for ph in "sf")
    assert starts == ends and sorted(name for name, _ in starts) == ["fork"] * 5 + ["join"] * 5


# ------------------------------------------------------------------------------ moving through it


def test_scrubbing_by_key_shows_what_was_then(opened: Any) -> None:
    scrub = opened.locator("#scrub")
    scrub.focus()
    opened.keyboard.press("Home")
    for _ in range(40):
        opened.keyboard.press("ArrowRight")
    expect(opened.locator("#over .now")).to_have_count(1)
    on_the_dot = EVENTS[50].time
    opened.evaluate("(time) => later(state.cursor = time)", on_the_dot)
    assert figure(opened, "tokens") == str(Transcript(e for e in EVENTS if e.time <= on_the_dot).tokens)
    opened.keyboard.press("ArrowRight")
    moment = opened.evaluate("state.cursor")
    then = Transcript(event for event in EVENTS if event.time <= moment)
    assert on_the_dot < moment and then.steps < WHOLE.steps
    expect(opened.locator("#place")).to_have_text(f"step {then.steps}")
    assert figure(opened, "tokens") == str(then.tokens)
    assert answer(opened) == then.text
    opened.keyboard.press("End")
    expect(opened.locator("#over .now")).to_have_count(0)
    assert figure(opened, "tokens") == str(WHOLE.tokens)


def test_playing_again(opened: Any) -> None:
    opened.select_option("#speed", "0.25")
    opened.get_by_role("button", name="Play").click()
    expect(opened.locator(".slot.open").first).to_be_visible()
    opened.get_by_role("button", name="Pause").click()
    assert 0 < int(figure(opened, "tokens")) < WHOLE.tokens
    opened.select_option("#speed", "2")
    opened.get_by_role("button", name="Play").click()
    expect(opened.locator("[data-figure=tokens] td").first).to_have_text(str(WHOLE.tokens))
    expect(opened.get_by_role("button", name="Play")).to_be_visible()


def test_the_axis_is_steps_or_seconds(opened: Any) -> None:
    def ends() -> list[float]:
        drawn(opened)
        return [float(x) for x in opened.evaluate(
            "() => [...document.querySelectorAll('.lane')].map((l) => parseFloat(l.lastChild.style.left) +"
            " parseFloat(l.lastChild.style.width))"
        )]  # fmt: skip

    full = max(WHOLE.steps, *(t.start_step + t.promised + 2 for t in WHOLE.threads.values() if t.path))
    assert ends() == pytest.approx([(t.end_step or 0) / full * 100 for t in WHOLE.threads.values()], abs=0.01)
    opened.get_by_label("seconds").check(force=True)
    expect(opened.locator("#axis")).to_contain_text("1 s")
    expect(opened.locator("#place")).to_have_text(f"{WHOLE.seconds:.2f} s")
    ended = {event.path: event.time for event in EVENTS if event.kind == "finished"}
    assert ends() == pytest.approx([ended[path] / WHOLE.seconds * 100 for path in WHOLE.threads], abs=0.1)


def test_timeline_and_answer_point_at_each_other(opened: Any) -> None:
    row, slot = opened.locator('.row[data-name="2"]'), opened.locator('.slot[data-name="2"]')
    expect(slot).not_to_have_class(re.compile("hot"))
    row.hover()
    expect(slot).to_have_class(re.compile("hot"))
    expect(opened.locator("#detail")).to_contain_text("enough sleep: 26 tokens of 30 promised, steps 25 to 50")
    opened.locator('.slot[data-name="4"]').hover()
    expect(opened.locator('.row[data-name="4"]')).to_have_class(re.compile("hot"))
    expect(slot).not_to_have_class(re.compile("hot"))
    row.focus()
    expect(slot).to_have_class(re.compile("hot"))
    opened.keyboard.press("Enter")
    expect(slot).to_be_focused()
    expect(opened.locator("#over .join")).to_have_count(1)
    expect(opened.locator(".row .wait")).to_have_count(1)


def test_everything_that_takes_the_focus_has_a_name(page: Any, served: Served) -> None:
    decoded(page, served.url)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node for node in tree
        if any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", []))
    ]  # fmt: skip
    nameless = [node["role"]["value"] for node in focusable if not node["name"]["value"].strip()]
    assert len(focusable) > 15 and not nameless
    names = [node["name"]["value"] for node in focusable]
    assert any(name.startswith("0, sleep: ") for name in names) and "chunk 1: food" in names


@pytest.mark.parametrize("width", [320, 390, 700, 1600])
def test_no_width_scrolls_sideways(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.scrollingElement.scrollWidth") <= width
    lane, over = (opened.locator(what).first.bounding_box() for what in (".lane", "#over"))
    assert over["x"] == pytest.approx(lane["x"], abs=1) and over["width"] == pytest.approx(lane["width"], abs=1)
    centre = lane["y"] + lane["height"] / 2 - over["y"]
    assert centre == pytest.approx(over["height"] / len(WHOLE.threads) / 2, abs=2), "lines run through the bars"


def test_light_dark_and_less_motion(opened: Any) -> None:
    def luminance(what: str) -> float:
        """Relative luminance (WCAG) of a colour of the answer's first chunk."""
        red, green, blue = opened.evaluate(
            f"""() => {{
              const paper = document.createElement("canvas").getContext("2d", {{ willReadFrequently: true }});
              paper.fillStyle = getComputedStyle(document.querySelector(".slot")).{what};
              paper.fillRect(0, 0, 1, 1);
              return [...paper.getImageData(0, 0, 1, 1).data].slice(0, 3);
            }}"""
        )
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in (red, green, blue)]
        return float(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))

    papers = []
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        ink, paper = luminance("color"), luminance("backgroundColor")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7, scheme
        papers.append(paper)
    assert papers[0] > 0.5 > papers[1]
    opened.evaluate("() => later(state.cursor = 0.5)")
    moving = "() => getComputedStyle(document.querySelector('.slot.open .hint'), '::before').animationName"
    assert eventually(lambda: opened.locator(".slot.open").count() > 0)
    assert opened.evaluate(moving) == "blink"
    opened.emulate_media(reduced_motion="reduce")
    assert opened.evaluate(moving) == "none"
