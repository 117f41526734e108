"""Verbs that show answers: generate, replay, chat, demo."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from pastalm.cli.command import NoEffect, app, verb
from pastalm.cli.files import read_text
from pastalm.cli.loading import fetch, load_llm
from pastalm.cli.options import (
    DRAFTS,
    GREEDY,
    NOT_FORKING,
    SCHEMA,
    AsJson,
    Drafts,
    MaxTokens,
    Model,
    NoLive,
    RemoteOptions,
    RunOptions,
    SamplingOptions,
    System,
    ThreadOptions,
)
from pastalm.cli.terminal import (
    FAILED,
    INTERRUPTED,
    CtrlC,
    can_draw,
    fail,
    print_json,
    quiet_libraries,
    say,
)
from pastalm.core.params import SamplingParams
from pastalm.errors import DataError, RequestError, check_text
from pastalm.models.downloads import EMBEDDED

if TYPE_CHECKING:
    from pastalm.cli.view import Output
    from pastalm.core.driver import Response
    from pastalm.core.events import Event
    from pastalm.core.transcript import Transcript
    from pastalm.llm import Message

DEMO_PROMPT = "Give me five tips for staying healthy, each with a short explanation."


@verb(
    app,
    no_effect=(
        *NOT_FORKING,
        *DRAFTS,
        GREEDY,
        SCHEMA,
        NoEffect(("system",), lambda a: a["raw"], "with --raw, which has no messages"),
    ),
)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.")],
    params: Annotated[SamplingParams, SamplingOptions()],
    threads: ThreadOptions,
    run: RunOptions,
    remote: RemoteOptions,
    model: Model = EMBEDDED,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the prompt without a chat template.")] = False,
    as_json: AsJson = False,
    trace: Annotated[Path | None, typer.Option(help="Write the events to this file (JSONL).")] = None,
    no_live: NoLive = False,
) -> None:
    """Answer a prompt, its independent parts at the same time."""
    text = read_text("-") if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty: say something")
    quiet_libraries()
    live = can_draw() and not no_live
    with ExitStack() as stack:
        trace_file = _open_trace(trace)
        if trace_file is not None:
            stack.enter_context(trace_file)
        llm = load_llm(model, run, threads, remote)
        response = llm.stream(text if raw else _messages(text, system), params)
        title = f"{model} · {'asynchronous' if params.parallelism else 'sequential'}"
        output = _open_output(stack, as_json=as_json, live=live, title=title, stops=params.stop_strings)
        interrupted = _decode(response, output, trace_file)
    _conclude(response.transcript, as_json=as_json, live=live, interrupted=interrupted)


def _messages(prompt: str, system: str | None) -> list[Message]:
    user: Message = {"role": "user", "content": prompt}
    return [user] if system is None else [{"role": "system", "content": system}, user]


@verb(
    app,
    no_effect=[
        NoEffect(("speed",), lambda a: a["as_json"] or a["no_live"], "without the live view (--json, --no-live)")
    ],
)
def replay(
    file: Annotated[str, typer.Argument(help="A trace (generate --trace); - is stdin.")],
    speed: Annotated[float, typer.Option(help="Playback speed; 1 is the recorded one.")] = 1.0,
    as_json: AsJson = False,
    no_live: NoLive = False,
) -> None:
    """Show a trace again, without a model."""
    from pastalm.cli.view import Silent, paced

    if not speed > 0:
        raise RequestError("speed must be above 0")
    events = _read_trace(file)
    live = can_draw() and not no_live and not as_json
    cut = next((c for c in (getattr(e, "cut", None) for e in events) if c is not None), None)
    whole = Silent()
    with ExitStack() as stack:
        output = _open_output(stack, as_json=as_json, live=live, title=file, cut=cut)
        for event in paced(events, speed) if live else events:
            output.apply(event)
            whole.apply(event)
        output.close()
    _conclude(whole.transcript, as_json=as_json, live=live)


@verb(app, no_effect=(*NOT_FORKING, *DRAFTS, SCHEMA))
def chat(
    params: Annotated[
        SamplingParams,
        SamplingOptions(
            ("temperature", "seed", "max_tokens", "parallelism", "drafts", "references", "schema", "depends")
        ),
    ],
    threads: ThreadOptions,
    run: RunOptions,
    remote: RemoteOptions,
    model: Model = EMBEDDED,
    system: System = None,
    no_live: NoLive = False,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends, Ctrl-C stops an answer."""
    quiet_libraries()
    llm = load_llm(model, run, threads, remote)
    history: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    live = can_draw() and not no_live
    while (line := _next_line()) is not None:
        history.append({"role": "user", "content": line})
        with ExitStack() as stack:
            response = llm.stream(history, params)
            output = _open_output(stack, as_json=False, live=live, title=model)
            _decode(response, output)
        _conclude(response.transcript, as_json=False, live=live, last=False)
        history.append({"role": "assistant", "content": response.transcript.text})


def _next_line() -> str | None:
    """The next line of the user; None at the end. Raises DataError, RequestError."""
    prompt = "> " if sys.stdin.isatty() else ""
    print(prompt, end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not {error.encoding.upper()} (at byte {error.start})") from None
    check_text(line, "the line")
    return line.strip() or None


@verb(app)
def demo(
    run: RunOptions,
    model: Model = EMBEDDED,
    prompt: Annotated[str, typer.Option(help="What to answer.")] = DEMO_PROMPT,
    max_tokens: MaxTokens = 1024,
    drafts: Drafts = "auto",
    no_live: NoLive = False,
) -> None:
    """Answer one prompt asynchronously, then sequentially, and compare the times."""
    params = [SamplingParams(max_tokens=max_tokens, temperature=0, parallelism=p, drafts=drafts) for p in (1, 0)]
    quiet_libraries()
    fetch(model)
    llm = load_llm(model, run)
    # the first steps of a process are slower than all later ones: neither answer should pay for that
    llm.chat(_messages(prompt, None), SamplingParams(max_tokens=8, temperature=0))
    live = can_draw() and not no_live
    transcripts = []
    for title, each in zip(("asynchronous", "sequential"), params, strict=True):
        print(f"\n{prompt}  [{title}]\n", file=sys.stderr)
        with ExitStack() as stack:
            response = llm.stream(_messages(prompt, None), each)
            output = _open_output(stack, as_json=False, live=live, title=f"{model} · {title}")
            interrupted = _decode(response, output)
        _conclude(response.transcript, as_json=False, live=live, interrupted=interrupted)
        transcripts.append(response.transcript)
    print(_comparison(*transcripts), file=sys.stderr)


def _comparison(asynchronous: Transcript, sequential: Transcript) -> str:
    """Compares the times of two answers, in one line."""
    times = [t.seconds for t in (asynchronous, sequential)]
    per_token = sequential.seconds / sequential.tokens / (times[0] / asynchronous.tokens)
    return (
        f"\nasynchronous {times[0]:.2f} s for {asynchronous.tokens} tokens in {asynchronous.steps} "
        f"steps, {asynchronous.tokens_per_pass:.2f} tokens a pass; "
        f"sequential {times[1]:.2f} s for {sequential.tokens} tokens in {sequential.steps} "
        f"steps, {sequential.tokens_per_pass:.2f} tokens a pass: "
        f"{times[1] / times[0]:.2f} times as fast, {per_token:.2f} times as fast a token"
    )


# ------------------------------------------------------------------------------ showing an answer


def _open_output(
    stack: ExitStack,
    *,
    as_json: bool,
    live: bool,
    title: str,
    stops: Iterable[str] = (),
    cut: int | None = None,
) -> Output:
    """The output that shows events.

    stack: closes the live view.
    as_json: nothing is shown until the end.
    live: the live view, under `title`; else plain text.
    stops: stop strings; text that may begin one is held back.
    cut: number of characters of the text that are shown, by a trace (None: all).
    """
    from rich.console import Console

    from pastalm.cli.view import Live, Plain, Silent

    if as_json:
        return Silent()
    if live:
        return stack.enter_context(Live(Console(), title))
    return Plain(sys.stdout, stops=tuple(stops), cut=cut)


def _decode(response: Response, output: Output, trace: TextIO | None = None) -> bool:
    """Shows a response to its end. Returns whether Ctrl-C ended it early.

    response: the response.
    output: shows the events.
    trace: a file for the events.
    """
    from pastalm.records.traces import to_json

    try:
        with CtrlC() as ctrl_c:
            response.interrupted = lambda: ctrl_c.pressed
            for event in response:
                if trace is not None:
                    _append(trace, to_json(event))
                output.apply(event)
    finally:
        response.cancel()
    output.close()
    return ctrl_c.pressed


def _conclude(
    transcript: Transcript, *, as_json: bool, live: bool, interrupted: bool = False, last: bool = True
) -> None:
    """Prints what follows an answer, JSON on stdout or figures on stderr, and ends with the exit code.

    transcript: of the answer.
    as_json: print JSON.
    live: the live view has shown the figures.
    interrupted: Ctrl-C ended the answer.
    last: the command ends with this answer, and so with its exit code.

    Raises typer.Exit.
    """
    from pastalm.cli.view import figures
    from pastalm.records.transcripts import summary

    sys.stdout.flush()
    if as_json:
        print_json(summary(transcript))
    elif not live:
        print(figures(transcript), file=sys.stderr)
    if interrupted:
        fail("interrupted: this is what was there", INTERRUPTED)
    if transcript.why and last:
        fail(f"a part of the answer is missing: {transcript.why}", FAILED)
    if transcript.why:
        say(f"a part of the answer is missing: {transcript.why}")


# ------------------------------------------------------------------------------ traces


def _open_trace(path: Path | None) -> TextIO | None:
    """Opens a new trace. It replaces an existing trace, but no other file. Raises DataError."""
    if path is None:
        return None
    if path.is_file() and path.stat().st_size:
        try:
            _read_trace(str(path))
        except DataError:
            raise DataError(f"{path} exists and is not a trace: give another file") from None
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def _append(file: TextIO, line: str) -> None:
    """Writes one more line of a trace. Raises DataError."""
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise DataError(f"cannot write {file.name}: {error.strerror}") from None


def _read_trace(source: str) -> list[Event]:
    """The events of a trace, checked in their order. Raises DataError."""
    from pastalm.core.transcript import Transcript
    from pastalm.records.traces import from_json

    events: list[Event] = []
    transcript = Transcript()
    for number, line in enumerate(read_text(source).split("\n"), 1):
        if not line.strip():
            continue
        try:
            events.append(from_json(line))
            transcript.apply(events[-1])
        except DataError as error:
            raise DataError(f"{source}, line {number}: {error}") from None
        except KeyError:
            raise DataError(f"{source}, line {number}: an event of a thread that was never forked") from None
    if not events:
        raise DataError(f"{source} has no events")
    return events
