"""Verbs that make data to train on: annotate, sample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pastalm.cli.command import NoEffect, app, verb
from pastalm.cli.files import bad_row_handler, check_target, print_left_out
from pastalm.cli.loading import large_model, load_llm, model_header, token_counter, tokenizer_header
from pastalm.cli.options import (
    DRAFTS,
    GREEDY,
    LARGE_MODEL,
    LargeModelOptions,
    MaxModelLen,
    Model,
    ResultOptions,
    RunOptions,
    SamplingOptions,
)
from pastalm.cli.terminal import busy, quiet_libraries
from pastalm.core.params import SamplingParams
from pastalm.errors import DataError, RequestError
from pastalm.models.downloads import EMBEDDED

if TYPE_CHECKING:
    from collections.abc import Callable

    from pastalm.answering import SampleCounts
    from pastalm.records.chat_client import ChatClient
    from pastalm.train.annotate import AnnotationCounts, Annotator, PlainAnswer

ANNOTATORS = ("structural", "openai", "apar")


@verb(
    app,
    no_effect=[
        NoEffect(
            (*LARGE_MODEL, "model", "max_tokens"),
            lambda a: a["annotator"] != "openai",
            "without --annotator openai",
        )
    ],
)
def annotate(
    source: Annotated[
        Path,
        typer.Argument(
            help="JSON or JSONL, also .gz: {prompt, response}, Alpaca's, messages, ShareGPT's, or what pasta sample"
            " wrote."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="JSONL of annotated answers; an existing file is continued.")],
    server: LargeModelOptions,
    results: ResultOptions,
    annotator: Annotated[
        str,
        typer.Option(help="structural (lists, titles; no model), openai (a large model), or apar (form alone)."),
    ] = "structural",
    model: Annotated[str | None, typer.Option(help="The large model that annotates.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Token limit of one annotation (openai).")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Rows of SOURCE to look at.")] = None,
    max_repetition: Annotated[
        float, typer.Option(help="Answers with a larger share of repeated words are dropped.")
    ] = 1.0,
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer measures promised lengths.")] = EMBEDDED,
) -> None:
    """Mark the independent parts of existing answers in PASTA-LANG."""
    from pastalm.train.annotate import annotate_file

    if not source.is_file():
        raise DataError(f"no file {source}")
    if annotator not in ANNOTATORS:
        raise RequestError(f"unknown annotator {annotator!r}: use structural, openai or apar")
    remote: ChatClient[PlainAnswer] | None = None
    if annotator == "openai":
        remote = large_model(model, server)
        remote.options = {"temperature": 0, "max_tokens": max_tokens}
    count_tokens = token_counter(tokenizer)
    header = tokenizer_header(tokenizer) | {"annotator": annotator}
    if remote is not None:
        header |= {"model": remote.model, "max_tokens": max_tokens}
    with busy(f"annotating {source.name}") as progress:
        try:
            counts = annotate_file(
                source,
                target,
                _annotator(annotator, remote, count_tokens),
                count_tokens,
                limit=limit,
                max_repetition=max_repetition,
                models=header,
                overwrite=results.overwrite,
                bad=bad_row_handler(results.skip_bad),
                progress=lambda counts: _annotate_progress(counts, remote, progress),
            )
        finally:
            if remote is not None:
                print(f"{remote.base_url}: {remote.usage}", file=sys.stderr)
    print(_annotate_summary(counts), file=sys.stderr)


def _annotator(name: str, remote: ChatClient[PlainAnswer] | None, count_tokens: Callable[[str], int]) -> Annotator:
    """The annotator of that name.

    name: of the annotator.
    remote: the client of the large model's server, for `openai`.
    count_tokens: counts the tokens of a text.
    """
    from pastalm.train.annotate import Structural

    if name == "apar":
        from pastalm.eval.baselines import apar

        return Structural(count_tokens, lambda response, count, _: apar.annotate(response, count))
    if remote is not None:
        from pastalm.train.annotate_remote import LanguageModel

        return LanguageModel(remote, count_tokens)
    return Structural(count_tokens)


def _annotate_progress(
    counts: AnnotationCounts, remote: ChatClient[PlainAnswer] | None, progress: Callable[[str], None]
) -> None:
    if counts.read % 20 == 0 or remote is not None:
        line = f"{counts.read} rows read, {counts.structured} with two chunks or more"
        progress(line if remote is None else f"{line}; {remote.usage}")


def _annotate_summary(counts: AnnotationCounts) -> str:
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts.dropped.items()) or "none"
    return (
        f"{counts.read} rows read, {counts.skipped} were there, {counts.written} written, "
        f"{counts.structured} with two chunks or more, {counts.chunks} chunks; dropped: {dropped}"
    )


@verb(app, no_effect=[GREEDY, *DRAFTS])
def sample(
    source: Annotated[
        Path,
        typer.Argument(
            help="JSON or JSONL, also .gz: {prompt}, Alpaca's, AlpacaEval's, messages, ShareGPT's, MT-bench's or"
            " Spec-Bench's."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="JSONL of answers; an existing file is continued.")],
    params: Annotated[
        SamplingParams,
        SamplingOptions(
            ("n", "temperature", "top_p", "repetition_penalty", "seed", "max_tokens", "drafts", "references"),
            defaults={"seed": 0},
        ),
    ],
    run: RunOptions,
    results: ResultOptions,
    model: Model = EMBEDDED,
    limit: Annotated[int | None, typer.Option(help="Prompts of SOURCE to answer.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Answers decoded at once.")] = 32,
    max_model_len: MaxModelLen = None,
) -> None:
    """Let a model answer many prompts at once, as data to finetune on."""
    from pastalm import answering
    from pastalm.records import answers, prompts

    check_target(target, source)
    rows = prompts.read(source, limit, bad=bad_row_handler(results.skip_bad))
    quiet_libraries()
    header: dict[str, Any] = model_header(model, run.adapter)
    header |= {"engine": run.engine, "dtype": run.dtype, "device": run.device, "max_model_len": max_model_len}
    # before a model is loaded: the file may be of another run
    answers.results(target, answers.KIND, answering.file_header(params, header), rows, overwrite=results.overwrite)
    llm = load_llm(model, run, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    with busy(f"answering {source.name}") as progress:

        def show(counts: SampleCounts) -> None:
            if counts.written % 10 == 0:
                progress(f"{counts.written} answers, {counts.tokens} tokens")

        counts = answering.sample(
            llm,
            rows,
            target,
            params,
            models=header,
            overwrite=results.overwrite,
            progress=show,
            refuse=print_left_out,
        )
    print(_sample_summary(counts), file=sys.stderr)


def _sample_summary(counts: SampleCounts) -> str:
    ended = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.ended.items())) or "none"
    return (
        f"{counts.written} answers written ({ended}; {counts.tokens} tokens), {counts.skipped} were there, "
        f"{counts.refused} prompts did not fit"
    )
