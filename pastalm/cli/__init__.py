"""The command `pasta`: thin verbs, each of which imports what it needs.

Contract: the answer goes to stdout, everything else to stderr. An error is one line. Exit codes: 0; 1
for a failure; 2 for what the user gave and cannot be used; 130 for Ctrl-C, after printing what is
there. The live view is drawn only where stdout is a terminal that takes UTF-8. What a stdout of another encoding
cannot write is written as Python's escapes (`\\u6f22`), in JSON as JSON's. An option that would do nothing beside the
others is refused.
"""

from __future__ import annotations

import codecs
import errno
import functools
import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, TypeVar

import typer
from typer.core import TyperGroup

from pastalm.core.layout import POLICIES, Policy
from pastalm.core.params import SamplingParams
from pastalm.errors import (
    CapabilityError,
    DataError,
    ModelError,
    PastaError,
    RequestError,
    check_text,
)
from pastalm.loading import missing
from pastalm.models import EMBEDDED
from pastalm.train.packing import MIXED

if TYPE_CHECKING:
    from pastalm import LLM
    from pastalm.cli.view import Output
    from pastalm.core.driver import Response
    from pastalm.core.events import Event
    from pastalm.eval.quality import Scorer
    from pastalm.llm import Message
    from pastalm.records.chat_client import Remote

DEMO_PROMPT = "Give me five tips for staying healthy, each with a short explanation."
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """The verbs; what is wrong with their options is one line too, and stdout loses nothing."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _UsageError as error:
            said: str = error.format_message()  # type: ignore[attr-defined]
            context: typer.Context = error.ctx  # type: ignore[attr-defined]
            if "\n" in said:  # the help, where no verb was given
                print(said, file=sys.stderr)
            else:
                _print_error(f"{said} Try {context.command_path} --help" if context else said)
            code = BAD_INPUT
        if standalone_mode:
            sys.exit(code or 0)
        return code


app = typer.Typer(
    name="pasta",
    cls=_Group,
    help="Language models that decode the independent parts of an answer at the same time.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Train models to speak PASTA-LANG.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train, name="train")


def _print_version(wanted: bool) -> None:
    if wanted:
        from pastalm import __version__

        print(f"pastalm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models that decode the independent parts of an answer at the same time."""


_R = TypeVar("_R")

Model = Annotated[str, typer.Option(help="The embedded model, a hub name, a folder, or a GGUF file.")]
Adapter = Annotated[str, typer.Option(help="A folder, none, or auto: the adapter that ships for the model.")]
Engine = Annotated[
    str, typer.Option(help="native, transformers, llama.cpp (GGUF files), or auto: native on a CPU, if it can.")
]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: auto, q8_0 or q4_0 (native), bfloat16, float16, float32 or float64.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together; else the model's, 4096 at most.", min=2)
]
Counted = Annotated[
    str, typer.Option(help="Whose tokens a speedup counts: theoretical, matched, smaller or parallelism.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code run that comes with the model, as transformers does.")
]
Positions = Annotated[
    str | None, typer.Option(help="Position ids of chunks: promised or overlap (all that llama.cpp has).")
]
MaxTokens = Annotated[int, typer.Option(help="Bound on all decoded tokens, tags too.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Sequential = Annotated[bool, typer.Option("--sequential", help="The same model with forking off (--parallelism 0).")]
Parallelism = Annotated[float, typer.Option(help="Multiplies the odds of forking; 0 turns it off.")]
MaxThreads = Annotated[int, typer.Option(help="Threads decoding at once; others wait.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
NoLive = Annotated[bool, typer.Option("--no-live", help="Plain text on a terminal too.")]
BaseUrl = Annotated[
    str | None, typer.Option(help="Of an OpenAI-compatible server, with /v1; OPENAI_API_KEY is its key.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="With --base-url: a hub name or folder with the model's tokenizer, if not --model's.")
]
Prompted = Annotated[
    bool, typer.Option("--prompted", help="With --base-url: the model was not finetuned; teach it the tags.")
]
Concurrency = Annotated[int, typer.Option(help="Questions to the server at once.")]
PriceIn = Annotated[float, typer.Option(help="Dollars for a million tokens in, to count the cost.")]
PriceOut = Annotated[float, typer.Option(help="Dollars for a million tokens out.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew: what an earlier run of this command wrote there makes way.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Name rows that cannot be used, and go on without them.")]


def main() -> None:
    """The entry point of `pasta`."""
    app(prog_name="pasta")


# ------------------------------------------------------------------------------ errors


def _print_error(message: str) -> None:
    print("pasta: " + " ".join(message.split()), file=sys.stderr)


def _fail(message: str, code: int) -> NoReturn:
    _print_error(message)
    raise typer.Exit(code)


def _drop_stdout() -> None:
    """What Python still holds for a stdout that takes no more would raise once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Why a write fails that is no mistake of anybody's."""


def _verb(function: Callable[..., _R]) -> Callable[..., _R]:
    """A verb whose errors are one line and the right exit code, and whose arguments are text and each of use."""

    @functools.wraps(function)
    def guarded(context: typer.Context, **arguments: Any) -> _R:
        try:
            _check_arguments(context, arguments)
            result = function(**arguments)
            sys.stdout.flush()
            return result
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            _drop_stdout()
            _fail("stdout was closed before the end", FAILED)
        except (RequestError, CapabilityError, ModelError, DataError) as error:
            _fail(str(error), BAD_INPUT)
        except PastaError as error:
            _fail(str(error), FAILED)
        except ModuleNotFoundError as error:
            _fail(missing(error), FAILED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                _drop_stdout()
                _fail(f"cannot write: {error.strerror}", FAILED)
            if os.environ.get("PASTA_DEBUG"):
                raise
            what = f"{type(error).__name__}: {error}"[:300]
            _fail(f"internal error, please report it ({what}); PASTA_DEBUG=1 shows where", FAILED)

    signature = inspect.signature(function, eval_str=True)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [*signature.parameters.values(), context]
    guarded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    guarded.__annotations__ = {**function.__annotations__, "context": typer.Context}
    return guarded


def _check_arguments(context: typer.Context, arguments: Mapping[str, Any]) -> None:
    """Raises RequestError for an argument that is no text (names of files may be), and for an option that does
    nothing beside the others."""
    named = {p.name or "": p.opts[0] if p.opts[0].startswith("-") else f"the {p.name}" for p in context.command.params}
    for name, value in arguments.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name != "file":
                check_text(text, named[name])
    for names, idle, why in _IDLE.get(context.command.name or "", ()):
        for name in names:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE" and idle(arguments):
                raise RequestError(f"{named[name]} does nothing {why}: leave out one of them")


_Rule = tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool], str]
"""Options, when they do nothing, and that in words."""
_GREEDY: _Rule = ("top_p", "top_k", "min_p"), lambda a: a["temperature"] == 0, "at --temperature 0, which is greedy"
_FORKING: tuple[_Rule, ...] = (
    (("parallelism",), lambda a: a["sequential"], "with --sequential"),
    (
        ("positions", "max_threads"),
        lambda a: a["sequential"] or a["parallelism"] == 0,
        "where nothing forks (--sequential, --parallelism 0)",
    ),
)
_ASKING = ("base_url", "concurrency", "price_in", "price_out")
"""Options of a large model that is asked."""


def _judged(arguments: Mapping[str, Any]) -> bool:
    named = [*(arguments["scorer"] or ()), *(given.partition("=")[0] for given in arguments["sigma"] or ())]
    return "judge" in named


_IDLE: Mapping[str, tuple[_Rule, ...]] = {
    "generate": (*_FORKING, _GREEDY, (("system",), lambda a: a["raw"], "with --raw, which has no messages")),
    "chat": _FORKING,
    "replay": ((("speed",), lambda a: a["as_json"] or a["no_live"], "without the live view (--json, --no-live)"),),
    "serve": ((("max_model_len",), lambda a: a["base_url"] is not None, "with --base-url, whose server has its own"),),
    "annotate": (
        ((*_ASKING, "model", "max_tokens"), lambda a: a["annotator"] != "openai", "without --annotator openai"),
    ),
    "sample": (_GREEDY,),
    "score": (
        (_ASKING, lambda a: a["scorer"] != "judge", "without --scorer judge"),
        (("adapter", "device"), lambda a: a["scorer"] != "pmi", "without --scorer pmi"),
        (("references",), lambda a: a["scorer"] != "reference", "without --scorer reference"),
    ),
    "eval": (
        ((*_ASKING, "judge", "gamed"), lambda a: not _judged(a), "without --scorer judge"),
        (("timed",), lambda a: a["requests"] == 1, "without --requests above 1"),
    ),
    "sft": ((("lora_rank",), lambda a: a["full"], "with --full, which trains all weights"),),
}
"""By the name of a verb."""


def _quiet() -> None:
    """Keeps the libraries' warnings and progress bars off the terminal, and from reporting what is done here (TRL's
    trainers would)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class _CtrlC:
    """Within it the first Ctrl-C only sets `pressed`, so that a step is not torn; the second raises."""

    pressed = False

    def __enter__(self) -> _CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


# ------------------------------------------------------------------------------ input and output


def _read(source: str) -> str:
    """A file's text; `-` is stdin. Raises DataError."""
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (at byte {error.start})") from None


def _open_trace(path: Path | None) -> TextIO | None:
    if path is None:
        return None
    if path.is_file() and path.stat().st_size:
        try:
            _read_trace(str(path))
        except DataError:
            raise DataError(f"{path} is there already, and is no trace: give another file") from None
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def _print_json(value: Any) -> None:
    """One line, in escapes of JSON's own where stdout does not take every character."""
    print(json.dumps(value, ensure_ascii=not _takes_everything()))


def _takes_everything() -> bool:
    """Whether stdout is UTF-8."""
    try:
        return codecs.lookup(sys.stdout.encoding or "").name == "utf-8"
    except LookupError:
        return False


@contextmanager
def _busy(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something takes long, if stderr is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(message) as status, _told(status.update):
        yield status.update


@contextmanager
def _told(progress: Callable[[str], None]) -> Iterator[None]:
    """Within it the package's log is told: warnings a line each, what goes on to `progress`."""

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            _say(f"pasta: {text}") if record.levelno >= logging.WARNING else progress(text)

    log, teller = logging.getLogger("pastalm"), Teller()
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(teller)
    try:
        yield
    finally:
        log.removeHandler(teller)
        log.setLevel(before)


def _load(
    model: str,
    adapter: str,
    dtype: str = "auto",
    positions: str | None = None,
    max_threads: int = 16,
    max_num_seqs: int = 1,
    max_model_len: int | None = None,
    device: str = "cpu",
    base_url: str | None = None,
    tokenizer: str | None = None,
    prompted: bool = False,
    engine: str = "auto",
    trust_remote_code: bool = False,
) -> LLM:
    from pastalm import LLM, Limits
    from pastalm.core.layout import POLICIES

    if positions is not None and positions not in POLICIES:
        raise RequestError(f"unknown positions {positions!r}: {', '.join(POLICIES)}")
    limits = Limits(max_threads=max_threads)
    chosen = None if adapter == "none" else adapter
    policy: Policy | None = positions
    if base_url is not None:
        if (adapter, dtype, device, engine) != ("auto", "auto", "cpu", "auto"):
            raise RequestError("the server has its weights: leave out --adapter, --dtype, --device and --engine")
        with _busy(f"asking {base_url}"):
            return LLM.remote(
                base_url,
                None if model == EMBEDDED else model,
                tokenizer=tokenizer,
                prompted=prompted,
                positions=policy,
                limits=limits,
                **({"max_num_seqs": max_num_seqs} if max_num_seqs > 1 else {}),
            )
    if tokenizer is not None or prompted:
        raise RequestError("--tokenizer and --prompted go with --base-url")
    with _busy(f"loading {model}"):
        return LLM(
            model,
            engine=engine,
            trust_remote_code=trust_remote_code,
            adapter=chosen,
            dtype=dtype,
            positions=policy,
            limits=limits,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            device=device,
        )


def _live() -> bool:
    return sys.stdout.isatty() and _takes_everything()


def _shown(
    stack: ExitStack,
    *,
    as_json: bool,
    live: bool,
    title: str,
    stops: Iterable[str] = (),
    cut: int | None = None,
) -> Output:
    """Where events are shown: nowhere yet (JSON), the moving picture, or plain text."""
    from rich.console import Console

    from pastalm.cli.view import Live, Plain, Silent

    if as_json:
        return Silent()
    if live:
        return stack.enter_context(Live(Console(), title))
    return Plain(sys.stdout, stops=tuple(stops), cut=cut)


def _decode(response: Response, output: Output, trace: TextIO | None = None) -> bool:
    """Shows a response to its end; whether Ctrl-C ended it early."""
    from pastalm.records.traces import to_json

    try:
        with _CtrlC() as ctrl_c:
            response.interrupted = lambda: ctrl_c.pressed
            for event in response:
                if trace is not None:
                    _append(trace, to_json(event))
                output.apply(event)
    finally:
        response.cancel()
    output.close()
    return ctrl_c.pressed


def _append(file: TextIO, line: str) -> None:
    """One more line of a file that is being written. Raises DataError."""
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise DataError(f"cannot write {file.name}: {error.strerror}") from None


def _conclude(transcript: Any, *, as_json: bool, live: bool, interrupted: bool = False, last: bool = True) -> None:
    """What follows the answer: JSON on stdout, or the figures on stderr; then exit 130 if need be."""
    from pastalm.cli.view import figures

    sys.stdout.flush()
    if as_json:
        _print_json(transcript.to_dict())
    elif not live:
        print(figures(transcript), file=sys.stderr)
    if interrupted:
        _fail("interrupted: this is what was there", INTERRUPTED)
    if transcript.why and last:
        _fail(f"a part of the answer is missing: {transcript.why}", FAILED)
    if transcript.why:
        _say(f"a part of the answer is missing: {transcript.why}")


# ------------------------------------------------------------------------------ answers


@app.command()
@_verb
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.")],
    model: Model = EMBEDDED,
    adapter: Adapter = "auto",
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the top probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer before this text (repeatable).")] = None,
    parallelism: Parallelism = 1.0,
    sequential: Sequential = False,
    positions: Positions = None,
    max_threads: MaxThreads = 16,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the prompt, no chat template.")] = False,
    engine: Engine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
    trace: Annotated[Path | None, typer.Option(help="Write the events to this file (JSONL).")] = None,
    no_live: NoLive = False,
    base_url: BaseUrl = None,
    tokenizer: Tokenizer = None,
    prompted: Prompted = False,
) -> None:
    """Answer a prompt, its independent parts at the same time."""
    text = _read("-") if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty: give some text")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        parallelism=0.0 if sequential else parallelism,
    )
    _quiet()
    live = _live() and not no_live
    with ExitStack() as stack:
        file = _open_trace(trace)
        if file is not None:
            stack.enter_context(file)
        llm = _load(
            model,
            adapter,
            dtype,
            positions,
            max_threads,
            device=device,
            base_url=base_url,
            tokenizer=tokenizer,
            prompted=prompted,
            engine=engine,
            trust_remote_code=trust_remote_code,
        )
        stream = llm.stream(text if raw else _messages(text, system), params)
        title = f"{model} · {'asynchronous' if params.parallelism else 'sequential'}"
        output = _shown(stack, as_json=as_json, live=live, title=title, stops=params.stop_strings)
        interrupted = _decode(stream, output, file)
    _conclude(stream.transcript, as_json=as_json, live=live, interrupted=interrupted)


def _messages(prompt: str, system: str | None) -> list[Message]:
    user: Message = {"role": "user", "content": prompt}
    return [user] if system is None else [{"role": "system", "content": system}, user]


@app.command()
@_verb
def replay(
    file: Annotated[str, typer.Argument(help="A trace (generate --trace); - is stdin.")],
    speed: Annotated[float, typer.Option(help="Times as fast as it was.")] = 1.0,
    as_json: AsJson = False,
    no_live: NoLive = False,
) -> None:
    """Show a trace again, without a model."""
    from pastalm.cli.view import Silent, paced

    if not speed > 0:
        raise RequestError("speed must be above 0")
    events = _read_trace(file)
    live = _live() and not no_live and not as_json
    cut = next((c for c in (getattr(e, "cut", None) for e in events) if c is not None), None)
    whole = Silent()
    with ExitStack() as stack:
        output = _shown(stack, as_json=as_json, live=live, title=file, cut=cut)
        for event in paced(events, speed) if live else events:
            output.apply(event)
            whole.apply(event)
        output.close()
    _conclude(whole.transcript, as_json=as_json, live=live)


def _read_trace(source: str) -> list[Event]:
    """The events of a trace, checked to be one. Raises DataError."""
    from pastalm.core.transcript import Transcript
    from pastalm.records.traces import from_json

    events: list[Event] = []
    transcript = Transcript()
    for number, line in enumerate(_read(source).split("\n"), 1):
        if not line.strip():
            continue
        try:
            events.append(from_json(line))
            transcript.apply(events[-1])
        except DataError as error:
            raise DataError(f"{source}, line {number}: {error}") from None
        except KeyError:
            raise DataError(f"{source}, line {number}: an event of a thread that never began") from None
    if not events:
        raise DataError(f"{source} holds no events")
    return events


@app.command()
@_verb
def chat(
    model: Model = EMBEDDED,
    adapter: Adapter = "auto",
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    parallelism: Parallelism = 1.0,
    sequential: Sequential = False,
    positions: Positions = None,
    max_threads: MaxThreads = 16,
    system: System = None,
    engine: Engine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    no_live: NoLive = False,
    base_url: BaseUrl = None,
    tokenizer: Tokenizer = None,
    prompted: Prompted = False,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends, Ctrl-C stops an answer."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        parallelism=0.0 if sequential else parallelism,
    )
    _quiet()
    llm = _load(
        model,
        adapter,
        dtype,
        positions,
        max_threads,
        device=device,
        base_url=base_url,
        tokenizer=tokenizer,
        prompted=prompted,
        engine=engine,
        trust_remote_code=trust_remote_code,
    )
    history: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    live = _live() and not no_live
    while (line := _ask()) is not None:
        history.append({"role": "user", "content": line})
        with ExitStack() as stack:
            stream = llm.stream(history, params)
            output = _shown(stack, as_json=False, live=live, title=model)
            _decode(stream, output)
        _conclude(stream.transcript, as_json=False, live=live, last=False)
        history.append({"role": "assistant", "content": stream.transcript.text})


def _ask() -> str | None:
    """The next line of the user; None at the end."""
    prompt = "> " if sys.stdin.isatty() else ""
    print(prompt, end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not {error.encoding.upper()} (at byte {error.start})") from None
    check_text(line, "the line")
    return line.strip() or None


@app.command()
@_verb
def demo(
    model: Model = EMBEDDED,
    adapter: Adapter = "auto",
    prompt: Annotated[str, typer.Option(help="What to answer.")] = DEMO_PROMPT,
    max_tokens: MaxTokens = 1024,
    engine: Engine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    no_live: NoLive = False,
) -> None:
    """One prompt asynchronously, then sequentially, and the time of each."""
    params = [SamplingParams(max_tokens=max_tokens, temperature=0, parallelism=p) for p in (1, 0)]
    _quiet()
    _fetch(model)
    llm = _load(model, adapter, dtype, device=device, engine=engine, trust_remote_code=trust_remote_code)
    # the first steps of a process are slower than all later ones; neither answer should pay for that
    llm.chat(_messages(prompt, None), SamplingParams(max_tokens=8, temperature=0))
    live = _live() and not no_live
    done = []
    for title, each in zip(("asynchronous", "sequential"), params, strict=True):
        print(f"\n{prompt}  [{title}]\n", file=sys.stderr)
        with ExitStack() as stack:
            stream = llm.stream(_messages(prompt, None), each)
            output = _shown(stack, as_json=False, live=live, title=f"{model} · {title}")
            interrupted = _decode(stream, output)
        _conclude(stream.transcript, as_json=False, live=live, interrupted=interrupted)
        done.append(stream.transcript)
    print(_verdict(*done), file=sys.stderr)


def _verdict(asynchronous: Any, sequential: Any) -> str:
    times = [t.seconds for t in (asynchronous, sequential)]
    return (
        f"\nasynchronous {times[0]:.2f} s for {asynchronous.tokens} tokens in {asynchronous.steps} "
        f"steps; sequential {times[1]:.2f} s for {sequential.tokens} tokens in {sequential.steps} "
        f"steps: {times[1] / times[0]:.2f} times as fast, "
        f"{sequential.seconds / sequential.tokens / (times[0] / asynchronous.tokens):.2f} times as "
        "fast a token"
    )


# ------------------------------------------------------------------------------ the server


@app.command()
@_verb
def serve(
    model: Annotated[str, typer.Argument(help="The embedded model, a hub name, a folder, or a GGUF file.")] = EMBEDDED,
    adapter: Adapter = "auto",
    host: Annotated[str, typer.Option(help="0.0.0.0 is every interface; then give an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's, for clients; else as given here.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="PASTA_API_KEY", help="What clients must bring.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A page's origin that may ask from a browser, * for any; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name beside localhost that a server on loopback may be called by, * for any; repeatable."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Answers decoded at once.", min=1)] = 8,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait beside; more get 429.")] = 64,
    max_model_len: MaxModelLen = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of one prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of a chat request that gives none.")] = 1024,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, waiting included.")] = 600.0,
    client_timeout: Annotated[
        float, typer.Option(help="Seconds for a client to send its body, or to take a chunk.")
    ] = 30.0,
    parallelism: Annotated[
        float, typer.Option(help="Of requests that give none: multiplies the odds of forking; 0 turns it off.")
    ] = 1.0,
    thread_target: Annotated[
        int, typer.Option(help="Above so many live threads new requests do not fork (0: they always may).")
    ] = 32,
    positions: Positions = None,
    max_threads: Annotated[int, typer.Option(help="Threads of an answer at once; others wait.")] = 16,
    engine: Engine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    base_url: BaseUrl = None,
    tokenizer: Tokenizer = None,
    prompted: Prompted = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does; SIGTERM or Ctrl-C finishes what runs."""
    from pastalm.server.app import Settings, listen
    from pastalm.server.app import serve as run

    settings = Settings(
        name=name or Path(model).name,
        api_key=api_key,
        parallelism=parallelism,
        thread_target=thread_target,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_body=max_body,
        client_timeout=client_timeout,
        timeout=timeout,
        cors_origins=tuple(cors_origin or ()),
        hosts=tuple(allowed_host or ()),
    )
    _quiet()
    with listen(host, port) as listening:
        if base_url is None:
            _fetch(model)
        llm = _load(
            model,
            adapter,
            dtype,
            positions,
            max_threads,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            device=device,
            base_url=base_url,
            tokenizer=tokenizer,
            prompted=prompted,
            engine=engine,
            trust_remote_code=trust_remote_code,
        )
        where = f"[{host}]" if ":" in host else host
        _say(f"{settings.name} on http://{where}:{listening.getsockname()[1]}/v1")
        run(llm, settings, listening)


# ------------------------------------------------------------------------------ language and models


@app.command()
@_verb
def parse(
    file: Annotated[str, typer.Argument(help="PASTA-LANG text; - is stdin.")] = "-",
    strip: Annotated[bool, typer.Option("--strip", help="Only the reader's text.")] = False,
    render: Annotated[bool, typer.Option("--render", help="The text form, normalized.")] = False,
) -> None:
    """Parse PASTA-LANG: prints its values as JSON."""
    from pastalm.core import language

    if strip and render:
        raise RequestError("give --strip or --render, not both")
    document = language.parse(_read(file))
    if strip or render:
        sys.stdout.write(language.strip(document) if strip else language.render(document))
    else:
        _print_json([_value(node) for node in document])


def _value(node: Any) -> dict[str, Any]:
    from pastalm.core.language import Async, Promise, Text

    if isinstance(node, Text):
        return {"type": "text", "text": node.text}
    if isinstance(node, Promise):
        return {"type": "promise", "topic": node.topic, "tokens": node.tokens}
    if isinstance(node, Async):
        return {"type": "async", "body": [_value(inner) for inner in node.body]}
    return {"type": "sync"}


@app.command()
@_verb
def pull(
    name: Annotated[str, typer.Argument(help="The embedded model or a hub name.")] = EMBEDDED,
) -> None:
    """Fetch a model's weights into the cache; prints their folder."""
    print(_fetch(name))


def _fetch(name: str) -> Path:
    from pastalm import models

    if (file := Path(name)).suffix == ".gguf":
        if not file.is_file():
            raise ModelError(f"no GGUF file at {name}")
        return file
    _quiet()
    with _busy(f"looking for {name}") as say:
        return models.pull(name, progress=say)


@app.command()
@_verb
def export(
    target: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    kind: Annotated[
        str, typer.Option("--gguf", help="Weight type: F32, F16, BF16, Q8_0, Q6_K, Q4_K_M, Q4_0, …")
    ] = "F16",
    model: Model = EMBEDDED,
    adapter: Adapter = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model and its adapter as one GGUF file, which llama.cpp runs."""
    from pastalm import models
    from pastalm.models import gguf_files

    _quiet()
    with _busy(f"loading {model}") as say:
        chosen = None if adapter == "none" else adapter
        loaded = models.load(model, adapter=chosen, dtype="float32", trust_remote_code=trust_remote_code)
        path = gguf_files.export(loaded, target, kind.upper(), progress=say)
    print(f"{path} ({path.stat().st_size / 1e6:.0f} MB)", file=sys.stderr)


@app.command()
@_verb
def env(as_json: AsJson = False) -> None:
    """What is installed here, what each engine supports, and which models are at hand."""
    _quiet()
    facts = _facts()
    if as_json:
        _print_json(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(key)
            for name, detail in value.items():
                print(f"  {name:<22} {detail}")
        else:
            print(f"{key:<24} {value}")


def _facts() -> dict[str, Any]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import pastalm

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "transformers", "peft", "gguf", "safetensors", "llama-cpp-python", "trl", "datasets", "openai")
    return {
        "pastalm": pastalm.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "bfloat16 on the CPU": _bfloat16(),
        "packages": {name: installed(name) for name in packages},
        "engines": _engines(),
        "models": _models(),
    }


def _bfloat16() -> str:
    from pastalm import models

    try:
        return "yes" if models.cpu_has_bfloat16() else "no: float32 is the default"
    except ModuleNotFoundError:
        return "unknown: torch is not installed"


_ENGINES = {
    "scripted": "",
    "transformers.engine": "transformers",
    "llama_cpp": "llama-cpp",
    "completions.engine": "remote",
}
"""Modules of engines, and the extra of the package that brings what each needs."""


def _engines() -> dict[str, str]:
    """What each engine that works here declares, and how to get the others."""
    from importlib import import_module

    found = {"native": _native()}
    for module, extra in _ENGINES.items():
        try:
            engine = import_module(f"pastalm.engines.{module}")
            note = getattr(engine, "advice", str)()
            found[engine.CAPABILITIES.name] = f"works: {engine.CAPABILITIES}" + (note and f"; {note}")
        except ImportError:
            found[module.removesuffix(".engine").replace("_", ".")] = f"pip install 'pastalm[{extra}]'"
    return found


def _native() -> str:
    """What our own engine for CPUs runs with here, or what is missing."""
    from pastalm.engines.native import engine, library, model

    if reason := library.unavailable():
        return reason
    kernels = library.library().pastalm_kernels().decode()
    return f"works: {engine.CAPABILITIES}; {kernels} kernels, {model.processors()} threads"


def _models() -> dict[str, str]:
    from pastalm import models

    folder = models.cache_folder()
    found = {p.parent.name: str(p.parent) for p in sorted(folder.glob("*/model.safetensors"))}
    found.setdefault(EMBEDDED, "not fetched yet: pasta pull")
    for card in sorted(models.ADAPTERS.glob("*/adapter_config.json")):
        found[f"adapter for {card.parent.name}"] = "ships with the package"
    return found


# ------------------------------------------------------------------------------ training


@app.command()
@_verb
def annotate(
    source: Annotated[
        Path,
        typer.Argument(
            help="JSON or JSONL, also .gz: {prompt, response}, Alpaca's, messages, ShareGPT's, or what pasta sample"
            " wrote."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="JSONL of annotated answers; goes on where it is.")],
    annotator: Annotated[
        str,
        typer.Option(help="structural (lists, titles; no model), openai (a large model), or apar (form alone)."),
    ] = "structural",
    base_url: BaseUrl = None,
    model: Annotated[str | None, typer.Option(help="The large model that annotates.")] = None,
    concurrency: Concurrency = 8,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Of one annotation (openai).")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Rows of SOURCE to look at.")] = None,
    max_repetition: Annotated[
        float, typer.Option(help="Answers that say a larger share of their words again are dropped.")
    ] = 1.0,
    tokenizer: Annotated[str, typer.Option(help="The model whose tokens promised lengths count.")] = EMBEDDED,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Mark the independent parts of existing answers in PASTA-LANG."""
    from pastalm.train.annotate import Annotator, Counts, Row, Structural, annotate_file

    if not source.is_file():
        raise DataError(f"no file {source}")
    if annotator not in ("structural", "openai", "apar"):
        raise RequestError(f"unknown annotator {annotator!r}: use structural, openai or apar")
    remote: Remote[Row] | None = None
    if annotator == "openai":
        remote = _remote(base_url, model, concurrency, price_in, price_out)
        remote.options = {"temperature": 0, "max_tokens": max_tokens}
    count_tokens = _token_counter(tokenizer)
    marks: Annotator = Structural(count_tokens)
    if annotator == "apar":
        from pastalm.eval.baselines import apar

        marks = Structural(count_tokens, lambda response, count, _: apar.annotate(response, count))
    if remote is not None:
        from pastalm.train.annotate_remote import LanguageModel

        marks = LanguageModel(remote, count_tokens)
    with _busy(f"annotating {source.name}") as say:

        def progress(counts: Counts) -> None:
            if counts.read % 20 == 0 or remote is not None:
                said = f"{counts.read} rows read, {counts.structured} with two chunks or more"
                say(said if remote is None else f"{said}; {remote.usage}")

        try:
            counts = annotate_file(
                source,
                target,
                marks,
                count_tokens,
                limit=limit,
                max_repetition=max_repetition,
                models=_tokenizer_of(tokenizer)
                | {"annotator": annotator}
                | ({} if remote is None else {"model": remote.model, "max_tokens": max_tokens}),
                overwrite=overwrite,
                bad=_skipped(skip_bad),
                progress=progress,
            )
        finally:
            if remote is not None:
                print(f"{remote.base_url}: {remote.usage}", file=sys.stderr)
    dropped = ", ".join(f"{n} {why}" for why, n in counts.dropped.items()) or "none"
    print(
        f"{counts.read} rows read, {counts.skipped} were there, {counts.written} written, "
        f"{counts.structured} with two chunks or more, {counts.chunks} chunks; dropped: {dropped}",
        file=sys.stderr,
    )


def _remote(
    base_url: str | None, model: str | None, concurrency: int, price_in: float, price_out: float
) -> Remote[Any]:
    """A server to ask; its key comes from OPENAI_API_KEY. Raises RequestError."""
    from pastalm.records.chat_client import Remote, Usage

    if base_url is None or model is None:
        raise RequestError(
            "give --base-url (of an OpenAI-compatible server) and --model (to judge: --judge), one of its models"
        )
    if concurrency < 1:
        raise RequestError("concurrency must be 1 or more")
    usage = Usage(prices=(price_in, price_out))
    return Remote(base_url, model, concurrency=concurrency, usage=usage)


def _skipped(skip: bool) -> Callable[[PastaError], None] | None:
    """Names a row that is left out; None: none is."""
    return (lambda error: _print_error(f"left out: {error}")) if skip else None


def _tokenizer_of(model: str) -> dict[str, Any]:
    """For the header of a file: whose tokens count."""
    from pastalm.models import contents

    return {"tokenizer": contents.of_file(_fetch(model) / "tokenizer.json") | {"name": Path(model).name}}


def _models_of(model: str, adapter: str) -> dict[str, Any]:
    """For the header of a file: what answers or scores, by its contents."""
    from pastalm.models import contents

    _fetch(model)
    return {
        "model": contents.of_model(model),
        "adapter": contents.of_adapter(model, None if adapter == "none" else adapter),
    }


def _check_apart(target: Path, *sources: Path | None) -> None:
    """Raises DataError where results would be written over what they are made from."""
    for source in sources:
        if source is not None and source.exists() and target.exists() and target.samefile(source):
            raise DataError(f"{target} is what is read: give another file for the result")


def _token_counter(model: str) -> Callable[[str], int]:
    """Tokens of a text under a model's vocabulary, without loading the model."""
    path = _fetch(model) / "tokenizer.json"
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer of {model} ({path}): {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


Prompts = Annotated[
    Path,
    typer.Argument(
        help="JSON or JSONL, also .gz: {prompt}, Alpaca's, AlpacaEval's, messages, ShareGPT's, MT-bench's or"
        " Spec-Bench's."
    ),
]


@app.command()
@_verb
def sample(
    source: Prompts,
    target: Annotated[Path, typer.Argument(help="JSONL of answers; goes on where it is.")],
    model: Model = EMBEDDED,
    adapter: Adapter = "auto",
    n: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    temperature: Temperature = 0.0,
    top_p: float = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: against loops; 1 is off.")] = 1.0,
    max_tokens: MaxTokens = 1024,
    sequential: Sequential = False,
    limit: Annotated[int | None, typer.Option(help="Prompts of SOURCE to answer.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Answers decoded at once.")] = 32,
    max_model_len: MaxModelLen = None,
    seed: Seed = 0,
    engine: Engine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Let a model answer many prompts at once, as data to finetune on."""
    from pastalm.records import answers, prompts
    from pastalm.sampling import Sampled, made
    from pastalm.sampling import sample as run

    _check_apart(target, source)
    asked = prompts.read(source, limit, bad=_skipped(skip_bad))
    params = SamplingParams(
        n=n,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        seed=seed,
        parallelism=0 if sequential else 1,
    )
    _quiet()
    told = _models_of(model, adapter) | {
        "engine": engine, "dtype": dtype, "device": device, "max_model_len": max_model_len
    }  # fmt: skip
    answers.results(target, answers.KIND, made(params, told), asked, overwrite=overwrite)  # before a model is loaded
    llm = _load(
        model,
        adapter,
        dtype,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        device=device,
        engine=engine,
        trust_remote_code=trust_remote_code,
    )
    with _busy(f"answering {source.name}") as say:

        def progress(counts: Sampled) -> None:
            if counts.written % 10 == 0:
                say(f"{counts.written} answers, {counts.tokens} tokens")

        counts = run(
            llm,
            asked,
            target,
            params,
            models=told,
            overwrite=overwrite,
            progress=progress,
            refuse=lambda error: _print_error(f"left out: {error}"),
        )
    ended = ", ".join(f"{many} {why}" for why, many in sorted(counts.ended.items())) or "none"
    print(
        f"{counts.written} answers written ({ended}; {counts.tokens} tokens), {counts.skipped} were there, "
        f"{counts.refused} prompts did not fit",
        file=sys.stderr,
    )


@app.command()
@_verb
def score(
    samples: Annotated[Path, typer.Argument(help="What pasta sample wrote: N answers to each prompt.")],
    target: Annotated[Path, typer.Argument(help="JSONL of scored answers; goes on where it is.")],
    baseline: Annotated[Path, typer.Option(help="The sequential baseline's answers (pasta sample --sequential).")],
    scorer: Annotated[str, typer.Option(help="pmi, reference, or judge (a large model).")] = "pmi",
    model: Annotated[
        str, typer.Option(help="pmi: the frozen model; judge: the large model's name at --base-url.")
    ] = EMBEDDED,
    adapter: Annotated[str, typer.Option(help="pmi: that of the model finetuned without tags, or none.")] = "none",
    references: Annotated[
        Path | None, typer.Option(help="JSON or JSONL: {id, reference or response or output} each.")
    ] = None,
    base_url: BaseUrl = None,
    concurrency: Concurrency = 8,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    sigma: Annotated[
        float | None, typer.Option(help="Unit of differences (that of the stage-1 samples); else theirs.")
    ] = None,
    length: Counted = "theoretical",
    limit: Annotated[int | None, typer.Option(help="Prompts to look at.")] = None,
    tokenizer: Annotated[str, typer.Option(help="The model whose tokens count.")] = EMBEDDED,
    device: Device = "cpu",
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Score sampled answers by speed and quality against the baseline's."""
    from pastalm.eval.score import Counts
    from pastalm.eval.score import score as run
    from pastalm.records import jsonl, scores

    counted = scores.check_length(length)
    for path in (samples, baseline, references):
        if path is not None and not path.is_file():
            raise DataError(f"no file {path}")
    if scorer == "reference" and references is None:
        raise RequestError("scoring by reference needs --references")
    _check_apart(target, samples, baseline, references)
    _quiet()
    count_tokens = _token_counter(tokenizer)
    told = _scoring(scorer, model, adapter, model, device) | _tokenizer_of(tokenizer)
    jsonl.Results(target, scores.KIND, {"scorer": scorer, **told}, overwrite=overwrite)  # before a model is loaded
    (by,), remote = _scorers([scorer], model, adapter, model, device, base_url, concurrency, price_in, price_out)
    with _busy(f"scoring {samples.name}") as say:

        def progress(counts: Counts) -> None:
            said = f"{counts.written} answers scored"
            say(said if remote is None else f"{said}; {remote.usage}")

        counts = run(
            samples,
            baseline,
            target,
            by,
            count_tokens,
            references=references,
            limit=limit,
            models=told,
            overwrite=overwrite,
            bad=_skipped(skip_bad),
            progress=progress,
        )
    unscored = ", ".join(f"{n} {why}" for why, n in counts.unscored.items()) or "none"
    print(
        f"{counts.written} answers scored, {counts.skipped} were there; without a verdict: {unscored}",
        file=sys.stderr,
    )
    rows = scores.read(target)
    unit = scores.spread(rows) if sigma is None else sigma
    _print_json({"sigma": unit, **scores.summary(rows, (1, 2, 4, 8, float("inf")), unit, counted)})


@app.command("eval")
@_verb
def evaluate(
    systems: Annotated[
        list[str],
        typer.Argument(
            help="NAME=ADAPTER each (NAME=ADAPTER:off with its tags off; :promised or :overlap, those positions), or a"
            " method: sot, sot-routed, lookup, llma."
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            help="JSON or JSONL, also .gz: {prompt}, Alpaca's, AlpacaEval's, messages, ShareGPT's, MT-bench's or"
            " Spec-Bench's; alpaca_eval: the hub's."
        ),
    ],
    baseline: Annotated[str, typer.Option(help="Adapter of the sequential baseline; none: the model as it is.")],
    out: Annotated[Path, typer.Option(help="Folder of answers and scores; goes on where it is.")],
    report: Annotated[Path | None, typer.Option(help="Folder of page, pictures and figures (OUT/report).")] = None,
    model: Model = EMBEDDED,
    scorer: Annotated[list[str] | None, typer.Option(help="pmi, reference, or judge; as many as you like.")] = None,
    sigma: Annotated[
        list[str] | None, typer.Option(help="SCORER=UNIT of its differences; else their standard deviation.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="The large model that judges, at --base-url.")] = None,
    gamed: Annotated[
        Path | None, typer.Option(help="AlpacaEval's df_gamed.csv, where the hub cannot be reached.")
    ] = None,
    base_url: BaseUrl = None,
    concurrency: Concurrency = 8,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_tokens: MaxTokens = 1024,
    limit: Annotated[int | None, typer.Option(help="Prompts to look at.")] = None,
    requests: Annotated[int, typer.Option(help="Answers decoded at once: figures under load.")] = 1,
    timed: Annotated[
        int, typer.Option(help="With --requests: prompts answered one at a time instead, for the realized figures.")
    ] = 0,
    begin: Annotated[
        str, typer.Option("--from", help="decode, score or report: what is missing of the steps before is left out.")
    ] = "decode",
    matched: Annotated[
        bool, typer.Option("--matched/--no-matched", help="Decode each text sequentially too, for realized figures.")
    ] = True,
    length: Counted = "theoretical",
    against: Annotated[
        str | None, typer.Option(help="One of the systems: how much higher the others' scores are than its.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Leave prompts and answers out of the page.")] = False,
    seed: Seed = 0,
    engine: Engine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare systems by speed and quality: a table, pictures, a page."""
    from pastalm.eval import alpaca, measure
    from pastalm.eval import report as pages
    from pastalm.eval.compare import markdown
    from pastalm.eval.evaluate import (
        BASELINE,
        COPYING,
        build,
        check,
        check_answers,
        check_folder,
        check_scores,
        compare_all,
        described,
        score_all,
        win_rates,
    )
    from pastalm.eval.systems import Decoding
    from pastalm.records import prompts as files
    from pastalm.records.scores import check_length

    counted = check_length(length)
    if str(prompts) == alpaca.NAME and not prompts.exists():
        prompts = alpaca.fetch()
    asked = files.read(prompts, limit, bad=_skipped(skip_bad))
    names = check(systems)
    if begin not in ("decode", "score", "report"):
        raise RequestError(f"--from takes decode, score or report, got {begin!r}")
    if against is not None and against not in names:
        raise RequestError(f"--against names one of the systems, got {against!r}")
    units = _units(sigma or [], scorer or [])
    if engine == "auto" and (copying := [name for name in names if name in COPYING]):
        engine = "transformers"
        _say(f"{' and '.join(copying)} runs on transformers, so every system does")
    _quiet()
    settings: dict[str, Any] = {"max_tokens": max_tokens, "requests": requests, "matched": matched, "seed": seed or 0}
    settings |= {"engine": engine, "dtype": dtype, "device": device}
    adapters = {name: _adapter_of(model, name, begin != "decode") for name in {baseline, *map(_adapter, systems)}}
    made = described(systems, adapters.get, baseline, {**_models_of(model, "none"), **settings})
    scoring = {name: _scoring(name, model, baseline, judge, device) | _tokenizer_of(model) for name in units}
    if begin != "report":
        check_scores(out, names, scoring, overwrite=overwrite)
    if begin == "decode":
        check_folder(out, made, asked, overwrite=overwrite)
    else:
        check_answers(out, {name: told for name, told in made.items() if told["adapter"] != _ELSEWHERE})
    few = 10 if any(s.startswith("sot") for s in systems) else 1  # the parts of one answer

    def loader(at_once: int) -> Callable[[str, Policy | None], LLM]:
        return lambda adapter, positions: _load(
            model,
            adapter,
            dtype,
            positions,
            max_num_seqs=at_once,
            device=device,
            engine=engine,
            trust_remote_code=trust_remote_code,
        )

    by, remote = _scorers(list(units), model, baseline, judge, device, base_url, concurrency, price_in, price_out)
    base = Decoding(BASELINE, loader(few)(baseline, None), parallelism=0)
    encode = base.llm.loaded.vocabulary.encode

    def count_tokens(text: str) -> int:
        return len(encode(text))

    with _busy(f"answering {prompts.name}") as say:
        alone = asked if requests == 1 else measure.spread(asked, timed)
        counts = measure.Counts()
        if begin == "decode" and alone:
            counts += measure.measure(
                list(build(systems, base, loader(few))),
                alone,
                out / "answers",
                matched=base if matched else None,
                max_tokens=max_tokens,
                seed=seed or 0,
                among=asked,
                made=made,
                overwrite=overwrite,
                progress=lambda c, _: say(f"{c.prompts} of {len(alone)} prompts"),
            )
        if begin == "decode" and requests > 1:
            load = loader(max(requests, few))
            counts += measure.under_load(
                build(systems, Decoding(BASELINE, load(baseline, None), parallelism=0), load),
                [prompt for prompt in asked if prompt not in alone],
                out / "answers",
                max_tokens=max_tokens,
                timed=not alone,
                among=asked,
                made=made,
                overwrite=overwrite and not alone,
                progress=lambda c, _: say(f"{c.written} answers, {c.skipped} were there"),
            )
    refused = "".join(f"; {n} refused: {why}" for why, n in counts.refused.items())
    print(f"{counts.written} answers, {counts.skipped} were there{refused}", file=sys.stderr)
    with _busy("scoring") as say:
        missing = score_all(
            out,
            names if begin != "report" else [],
            by,
            count_tokens,
            references=prompts,
            models=scoring,
            overwrite=overwrite,
            bad=_skipped(skip_bad),
            progress=lambda what, c: say(f"{what}: {c.written} answers{'' if remote is None else f'; {remote.usage}'}"),
        )
    for name, reasons in missing.items():
        for why, many in reasons.items():
            print(f"{many} answers without a verdict by {name}: {why}; start again to ask again", file=sys.stderr)
    rows, sigmas = compare_all(out, names, units, count_tokens, counted)
    wins = win_rates(out, rows, gamed)
    told = {
        "command": " ".join(["pasta", *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])]),
        "model": Path(model).name,
        "prompts file": prompts.name,
        "requests at once": requests,
        "prompts answered one at a time": len(alone),
        "most tokens": max_tokens,
        "sigmas": sigmas,
        "without a verdict": missing,
        "win rates": {name: won.to_dict() for name, won in wins.items()},
    }
    table = markdown(rows, sigmas, against, counted)
    page = pages.write(report or out / "report", rows, table, baseline=BASELINE, told=told, public=public)
    print(table, end="")
    for name, won in wins.items():
        controlled = "" if won.length_controlled is None else f", length-controlled {won.length_controlled:.1f} %"
        print(f"{name}: win rate {won.win_rate:.1f} %{controlled} (n = {won.n}, {won.missing} missing, {won.form})")
    print(page, file=sys.stderr)


_ELSEWHERE = {"name": "", "sha256": ""}
"""Stands for an adapter that is not on this machine."""


def _adapter(system: str) -> str:
    from pastalm.eval.evaluate import asked

    return asked(system).adapter


def _adapter_of(model: str, adapter: str, may_lack: bool) -> dict[str, str] | None:
    """An adapter by its contents. may_lack: answers may have been decoded on another machine."""
    from pastalm.models import contents

    if adapter in ("", "none"):
        return None
    try:
        return contents.of_adapter(model, adapter)
    except ModelError:
        if may_lack:
            return _ELSEWHERE
        raise


def _units(given: list[str], scorers: list[str]) -> dict[str, float | None]:
    """The unit of each scorer that was asked for."""
    units: dict[str, float | None] = dict.fromkeys(scorers)
    for entry in given:
        name, _, value = entry.partition("=")
        try:
            units[name] = float(value)
        except ValueError:
            raise RequestError(f"--sigma takes SCORER=UNIT, got {entry!r}") from None
        if units[name] is not None and not 0 < float(value) < float("inf"):
            raise RequestError(f"a unit must be above 0, got {entry!r}")
    return units


def _scoring(scorer: str, model: str, adapter: str, judge: str | None, device: str) -> dict[str, Any]:
    """For the header of a file: what scores, by its contents. Raises RequestError."""
    if scorer not in ("pmi", "reference", "judge"):
        raise RequestError(f"unknown scorer {scorer!r}: use pmi, reference or judge")
    if scorer == "pmi":
        return _models_of(model, adapter) | {"device": device}
    return {"judge": judge} if scorer == "judge" else {}


def _scorers(
    names: list[str],
    model: str,
    adapter: str,
    judge: str | None,
    device: str,
    base_url: str | None,
    concurrency: int,
    price_in: float,
    price_out: float,
) -> tuple[list[Scorer], Remote[Any] | None]:
    """The scorers of those names, and the server that a judge asks."""
    from pastalm.eval.quality import Judge, PmiScorer, ReferenceScorer

    found: list[Scorer] = []
    remote: Remote[Any] | None = None
    for name in names:
        if name == "pmi":
            from pastalm import models

            chosen = None if adapter == "none" else adapter
            dtype = models.throughput_dtype(device)
            found.append(PmiScorer(models.load(model, adapter=chosen, dtype=dtype, device=device)))
        elif name == "reference":
            found.append(ReferenceScorer())
        elif name == "judge":
            remote = _remote(base_url, judge, concurrency, price_in, price_out)
            found.append(Judge(remote))
    return found, remote


Out = Annotated[Path, typer.Option(help="Folder for checkpoints, log and adapter.")]
MIX = ",".join(f"{policy}={weight}" for policy, weight in MIXED.items())
Policies = Annotated[str, typer.Option(help=f"Positions to train on, with weights: {MIX}.")]
SaveSteps = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Full = Annotated[bool, typer.Option("--full", help="Train all weights, and save a whole model.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
]
Flex = Annotated[bool, typer.Option("--flex", help="FlexAttention, compiled for each shape: for long rows on CUDA.")]


def _policies(text: str) -> dict[Policy, float]:
    """Weights of policies, `promised=0.65,overlap=0.35`. Raises RequestError."""
    names: dict[str, Policy] = {name: name for name in POLICIES}
    found: dict[Policy, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            found[names[name]] = float(weight or 1)
        except (KeyError, ValueError):
            raise RequestError(
                f"cannot read positions {part!r}: give {', '.join(names)}, each with a weight like promised=0.5"
            ) from None
    if min(found.values()) < 0 or sum(found.values()) <= 0:
        raise RequestError("weights of positions must be 0 or more, and not all 0")
    return found


@train.command()
@_verb
def sft(
    data: Annotated[Path, typer.Argument(help="What pasta annotate wrote.")],
    out: Out,
    model: Model = EMBEDDED,
    token_budget: Annotated[int, typer.Option(help="Tokens to draw from the data.")] = 800_000,
    max_row_tokens: Annotated[int, typer.Option(help="Longer answers are left out.")] = 512,
    plain: Annotated[float, typer.Option(help="Share of rows without chunks.")] = 0.33,
    sequential: Annotated[float, typer.Option(help="Share of rows untagged, under the sequential marker.")] = 0.12,
    untagged: Annotated[bool, typer.Option("--untagged", help="The same answers without tags: the baseline.")] = False,
    positions: Policies = MIX,
    lengths: Annotated[
        str, typer.Option(help="Ablation: promises say tens; fixed, always 100; oracle, positions know the true one.")
    ] = "tens",
    topics: Annotated[bool, typer.Option("--topics/--no-topics", help="Ablation: no topics, only numbers.")] = True,
    syncs: Annotated[bool, typer.Option("--syncs/--no-syncs", help="Ablation: chunks are never read.")] = True,
    epochs: float = 1.0,
    learning_rate: float = 5e-4,
    row_learning_rate: Annotated[float, typer.Option(help="Of the six new rows.")] = 5e-3,
    start: Annotated[Path | None, typer.Option(help="An adapter to go on from.")] = None,
    repeats: Annotated[
        Path | None,
        typer.Option(help="The model's own answers (pasta sample): repetitions to unlearn."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a step.")] = 2048,
    tag_weight: Annotated[float, typer.Option(help="Loss weight of decisions.")] = 2.0,
    lora_rank: int = 16,
    save_steps: SaveSteps = 40,
    full: Full = False,
    gradient_checkpointing: GradientCheckpointing = False,
    flex: Flex = False,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    seed: int = 0,
) -> None:
    """Stage 1: finetune a model (LoRA and six tag tokens) on annotated answers."""
    if not data.is_file():
        raise DataError(f"no annotated data at {data}: make it with pasta annotate")
    if repeats is not None and not repeats.is_file():
        raise DataError(f"no answers at {repeats}: make them with pasta sample")
    weights = _policies(positions)
    _quiet()
    from pastalm.train.dataset import Mix, check_lengths
    from pastalm.train.sft import SftConfig
    from pastalm.train.sft import train as run

    mix = Mix(
        token_budget=token_budget,
        max_tokens=max_row_tokens,
        plain=plain,
        sequential=sequential,
        positions=weights,
        untagged=untagged,
        lengths=check_lengths(lengths),
        topics=topics,
        syncs=syncs,
        seed=seed,
    )
    config = SftConfig(
        data=data,
        out=out,
        model=model,
        mix=mix,
        epochs=epochs,
        learning_rate=learning_rate,
        row_learning_rate=row_learning_rate,
        start=start,
        repeats=repeats,
        batch_tokens=batch_tokens,
        tag_weight=tag_weight,
        lora_rank=lora_rank,
        save_steps=save_steps,
        full=full,
        gradient_checkpointing=gradient_checkpointing,
        flex=flex,
        overwrite=overwrite,
        device=device,
        seed=seed,
    )
    _name_folder(run(config, progress=_say))


@train.command()
@_verb
def prefer(
    data: Annotated[Path, typer.Argument(help="What pasta score wrote: N answers to each prompt.")],
    out: Out,
    start: Annotated[Path, typer.Option(help="The adapter that answered: stage 1, or a round before.")],
    model: Model = EMBEDDED,
    lambda_: Annotated[
        float, typer.Option("--lambda", help="Worth of quality against speed; inf: quality alone.")
    ] = 1.0,
    alpha: Annotated[float, typer.Option(help="Weight of the term that teaches the better one.")] = 0.005,
    beta: Annotated[float | None, typer.Option(help="1/beta is the margin aimed at, in nats.")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Unit of the scorer's differences: of the stage-1 samples.")
    ] = None,
    length: Counted = "theoretical",
    positions: Policies = MIX,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    row_learning_rate: Annotated[float, typer.Option(help="Of the six tag rows.")] = 2e-4,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a step, both answers.")] = 4096,
    save_steps: SaveSteps = 40,
    full: Full = False,
    gradient_checkpointing: GradientCheckpointing = False,
    flex: Flex = False,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    seed: int = 0,
) -> None:
    """Stage 2: prefer the best of N scored answers to the worst (BoNBoN); one round."""
    from pastalm.records.scores import check_length

    weights, counted = _policies(positions), check_length(length)
    if not data.is_file():
        raise DataError(f"no scored answers at {data}: make them with pasta score")
    _quiet()
    from pastalm.train.preference import BEST_OF_TEN, PreferenceConfig
    from pastalm.train.preference import train as run

    config = PreferenceConfig(
        data=data,
        out=out,
        model=model,
        start=start,
        lambda_=lambda_,
        alpha=alpha,
        beta=1 / BEST_OF_TEN if beta is None else beta,
        sigma=sigma,
        length=counted,
        positions=weights,
        epochs=epochs,
        learning_rate=learning_rate,
        row_learning_rate=row_learning_rate,
        batch_tokens=batch_tokens,
        save_steps=save_steps,
        full=full,
        gradient_checkpointing=gradient_checkpointing,
        flex=flex,
        overwrite=overwrite,
        device=device,
        seed=seed,
    )
    _name_folder(run(config, progress=_say))


def _name_folder(folder: Path) -> None:
    """Says where a run's result lies; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
