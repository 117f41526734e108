"""Verbs that train: train sft, train prefer, train fork."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pastalm.cli.command import NoEffect, app, verb
from pastalm.cli.options import Counted, Device, Model, Overwrite, TrustRemoteCode
from pastalm.cli.recipes import ConfigFile
from pastalm.cli.terminal import quiet_libraries, say
from pastalm.core.layout import POLICIES, Policy
from pastalm.errors import DataError, RequestError
from pastalm.models.downloads import EMBEDDED
from pastalm.train.packing import MIXED

if TYPE_CHECKING:
    from pastalm.train.dataset import Mix

train = typer.Typer(help="Train models to speak PASTA-LANG.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train, name="train")

MIX = ",".join(f"{policy}={weight}" for policy, weight in MIXED.items())
Policies = Annotated[str, typer.Option(help=f"Positions to train on, with weights: {MIX}.")]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run trains; the names are those of its configuration."""

    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and adapter.")]
    model: Model = EMBEDDED
    epochs: float = 1.0
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 40
    full: Annotated[bool, typer.Option("--full", help="Train all weights, and save a whole model.")] = False
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False
    flex: Annotated[
        bool, typer.Option("--flex", help="FlexAttention, compiled for each shape: for long rows on CUDA.")
    ] = False
    overwrite: Overwrite = False
    device: Device = "cpu"
    seed: int = 0
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """Which rows are drawn from the data."""

    token_budget: Annotated[int, typer.Option(help="Tokens to draw from the data.")] = 800_000
    max_row_tokens: Annotated[int, typer.Option(help="Tokens of an answer; longer ones are left out.")] = 512
    plain: Annotated[float, typer.Option(help="Share of rows without chunks.")] = 0.33
    sequential: Annotated[float, typer.Option(help="Share of rows untagged, under the sequential marker.")] = 0.12
    untagged: Annotated[bool, typer.Option("--untagged", help="Train the baseline: the same answers without tags.")] = (
        False
    )
    positions: Policies = MIX
    lengths: Annotated[
        str,
        typer.Option(
            help="Ablation of promised lengths: tens, fixed (always 100), oracle (positions use the true length)."
        ),
    ] = "tens"
    topics: Annotated[
        bool, typer.Option("--topics/--no-topics", help="Ablation: promises without topics, only numbers.")
    ] = True
    syncs: Annotated[bool, typer.Option("--syncs/--no-syncs", help="Ablation: chunks are never read.")] = True

    cut: Annotated[float, typer.Option(help="Share of chunks that end at one of their sentences, drawn at random.")] = (
        0.0
    )

    def mix(self, seed: int) -> Mix:
        """Raises RequestError."""
        from pastalm.train.dataset import Mix, check_lengths

        return Mix(
            token_budget=self.token_budget,
            max_tokens=self.max_row_tokens,
            plain=self.plain,
            sequential=self.sequential,
            positions=_weights(self.positions),
            untagged=self.untagged,
            lengths=check_lengths(self.lengths),
            topics=self.topics,
            syncs=self.syncs,
            cut=self.cut,
            seed=seed,
        )


@verb(train, no_effect=[NoEffect(("lora_rank",), lambda a: a["full"], "with --full, which trains all weights")])
def sft(
    data: Annotated[Path, typer.Argument(help="What pasta annotate wrote.")],
    options: TrainOptions,
    mix: MixOptions,
    learning_rate: float = 5e-4,
    row_learning_rate: Annotated[float, typer.Option(help="Learning rate of the six tag rows.")] = 5e-3,
    start: Annotated[Path | None, typer.Option(help="Adapter to start from.")] = None,
    repeats: Annotated[
        Path | None,
        typer.Option(help="The model's own answers (pasta sample): repetitions to unlearn."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a step.")] = 2048,
    tag_weight: Annotated[float, typer.Option(help="Loss weight of decisions.")] = 2.0,
    end_weight: Annotated[float, typer.Option(help="Loss weight of what follows the end of a sentence.")] = 1.0,
    lora_rank: int = 16,
    config: ConfigFile = None,
) -> None:
    """Stage 1: finetune a model (LoRA and six tag tokens) on annotated answers."""
    if not data.is_file():
        raise DataError(f"no annotated data at {data}: make it with pasta annotate")
    if repeats is not None and not repeats.is_file():
        raise DataError(f"no answers at {repeats}: make them with pasta sample")
    _weights(mix.positions)  # before libraries are imported, which takes seconds
    quiet_libraries()
    from pastalm.train.sft import SftConfig
    from pastalm.train.sft import train as run

    settings = SftConfig(
        data=data,
        mix=mix.mix(options.seed),
        learning_rate=learning_rate,
        row_learning_rate=row_learning_rate,
        start=start,
        repeats=repeats,
        batch_tokens=batch_tokens,
        tag_weight=tag_weight,
        end_weight=end_weight,
        lora_rank=lora_rank,
        **vars(options),
    )
    _print_folder(run(settings, progress=say))


@verb(train)
def prefer(
    data: Annotated[Path, typer.Argument(help="What pasta score wrote: N answers to each prompt.")],
    options: TrainOptions,
    start: Annotated[Path, typer.Option(help="The adapter that answered: stage 1, or a round before.")],
    lambda_: Annotated[
        float, typer.Option("--lambda", help="Weight of quality against speed; inf: quality only.")
    ] = 1.0,
    alpha: Annotated[float, typer.Option(help="Weight of the term that teaches the better one.")] = 0.005,
    beta: Annotated[float | None, typer.Option(help="1/beta is the target margin, in nats.")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Unit of the scorer's differences: of the stage-1 samples.")
    ] = None,
    length: Counted = "theoretical",
    positions: Policies = MIX,
    true_lengths: Annotated[
        bool, typer.Option("--true-lengths", help="The better answer's promises say how long its chunks are.")
    ] = False,
    learning_rate: float = 1e-4,
    row_learning_rate: Annotated[float, typer.Option(help="Learning rate of the six tag rows.")] = 2e-4,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a step, both answers.")] = 4096,
    config: ConfigFile = None,
) -> None:
    """Stage 2: prefer the best of N scored answers to the worst (BoNBoN); one round."""
    from pastalm.records.scores import check_length

    weights, counted_length = _weights(positions), check_length(length)
    if not data.is_file():
        raise DataError(f"no scored answers at {data}: make them with pasta score")
    quiet_libraries()
    from pastalm.train.preference import BEST_OF_TEN, PreferenceConfig
    from pastalm.train.preference import train as run

    settings = PreferenceConfig(
        data=data,
        start=start,
        lambda_=lambda_,
        alpha=alpha,
        beta=1 / BEST_OF_TEN if beta is None else beta,
        sigma=sigma,
        length=counted_length,
        positions=weights,
        true_lengths=true_lengths,
        learning_rate=learning_rate,
        row_learning_rate=row_learning_rate,
        batch_tokens=batch_tokens,
        **vars(options),
    )
    _print_folder(run(settings, progress=say))


@verb(train)
def fork(
    data: Annotated[Path, typer.Argument(help="The model's own answers (pasta sample), in one thread and forking.")],
    options: TrainOptions,
    start: Annotated[Path, typer.Option(help="The adapter that answered.")],
    labels: Annotated[Path, typer.Option(help="Which prompts should fork: {id, label} a line; one, may or should.")],
    window: Annotated[
        int, typer.Option(help="First tokens of an answer in one thread where no promise is to come.")
    ] = 32,
    fork_weight: Annotated[float, typer.Option(help="Weight of an answer that should fork.")] = 8.0,
    anchors: Annotated[
        Path | None, typer.Option(help="The model's own answers to hold it to, whole. Without: only the decision.")
    ] = None,
    anchor_weight: Annotated[float, typer.Option(help="Weight of the mean loss over an anchor's tokens.")] = 4.0,
    eager: Annotated[bool, typer.Option("--eager", help="Where an answer may fork, it should.")] = False,
    true_lengths: Annotated[
        bool, typer.Option("--true-lengths", help="The answers' promises say how long their chunks are.")
    ] = False,
    learning_rate: float = 4e-4,
    row_learning_rate: Annotated[float, typer.Option(help="Learning rate of the six tag rows.")] = 0.0,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a step.")] = 2048,
    config: ConfigFile = None,
) -> None:
    """Stage 3: learn at which prompts to fork, from answers to labelled ones."""
    if not data.is_file():
        raise DataError(f"no answers at {data}: make them with pasta sample")
    if not labels.is_file():
        raise DataError(f"no labels at {labels}: write them by hand, {{id, label}} a line")
    quiet_libraries()
    from pastalm.train.forking import ForkConfig
    from pastalm.train.forking import train as run

    settings = ForkConfig(
        data=data,
        start=start,
        labels=labels,
        window=window,
        fork_weight=fork_weight,
        anchors=anchors,
        anchor_weight=anchor_weight,
        eager=eager,
        true_lengths=true_lengths,
        learning_rate=learning_rate,
        row_learning_rate=row_learning_rate,
        batch_tokens=batch_tokens,
        **vars(options),
    )
    _print_folder(run(settings, progress=say))


def _weights(text: str) -> dict[Policy, float]:
    """Weights of position policies, `promised=0.65,overlap=0.35`. Raises RequestError."""
    policies: dict[str, Policy] = {policy: policy for policy in POLICIES}
    weights: dict[Policy, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[policies[name]] = float(weight or 1)
        except (KeyError, ValueError):
            raise RequestError(
                f"cannot read positions {part!r}: give {', '.join(policies)}, each with a weight like promised=0.5"
            ) from None
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise RequestError("weights of positions must be 0 or more, and not all 0")
    return weights


def _print_folder(folder: Path) -> None:
    """Prints where a run's result is; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(folder)
