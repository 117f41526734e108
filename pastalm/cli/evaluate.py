"""Verbs that judge answers: score, eval."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pastalm.cli.command import NoEffect, app, verb
from pastalm.cli.files import bad_row_handler, check_target
from pastalm.cli.loading import (
    adapter_of,
    large_model,
    load_llm,
    model_header,
    token_counter,
    tokenizer_header,
)
from pastalm.cli.options import (
    LARGE_MODEL,
    Counted,
    Device,
    EngineOptions,
    LargeModelOptions,
    MaxTokens,
    Model,
    ResultOptions,
    RunOptions,
    Seed,
    TrustRemoteCode,
)
from pastalm.cli.terminal import busy, print_json, quiet_libraries, say
from pastalm.errors import DataError, ModelError, RequestError
from pastalm.models.downloads import EMBEDDED

if TYPE_CHECKING:
    from pastalm import LLM
    from pastalm.core.layout import Policy
    from pastalm.eval.alpaca import WinRate
    from pastalm.eval.labels import Label
    from pastalm.eval.measure import MeasureCounts as Measured
    from pastalm.eval.quality import Scorer
    from pastalm.eval.score import ScoreCounts
    from pastalm.eval.systems import Decoding
    from pastalm.records.chat_client import ChatClient
    from pastalm.records.prompts import Prompt
    from pastalm.records.scores import Length

# ------------------------------------------------------------------------------ scorers


@dataclass(frozen=True)
class ScorerOptions:
    """What scorers are made from.

    model, adapter: the frozen model of pmi.
    judge: name of the large model that judges, at `server`.
    device: where pmi's model runs.
    trust_remote_code: run Python code that comes with pmi's model.
    """

    model: str
    adapter: str
    judge: str | None
    device: str
    server: LargeModelOptions
    trust_remote_code: bool = False

    @cached_property
    def client(self) -> ChatClient[Any]:
        """The client of the judge's server. Raises RequestError."""
        return large_model(self.judge, self.server)

    def usage(self) -> str:
        """What the judge has cost, to append to a line of progress; empty if there is none."""
        client = vars(self).get("client")
        return "" if client is None else f"; {client.usage}"


def _pmi(options: ScorerOptions) -> Scorer:
    from pastalm.eval.quality import PmiScorer
    from pastalm.models import dtypes, loading

    dtype = dtypes.throughput_dtype(options.device)
    adapter = adapter_of(options.adapter)
    return PmiScorer(
        loading.load(
            options.model,
            adapter=adapter,
            dtype=dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    )


def _reference(options: ScorerOptions) -> Scorer:
    from pastalm.eval.quality import ReferenceScorer

    return ReferenceScorer()


def _judge(options: ScorerOptions) -> Scorer:
    from pastalm.eval.quality import Judge

    return Judge(options.client)


@dataclass(frozen=True, slots=True)
class ScorerEntry:
    """A scorer by its name on the command line. header: what a file of its scores says of it."""

    make: Callable[[ScorerOptions], Scorer]
    header: Callable[[ScorerOptions], dict[str, Any]]


SCORERS: Mapping[str, ScorerEntry] = {
    "pmi": ScorerEntry(_pmi, lambda o: model_header(o.model, o.adapter) | {"device": o.device}),
    "reference": ScorerEntry(_reference, lambda _: {}),
    "judge": ScorerEntry(_judge, lambda o: {"judge": o.judge}),
}


def _scorer_header(name: str, options: ScorerOptions) -> dict[str, Any]:
    """For the header of a file: what scores, by its contents. Raises RequestError for an unknown name."""
    if name not in SCORERS:
        *others, last = SCORERS
        raise RequestError(f"unknown scorer {name!r}: use {', '.join(others)} or {last}")
    return SCORERS[name].header(options)


# ------------------------------------------------------------------------------ score


@verb(
    app,
    no_effect=[
        NoEffect(LARGE_MODEL, lambda a: a["scorer"] != "judge", "without --scorer judge"),
        NoEffect(("adapter", "device"), lambda a: a["scorer"] != "pmi", "without --scorer pmi"),
        NoEffect(("references",), lambda a: a["scorer"] != "reference", "without --scorer reference"),
    ],
)
def score(
    samples: Annotated[Path, typer.Argument(help="What pasta sample wrote: N answers to each prompt.")],
    target: Annotated[Path, typer.Argument(help="JSONL of scored answers; an existing file is continued.")],
    server: LargeModelOptions,
    results: ResultOptions,
    baseline: Annotated[Path, typer.Option(help="The sequential baseline's answers (pasta sample --sequential).")],
    scorer: Annotated[str, typer.Option(help="pmi, reference, or judge (a large model).")] = "pmi",
    model: Annotated[
        str, typer.Option(help="pmi: the frozen model; judge: the large model's name at --base-url.")
    ] = EMBEDDED,
    adapter: Annotated[str, typer.Option(help="pmi: that of the model finetuned without tags, or none.")] = "none",
    references: Annotated[
        Path | None, typer.Option(help="JSON or JSONL: {id, reference or response or output} each.")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Unit of differences, of the stage-1 samples (default: of these answers).")
    ] = None,
    length: Counted = "theoretical",
    limit: Annotated[int | None, typer.Option(help="Prompts to look at.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer counts tokens.")] = EMBEDDED,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score sampled answers by speed and quality against the baseline's."""
    from pastalm.eval import score as scoring
    from pastalm.records import jsonl, scores

    counted_length = scores.check_length(length)
    _check_score_files(samples, target, baseline, references, scorer)
    quiet_libraries()
    count_tokens = token_counter(tokenizer)
    options = ScorerOptions(model, adapter, model, device, server, trust_remote_code)
    header = _scorer_header(scorer, options) | tokenizer_header(tokenizer)
    # before a model is loaded: the file may be of another run
    jsonl.Results(target, scores.KIND, {"scorer": scorer, **header}, overwrite=results.overwrite)
    made = SCORERS[scorer].make(options)
    with busy(f"scoring {samples.name}") as progress:
        counts = scoring.score(
            samples,
            baseline,
            target,
            made,
            count_tokens,
            references=references,
            limit=limit,
            models=header,
            overwrite=results.overwrite,
            bad=bad_row_handler(results.skip_bad),
            progress=lambda counts: progress(f"{counts.written} answers scored{options.usage()}"),
        )
    print(_score_summary(counts), file=sys.stderr)
    rows = scores.read(target)
    unit = scores.spread(rows) if sigma is None else sigma
    print_json({"sigma": unit, **scores.summary(rows, (1, 2, 4, 8, float("inf")), unit, counted_length)})


def _check_score_files(samples: Path, target: Path, baseline: Path, references: Path | None, scorer: str) -> None:
    """Raises DataError, RequestError."""
    for path in (samples, baseline, references):
        if path is not None and not path.is_file():
            raise DataError(f"no file {path}")
    if scorer == "reference" and references is None:
        raise RequestError("scoring by reference needs --references")
    check_target(target, samples, baseline, references)


def _score_summary(counts: ScoreCounts) -> str:
    unscored = ", ".join(f"{n} {reason}" for reason, n in counts.unscored.items()) or "none"
    return f"{counts.written} answers scored, {counts.skipped} were there; without a verdict: {unscored}"


# ------------------------------------------------------------------------------ eval


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is compared, on which prompts, and how."""

    prompts: Annotated[
        Path,
        typer.Option(
            help="JSON or JSONL, also .gz: {prompt}, Alpaca's, AlpacaEval's, messages, ShareGPT's, MT-bench's or"
            " Spec-Bench's; alpaca_eval: the hub's."
        ),
    ]
    baseline: Annotated[str, typer.Option(help="Adapter of the sequential baseline; none: the model as it is.")]
    out: Annotated[Path, typer.Option(help="Folder of answers and scores; an existing one is continued.")]
    report: Annotated[Path | None, typer.Option(help="Folder of page, pictures and figures (OUT/report).")] = None
    model: Model = EMBEDDED
    scorer: Annotated[list[str] | None, typer.Option(help="pmi, reference or judge; may be repeated.")] = None
    sigma: Annotated[
        list[str] | None, typer.Option(help="SCORER=UNIT of its differences (default: their standard deviation).")
    ] = None
    judge: Annotated[str | None, typer.Option(help="The large model that judges, at --base-url.")] = None
    gamed: Annotated[Path | None, typer.Option(help="AlpacaEval's df_gamed.csv, if the hub cannot be reached.")] = None
    max_tokens: MaxTokens = 1024
    limit: Annotated[int | None, typer.Option(help="Prompts to look at.")] = None
    requests: Annotated[int, typer.Option(help="Answers decoded at once: figures under load.")] = 1
    timed: Annotated[
        int, typer.Option(help="With --requests: prompts answered one at a time instead, for the realized figures.")
    ] = 0
    begin: Annotated[str, typer.Option("--from", help="First step to run: decode, score or report.")] = "decode"
    matched: Annotated[
        bool, typer.Option("--matched/--no-matched", help="Decode each text sequentially too, for realized figures.")
    ] = True
    length: Counted = "theoretical"
    labels: Annotated[
        Path | None, typer.Option(help="JSONL, {id, label} each (one, may, should): whether an answer should fork.")
    ] = None
    against: Annotated[str | None, typer.Option(help="A system whose scores the others' are compared with.")] = None
    public: Annotated[bool, typer.Option("--public", help="Leave prompts and answers out of the page.")] = False
    seed: Seed = 0


def _no_judge(arguments: Mapping[str, Any]) -> bool:
    names = [*(arguments["scorer"] or ()), *(entry.partition("=")[0] for entry in arguments["sigma"] or ())]
    return "judge" not in names


@verb(
    app,
    "eval",
    no_effect=[
        NoEffect((*LARGE_MODEL, "judge", "gamed"), _no_judge, "without --scorer judge"),
        NoEffect(("timed",), lambda a: a["requests"] == 1, "without --requests above 1"),
    ],
)
def evaluate(
    systems: Annotated[
        list[str],
        typer.Argument(
            help="NAME=ADAPTER each (NAME=ADAPTER:off with its tags off; :promised or :overlap, those positions), or a"
            " method: sot, sot-routed, lookup, llma."
        ),
    ],
    options: EvalOptions,
    server: LargeModelOptions,
    engine: EngineOptions,
    results: ResultOptions,
) -> None:
    """Compare systems by speed and quality: a table, pictures, a page."""
    from pastalm.eval.evaluate import BASELINE
    from pastalm.eval.systems import Decoding

    evaluation = _prepare(systems, options, server, engine, results)
    scorers = [SCORERS[name].make(evaluation.scorer_options) for name in evaluation.units]
    base = Decoding(BASELINE, evaluation.load(evaluation.few, options.baseline), parallelism=0)
    encode = base.llm.loaded.vocabulary.encode

    def count_tokens(text: str) -> int:
        return len(encode(text))

    counts = evaluation.decode(base)
    refused = "".join(f"; {n} refused: {reason}" for reason, n in counts.refused.items())
    print(f"{counts.written} answers, {counts.skipped} were there{refused}", file=sys.stderr)
    unscored = evaluation.score(scorers, count_tokens)
    for name, reasons in unscored.items():
        for reason, number in reasons.items():
            print(f"{number} answers without a verdict by {name}: {reason}; start again to ask again", file=sys.stderr)
    evaluation.report(count_tokens, unscored)


def _prepare(
    systems: list[str],
    options: EvalOptions,
    server: LargeModelOptions,
    engine: EngineOptions,
    results: ResultOptions,
) -> _Evaluation:
    """Checks everything that was given, before a model is loaded. Raises DataError, RequestError, ModelError."""
    from pastalm.eval import alpaca
    from pastalm.eval import labels as forking
    from pastalm.eval.evaluate import COPYING, check
    from pastalm.records import prompts
    from pastalm.records.scores import check_length

    length = check_length(options.length)
    if str(options.prompts) == alpaca.NAME and not options.prompts.exists():
        options = replace(options, prompts=alpaca.fetch())
    rows = prompts.read(options.prompts, options.limit, bad=bad_row_handler(results.skip_bad))
    names = check(systems)
    labels = {} if options.labels is None else forking.read(options.labels, [row.id for row in rows])
    if options.begin not in ("decode", "score", "report"):
        raise RequestError(f"--from takes decode, score or report, got {options.begin!r}")
    if options.against is not None and options.against not in names:
        raise RequestError(f"--against names one of the systems, got {options.against!r}")
    units = _units(options.sigma or [], options.scorer or [])
    if engine.engine == "auto" and (copying := [name for name in names if name in COPYING]):
        engine = replace(engine, engine="transformers")
        say(f"{' and '.join(copying)} runs on transformers, so every system does")
    quiet_libraries()
    evaluation = _Evaluation(
        systems=systems,
        names=names,
        rows=rows,
        units=units,
        length=length,
        labels=labels,
        options=options,
        scorer_options=ScorerOptions(
            options.model, options.baseline, options.judge, engine.device, server, engine.trust_remote_code
        ),
        engine=engine,
        results=results,
        system_headers=_system_headers(systems, options, engine),
        scorer_headers={},
    )
    headers = {
        name: _scorer_header(name, evaluation.scorer_options) | tokenizer_header(options.model) for name in units
    }
    evaluation = replace(evaluation, scorer_headers=headers)
    evaluation.check_files()
    return evaluation


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One run of `pasta eval`.

    systems: as the command line names them; names: theirs, the baseline's first.
    rows: the prompts.
    units: the unit of each scorer's differences (None: their standard deviation).
    length: whose tokens a speedup counts.
    labels: whether an answer should fork, by the prompt's id.
    system_headers, scorer_headers: what each system and scorer is, by its contents, for the header of its file.
    """

    systems: list[str]
    names: list[str]
    rows: list[Prompt]
    units: Mapping[str, float | None]
    length: Length
    labels: Mapping[str, Label]
    options: EvalOptions
    scorer_options: ScorerOptions
    engine: EngineOptions
    results: ResultOptions
    system_headers: Mapping[str, Mapping[str, Any]]
    scorer_headers: Mapping[str, Mapping[str, Any]]

    @property
    def alone(self) -> list[Prompt]:
        """Prompts that are answered one at a time."""
        from pastalm.eval.measure import evenly_spaced

        return self.rows if self.options.requests == 1 else evenly_spaced(self.rows, self.options.timed)

    @property
    def few(self) -> int:
        """Answers at once that a single prompt needs: skeleton-of-thought decodes its parts together."""
        return 10 if any(system.startswith("sot") for system in self.systems) else 1

    def check_files(self) -> None:
        """Raises DataError where files that are there were made otherwise."""
        from pastalm.eval.evaluate import check_answers, check_folder, check_scores

        out, overwrite = self.options.out, self.results.overwrite
        if self.options.begin != "report":
            check_scores(out, self.names, self.scorer_headers, overwrite=overwrite)
        if self.options.begin == "decode":
            check_folder(out, self.system_headers, self.rows, overwrite=overwrite)
        else:
            known = {name: head for name, head in self.system_headers.items() if head["adapter"] != _ABSENT}
            check_answers(out, known)

    def load(self, max_num_seqs: int, adapter: str, positions: Policy | None = None) -> LLM:
        """The model with an adapter. max_num_seqs: answers decoded at once. Raises as `load_llm`."""
        from pastalm.cli.options import ThreadOptions

        run = RunOptions(**vars(self.engine), adapter=adapter)
        return load_llm(self.options.model, run, ThreadOptions(positions=positions), max_num_seqs=max_num_seqs)

    def decode(self, base: Decoding) -> Measured:
        """Decodes what is missing of all systems' answers. Raises DataError, EngineError."""
        from pastalm.eval import measure

        counts = measure.MeasureCounts()
        if self.options.begin != "decode":
            return counts
        with busy(f"answering {self.options.prompts.name}") as progress:
            if self.alone:
                counts += self._decode_alone(base, progress)
            if self.options.requests > 1:
                counts += self._decode_under_load(progress)
        return counts

    def _decode_alone(self, base: Decoding, progress: Callable[[str], None]) -> Measured:
        from pastalm.eval import measure
        from pastalm.eval.evaluate import build

        alone = self.alone
        return measure.measure(
            list(build(self.systems, base, partial(self.load, self.few))),
            alone,
            self.options.out / "answers",
            matched=base if self.options.matched else None,
            max_tokens=self.options.max_tokens,
            seed=self.options.seed or 0,
            among=self.rows,
            headers=self.system_headers,
            overwrite=self.results.overwrite,
            progress=lambda counts, _: progress(f"{counts.prompts} of {len(alone)} prompts"),
        )

    def _decode_under_load(self, progress: Callable[[str], None]) -> Measured:
        from pastalm.eval import measure
        from pastalm.eval.evaluate import BASELINE, build
        from pastalm.eval.systems import Decoding

        alone = self.alone
        load = partial(self.load, max(self.options.requests, self.few))
        base = Decoding(BASELINE, load(self.options.baseline), parallelism=0)
        return measure.under_load(
            build(self.systems, base, load),
            [prompt for prompt in self.rows if prompt not in alone],
            self.options.out / "answers",
            max_tokens=self.options.max_tokens,
            timed=not alone,
            among=self.rows,
            headers=self.system_headers,
            overwrite=self.results.overwrite and not alone,
            progress=lambda counts, _: progress(f"{counts.written} answers, {counts.skipped} were there"),
        )

    def score(self, scorers: Sequence[Scorer], count_tokens: Callable[[str], int]) -> dict[str, dict[str, int]]:
        """Scores all systems' answers; the number without a verdict, by scorer and reason. Raises DataError,
        RemoteError."""
        from pastalm.eval.evaluate import score_all

        with busy("scoring") as progress:
            return score_all(
                self.options.out,
                self.names if self.options.begin != "report" else [],
                scorers,
                count_tokens,
                references=self.options.prompts,
                models=self.scorer_headers,
                overwrite=self.results.overwrite,
                bad=bad_row_handler(self.results.skip_bad),
                progress=lambda what, counts: progress(
                    f"{what}: {counts.written} answers{self.scorer_options.usage()}"
                ),
            )

    def report(self, count_tokens: Callable[[str], int], unscored: Mapping[str, Mapping[str, int]]) -> None:
        """Prints the table and writes the page. unscored: as `score` returns it. Raises DataError, ModelError."""
        from pastalm.eval import report
        from pastalm.eval.compare import markdown
        from pastalm.eval.evaluate import BASELINE, compare_all, win_rates

        options = self.options
        rows, sigmas = compare_all(options.out, self.names, self.units, count_tokens, self.length, labels=self.labels)
        wins = win_rates(options.out, rows, options.gamed)
        settings = {
            "command": " ".join(["pasta", *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])]),
            "model": Path(options.model).name,
            "prompts file": options.prompts.name,
            "requests at once": options.requests,
            "prompts answered one at a time": len(self.alone),
            "most tokens": options.max_tokens,
            "sigmas": sigmas,
            "without a verdict": unscored,
            "win rates": {name: won.to_dict() for name, won in wins.items()},
        }
        table = markdown(rows, sigmas, options.against, self.length)
        folder = options.report or options.out / "report"
        page = report.write(folder, rows, table, baseline=BASELINE, settings=settings, public=options.public)
        print(table, end="")
        for name, won in wins.items():
            print(_win_rate(name, won))
        print(page, file=sys.stderr)


def _win_rate(name: str, won: WinRate) -> str:
    controlled = "" if won.length_controlled is None else f", length-controlled {won.length_controlled:.1f} %"
    return f"{name}: win rate {won.win_rate:.1f} %{controlled} (n = {won.n}, {won.missing} missing, {won.form})"


_ABSENT = {"name": "", "sha256": ""}
"""Stands for an adapter that is not on this machine."""


def _system_headers(systems: list[str], options: EvalOptions, engine: EngineOptions) -> dict[str, dict[str, Any]]:
    """What each system is, by its contents. Raises RequestError, ModelError."""
    from pastalm.eval.evaluate import described, parse_system

    may_lack = options.begin != "decode"  # answers may have been decoded on another machine
    adapters = {
        adapter: _adapter_header(options.model, adapter, may_lack)
        for adapter in {options.baseline, *(parse_system(system).adapter for system in systems)}
    }
    settings = {
        "max_tokens": options.max_tokens,
        "requests": options.requests,
        "matched": options.matched,
        "seed": options.seed or 0,
        "engine": engine.engine,
        "dtype": engine.dtype,
        "device": engine.device,
    }
    return described(systems, adapters.get, options.baseline, {**model_header(options.model, "none"), **settings})


def _adapter_header(model: str, adapter: str, may_lack: bool) -> dict[str, str] | None:
    """An adapter by its contents. may_lack: whether it may be absent from this machine. Raises ModelError."""
    from pastalm.models import contents

    if adapter in ("", "none"):
        return None
    try:
        return contents.of_adapter(model, adapter)
    except ModelError:
        if may_lack:
            return _ABSENT
        raise


def _units(entries: list[str], scorers: list[str]) -> dict[str, float | None]:
    """The unit of each scorer, from entries SCORER=UNIT (None: not given). Raises RequestError."""
    units: dict[str, float | None] = dict.fromkeys(scorers)
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            unit = float(value)
        except ValueError:
            raise RequestError(f"--sigma takes SCORER=UNIT, got {entry!r}") from None
        if not 0 < unit < float("inf"):
            raise RequestError(f"a unit must be above 0, got {entry!r}")
        units[name] = unit
    return units
