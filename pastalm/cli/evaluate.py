"""The verb that compares systems: eval."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from pastalm.cli.command import NoEffect, app, verb
from pastalm.cli.evaluation import EvalOptions, Evaluation, system_headers
from pastalm.cli.files import bad_row_handler
from pastalm.cli.loading import tokenizer_header
from pastalm.cli.options import LARGE_MODEL, EngineOptions, LargeModelOptions, ResultOptions
from pastalm.cli.scorers import SCORERS, ScorerOptions, scorer_header
from pastalm.cli.terminal import quiet_libraries
from pastalm.errors import RequestError


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
            help="NAME=ADAPTER each (NAME=ADAPTER:off with its tags off; :promised or :overlap, those positions; then"
            " +drafts with all drafters, or some: +lookup,siblings), or a method: sot, sot-routed, lookup, llma."
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
    base = Decoding(BASELINE, evaluation.load(evaluation.answer_slots, options.baseline), parallelism=0)
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
) -> Evaluation:
    """Checks all options and files before a model is loaded. Raises DataError, RequestError, ModelError."""
    from pastalm.eval import alpaca
    from pastalm.eval.evaluate import check
    from pastalm.records import labels as forking
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
    quiet_libraries()
    evaluation = Evaluation(
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
        system_headers=system_headers(systems, options, engine),
        scorer_headers={},
    )
    headers = {name: scorer_header(name, evaluation.scorer_options) | tokenizer_header(options.model) for name in units}
    evaluation = replace(evaluation, scorer_headers=headers)
    evaluation.check_files()
    return evaluation


def _units(entries: list[str], scorers: list[str]) -> dict[str, float | None]:
    """The unit of each scorer (None: not given). Raises RequestError.

    entries: of --sigma, SCORER=UNIT.
    scorers: of --scorer.
    """
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
