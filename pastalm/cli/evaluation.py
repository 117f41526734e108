"""One run of `pasta eval`: decodes, scores and reports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pastalm.cli.files import bad_row_handler
from pastalm.cli.loading import load_llm, model_header
from pastalm.cli.options import Counted, EngineOptions, MaxTokens, Model, ResultOptions, RunOptions, Seed, ThreadOptions
from pastalm.cli.scorers import ScorerOptions
from pastalm.cli.terminal import busy
from pastalm.errors import ModelError
from pastalm.models.downloads import EMBEDDED

if TYPE_CHECKING:
    from pastalm import LLM
    from pastalm.core.layout import Policy
    from pastalm.eval.alpaca import WinRate
    from pastalm.eval.measure import MeasureCounts
    from pastalm.eval.quality import Scorer
    from pastalm.eval.systems import Decoding
    from pastalm.records.labels import Label
    from pastalm.records.prompts import Prompt
    from pastalm.records.scores import Length


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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One run of `pasta eval`.

    systems: as on the command line.
    names: of the systems, the baseline's first.
    rows: the prompts.
    units: the unit of each scorer's differences (None: their standard deviation).
    length: the tokens that a speedup counts.
    labels: whether an answer should fork, by the prompt's id.
    options, engine, results: of the command.
    scorer_options: what scorers are made from.
    system_headers, scorer_headers: name and hash of each system and scorer, for the headers of files.
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
    def answer_slots(self) -> int:
        """Answers that a single prompt decodes at once: skeleton-of-thought decodes its parts together."""
        return 10 if any(system.startswith("sot") for system in self.systems) else 1

    def check_files(self) -> None:
        """Raises DataError if existing files were made with other settings."""
        from pastalm.eval.evaluate import check_answers, check_folder, check_scores

        out, overwrite = self.options.out, self.results.overwrite
        if self.options.begin != "report":
            check_scores(out, self.names, self.scorer_headers, overwrite=overwrite)
        if self.options.begin == "decode":
            check_folder(out, self.system_headers, self.rows, overwrite=overwrite)
        else:
            headers = {name: head for name, head in self.system_headers.items() if head["adapter"] != _ABSENT}
            check_answers(out, headers)

    def load(self, max_num_seqs: int, adapter: str, positions: Policy | None = None) -> LLM:
        """The model with an adapter. Raises as `load_llm`.

        max_num_seqs: answers decoded at once.
        adapter: as on the command line.
        positions: position policy (None: the engine's first).
        """
        run = RunOptions(**vars(self.engine), adapter=adapter)
        return load_llm(self.options.model, run, ThreadOptions(positions=positions), max_num_seqs=max_num_seqs)

    def decode(self, base: Decoding) -> MeasureCounts:
        """Decodes the missing answers of all systems. Raises DataError, EngineError."""
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

    def _decode_alone(self, base: Decoding, progress: Callable[[str], None]) -> MeasureCounts:
        from pastalm.eval import measure
        from pastalm.eval.evaluate import build

        alone = self.alone
        return measure.measure(
            list(build(self.systems, base, partial(self.load, self.answer_slots))),
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

    def _decode_under_load(self, progress: Callable[[str], None]) -> MeasureCounts:
        from pastalm.eval import measure
        from pastalm.eval.evaluate import BASELINE, build
        from pastalm.eval.systems import Decoding

        alone = self.alone
        load = partial(self.load, max(self.options.requests, self.answer_slots))
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
        """Scores all systems' answers. Returns the number without a verdict, by scorer and reason. Raises DataError,
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
                progress=lambda label, counts: progress(
                    f"{label}: {counts.written} answers{self.scorer_options.usage()}"
                ),
            )

    def report(self, count_tokens: Callable[[str], int], unscored: Mapping[str, Mapping[str, int]]) -> None:
        """Prints the table and writes the page. Raises DataError, ModelError.

        count_tokens: counts the tokens of a text.
        unscored: from `score`.
        """
        from pastalm.eval import report
        from pastalm.eval.compare import markdown
        from pastalm.eval.evaluate import BASELINE, compare_all, win_rates

        options = self.options
        rows, sigmas = compare_all(options.out, self.names, self.units, count_tokens, self.length, labels=self.labels)
        wins = win_rates(options.out, rows, options.gamed)
        settings = {
            "command": " ".join(["pasta", *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])]),
            "model": Path(options.model).name,
            "adapters": {name: head["adapter"] for name, head in self.system_headers.items()},
            "engine": self.engine.engine,
            "dtype": self.engine.dtype,
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
"""The header of an adapter that is not on this machine."""


def system_headers(systems: list[str], options: EvalOptions, engine: EngineOptions) -> dict[str, dict[str, Any]]:
    """The header of each system's file, by name. Raises RequestError, ModelError."""
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
    """Name and hash of an adapter; None if there is none. Raises ModelError.

    model: the base model.
    adapter: as on the command line.
    may_lack: the adapter may be missing on this machine.
    """
    from pastalm.models import contents

    if adapter in ("", "none"):
        return None
    try:
        return contents.of_adapter(model, adapter)
    except ModelError:
        if may_lack:
            return _ABSENT
        raise
