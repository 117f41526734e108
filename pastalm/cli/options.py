"""Options and groups of options that several verbs share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from pastalm import text_options
from pastalm.cli.command import NoEffect
from pastalm.cli.files import read_object, read_text
from pastalm.core.params import DRAFTERS, SamplingParams, parameters
from pastalm.errors import RequestError

Model = Annotated[str, typer.Option(help="The embedded model, a hub name, a folder, or a GGUF file.")]
Adapter = Annotated[str, typer.Option(help="A folder, none, or auto: the adapter that ships for the model.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model, as transformers' option does.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together (default: the model's, at most 4096).", min=2)
]
MaxTokens = Annotated[int, typer.Option(help=parameters()["max_tokens"].help)]
Seed = Annotated[int | None, typer.Option(help=parameters()["seed"].help)]
Drafts = Annotated[str, typer.Option(help=parameters()["drafts"].help)]
System = Annotated[str | None, typer.Option(help="A system message.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
NoLive = Annotated[bool, typer.Option("--no-live", help="Print plain text on a terminal too.")]
BaseUrl = Annotated[
    str | None, typer.Option(help="URL of an OpenAI-compatible server, with /v1; its key is read from OPENAI_API_KEY.")
]
Counted = Annotated[
    str, typer.Option(help="Whose tokens a speedup counts: theoretical, matched, smaller or parallelism.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start again: replaces what an earlier run of this command wrote there.")
]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What runs a model, and how."""

    engine: Annotated[
        str, typer.Option(help="native, transformers, llama.cpp (GGUF files), or auto: native on a CPU, if it can.")
    ] = "auto"
    trust_remote_code: TrustRemoteCode = False
    dtype: Annotated[
        str,
        typer.Option(help="Type of the weights: auto, q8_0 or q4_0 (native), bfloat16, float16, float32 or float64."),
    ] = "auto"
    device: Device = "cpu"


@dataclass(frozen=True, kw_only=True)
class RunOptions(EngineOptions):
    """The same, with the adapter that the model has."""

    adapter: Adapter = "auto"


@dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """How the threads of an answer decode."""

    positions: Annotated[
        str | None, typer.Option(help="Position ids of chunks: promised or overlap (all that llama.cpp has).")
    ] = None
    max_threads: Annotated[int, typer.Option(help="Threads of an answer decoding at once; others wait.")] = 16


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """A server that decodes in place of an engine."""

    base_url: BaseUrl = None
    tokenizer: Annotated[
        str | None,
        typer.Option(help="With --base-url: a hub name or folder with the model's tokenizer, if not --model's."),
    ] = None
    prompted: Annotated[
        bool, typer.Option("--prompted", help="With --base-url: teach the tags to a model that was not finetuned.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class LargeModelOptions:
    """A server whose large model annotates or judges, and what it costs."""

    base_url: BaseUrl = None
    concurrency: Annotated[int, typer.Option(help="Requests to the server at once.")] = 8
    price_in: Annotated[float, typer.Option(help="Dollars per million input tokens, to count the cost.")] = 0.0
    price_out: Annotated[float, typer.Option(help="Dollars per million output tokens.")] = 0.0


LARGE_MODEL = ("base_url", "concurrency", "price_in", "price_out")
"""Names of `LargeModelOptions`."""


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """How a file of results is written."""

    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Print the errors of bad rows, and go on without them.")
    ] = False
    overwrite: Overwrite = False


# ------------------------------------------------------------------------------ sampling


@dataclass(frozen=True)
class SamplingOptions:
    """Options made from rows of the table in `core/params.py`, and `--sequential`; their value is SamplingParams.
    References are given as files (`--reference`), and so is a schema (`--schema`, `--depends`).

    names: of the rows.
    defaults: those of this verb, by name.
    """

    names: tuple[str, ...] = (*text_options.offered(), "schema", "depends")
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> list[inspect.Parameter]:
        defaults = {**text_options.DEFAULTS, **self.defaults}
        options = []
        for row in (parameters()[name] for name in self.names):
            texts = text_options.takes_texts(row)
            kind: Any = list[str] | None if texts else row.kind
            default = defaults.get(row.name, row.default)
            help = f"{row.help} May be repeated." if texts else row.help
            if row.name == "references":
                files = Annotated[list[Path] | None, typer.Option(help=help, metavar="FILE")]
                options.append(_option(_REFERENCE, files, default))
            elif row.name == "schema":
                file = Annotated[Path | None, typer.Option(help=row.help, metavar="FILE")]
                options.append(_option(row.name, file, None))
            elif row.name == "depends":
                help = f"{row.help} As FIELD=FIELD,FIELD; may be repeated."
                fields = Annotated[list[str] | None, typer.Option(help=help, metavar="FIELDS")]
                options.append(_option(row.name, fields, None))
            else:
                options.append(_option(row.name, Annotated[kind, typer.Option(help=help)], default))
        return [*options, _option("sequential", _Sequential, False)]

    def build(self, arguments: Mapping[str, Any]) -> SamplingParams:
        values = {name: arguments[name] for name in self.names if name not in _READ}
        if (schema := arguments.get("schema")) is not None:
            values["schema"] = read_object(str(schema))
            values["depends"] = dict(map(_dependency, arguments["depends"] or ()))
        if files := arguments.get(_REFERENCE):
            values["references"] = [read_text(str(file)) for file in files]
        return SamplingParams(**values | ({"parallelism": 0.0} if arguments["sequential"] else {}))


_REFERENCE = "reference"
_READ = ("references", "schema", "depends")
"""Parameters that are read from files or from more than one word."""
_Sequential = Annotated[bool, typer.Option("--sequential", help="The same model with forking off (--parallelism 0).")]


def _option(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _dependency(text: str) -> tuple[str, list[str]]:
    """A field and those that it waits for, from FIELD=FIELD,FIELD. Raises RequestError."""
    field_name, equals, needed = text.partition("=")
    if not (field_name and equals and all(needed.split(","))):
        raise RequestError(f"--depends takes FIELD=FIELD,FIELD, not {text!r}")
    return field_name, needed.split(",")


# ------------------------------------------------------------------------------ options without effect


def _leaves_references_out(arguments: Mapping[str, Any]) -> bool:
    names = set(arguments["drafts"].split(","))
    return "references" not in names and names <= {"off", *DRAFTERS}


DRAFTS = (
    NoEffect((_REFERENCE,), _leaves_references_out, "where --drafts leaves references out"),
    NoEffect(("drafts",), lambda a: a["drafts"] == "references" and not a[_REFERENCE], "without --reference"),
)
GREEDY = NoEffect(("top_p", "top_k", "min_p"), lambda a: a["temperature"] == 0, "at --temperature 0, which is greedy")
SCHEMA = NoEffect(("depends",), lambda a: a["schema"] is None, "without --schema")
NOT_FORKING = (
    NoEffect(("parallelism",), lambda a: a["sequential"], "with --sequential"),
    NoEffect(
        ("positions", "max_threads"),
        lambda a: a["sequential"] or a["parallelism"] == 0,
        "where nothing forks (--sequential, --parallelism 0)",
    ),
)
