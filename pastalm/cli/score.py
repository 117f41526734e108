"""The verb that scores sampled answers: score."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from pastalm.cli.command import NoEffect, app, verb
from pastalm.cli.files import bad_row_handler, check_target
from pastalm.cli.loading import token_counter, tokenizer_header
from pastalm.cli.options import (
    LARGE_MODEL,
    Counted,
    Device,
    LargeModelOptions,
    ResultOptions,
    TrustRemoteCode,
)
from pastalm.cli.scorers import SCORERS, ScorerOptions, scorer_header
from pastalm.cli.terminal import busy, print_json, quiet_libraries
from pastalm.errors import DataError, RequestError
from pastalm.models.downloads import EMBEDDED

if TYPE_CHECKING:
    from pastalm.eval.score import ScoreCounts


Labels: TypeAlias = Annotated[
    Path | None, typer.Option(help="JSONL, {id, label} each (one, may, should): which prompts ask for a list.")
]


@verb(
    app,
    no_effect=[
        NoEffect(LARGE_MODEL, lambda a: a["scorer"] != "judge", "without --scorer judge"),
        NoEffect(("adapter", "device"), lambda a: a["scorer"] != "pmi", "without --scorer pmi"),
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
        Path | None,
        typer.Option(
            help="JSON or JSONL: {id, reference or response or output} each; say which prompts ask for a list."
        ),
    ] = None,
    labels: Labels = None,
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
    _check_score_files(samples, target, baseline, references, labels, scorer)
    quiet_libraries()
    count_tokens = token_counter(tokenizer)
    options = ScorerOptions(model, adapter, model, device, server, trust_remote_code)
    header = scorer_header(scorer, options) | tokenizer_header(tokenizer)
    # before a model is loaded: the file may be of another run
    jsonl.Results(target, scores.KIND, {"scorer": scorer, **header}, overwrite=results.overwrite)
    scorer_model = SCORERS[scorer].make(options)
    with busy(f"scoring {samples.name}") as progress:
        counts = scoring.score(
            samples,
            baseline,
            target,
            scorer_model,
            count_tokens,
            references=references,
            labels=labels,
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


def _check_score_files(
    samples: Path, target: Path, baseline: Path, references: Path | None, labels: Path | None, scorer: str
) -> None:
    """Checks the files of `score`. Raises DataError, RequestError."""
    for path in (samples, baseline, references, labels):
        if path is not None and not path.is_file():
            raise DataError(f"no file {path}")
    if scorer == "reference" and references is None:
        raise RequestError("scoring by reference needs --references")
    check_target(target, samples, baseline, references, labels)


def _score_summary(counts: ScoreCounts) -> str:
    unscored = ", ".join(f"{n} {reason}" for reason, n in counts.unscored.items()) or "none"
    return f"{counts.written} answers scored, {counts.skipped} were there; without a verdict: {unscored}"
