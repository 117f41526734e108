"""Stage 1: supervised finetuning on linear form (PASTA section 5.2), on TRL's SFTTrainer.

Mask, positions and labels come from layout.py, the same object that engines drive. LoRA on all linear
layers and the rows of the six tags; the loss is computed at labelled positions only, and weighs
the tokens that decide on forks more (`tag_weight`): a main thread that does not see what its chunks
say learns there when to stop promising. A run saves checkpoints and resumes from the newest.

Baseline-SFT is the same run on the same answers without tags (`Mix.untagged`).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from pastalm.core.layout import POLICIES
from pastalm.core.vocabulary import Tags
from pastalm.errors import DataError
from pastalm.models import chat_template
from pastalm.train import run
from pastalm.train.dataset import (
    Example,
    Mix,
    batches,
    collate,
    examples,
    held_out,
    provenance,
    read_annotated,
    read_repeats,
)
from pastalm.train.loss import sentence_ends, weighted_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(run.RunConfig):
    """One training run. repeats: the model's own answers (`pasta sample`), whose repetitions are unlearned,
    beside the data. tag_weight: loss weight of the decision tokens. end_weight: of what follows the end of a sentence,
    where it is decided how long a chunk gets. validation_rows: prompts whose answers are held
    out."""

    mix: Mix = field(default_factory=Mix)
    repeats: Path | None = None
    tag_weight: float = 2.0
    end_weight: float = 1.0
    validation_rows: int = 16


class _Trainer(run.Shared, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the loss above."""

    settings: SftConfig
    tags: Tags
    ends: Tensor | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        with run.autocast(self.settings):
            weight, end_weight = self.settings.tag_weight, self.settings.end_weight
            loss, _, _ = weighted_loss(
                model, inputs, self.tags, weight, self.average, ends=self.ends, end_weight=end_weight
            )
        return (loss, None) if return_outputs else loss


def train(config: SftConfig, progress: Callable[[str], None] = print) -> Path:
    """Trains and returns the folder of the adapter, `out/adapter`. Raises DataError, ModelError."""
    progress = run.aloud(config, progress)
    if not config.data.is_file():
        raise DataError(f"no annotated data at {config.data}: make it with pasta annotate")
    if unknown := set(config.mix.positions) - set(POLICIES):
        raise DataError(f"unknown positions {sorted(unknown)}: use {', '.join(POLICIES)}")
    base = run.begin(config, progress)
    rows = read_annotated(config.data)
    training = list(examples(rows, base.tokenizer, base.vocabulary, config.mix, eos=base.eos))
    if config.repeats is not None:
        training += read_repeats(config.repeats, base.tokenizer, base.vocabulary, config.mix, eos=base.eos)
    validation, training = held_out(training, config.validation_rows)
    validation = [example for example in validation if example.kind != "repeat"]
    if not training:
        raise DataError(f"{config.data}: no usable answers are left to train on")
    if config.repeats is not None:
        random.Random(config.seed).shuffle(training)
    data = provenance([e.packed for e in training], [(e.kind, e.source, e.licence) for e in training])
    progress(f"training on {json.dumps(data)}")
    plan = run.planned(config, lambda tokens: batches(training, tokens, seed=config.seed))
    trainer = _trainer(config, base, training, plan)
    curves = ("validation_text", "validation_tags")
    log = run.Log(config, progress, validate=lambda: _validate(trainer, validation), curves=curves)
    trainer.add_callback(log)
    started = time.perf_counter()
    run.go(trainer, config)
    final = _validate(trainer, validation)
    untagged = config.mix.untagged
    summary = run.RunSummary(
        stage="Baseline-SFT, without tags" if untagged else "stage 1",
        positions=list(config.mix.positions),
        marker=None if untagged else chat_template.SEQUENTIAL_MARKER,
        data=data,
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - started,
        final={**log.last, **final},
        losses=[
            f"Held-out loss, nats a token: {final['validation_tags']} on tags, {final['validation_text']} on text."
        ],
    )
    return run.save(trainer, config, summary)


def _trainer(config: SftConfig, base: run.Base, training: list[Example], plan: list[list[int]]) -> _Trainer:
    trainer: _Trainer = run.supervised(_Trainer, config, base, plan, lambda own: _collated([training[i] for i in own]))
    trainer.tags = base.tags
    if config.end_weight != 1:
        trainer.ends = sentence_ends(base.vocabulary)
    return trainer


def _collated(examples: list[Example]) -> dict[str, Tensor]:
    return collate([e.packed for e in examples], unlikely=[e.kind == "repeat" for e in examples])


def _validate(trainer: _Trainer, validation: list[Example]) -> dict[str, float]:
    """Mean loss over held-out answers: decision tokens and text apart. Computed as in training."""
    model = trainer.model
    model.eval()
    sums = {"validation_tags": [0.0, 0], "validation_text": [0.0, 0]}
    with torch.no_grad(), run.autocast(trainer.settings):
        for batch in batches(validation, 2048):
            inputs = _collated([validation[i] for i in batch])
            inputs = {k: v.to(model.device) for k, v in inputs.items()}
            _, losses, decision = weighted_loss(model, inputs, trainer.tags, 1.0)
            for name, where in (("validation_tags", decision), ("validation_text", ~decision)):
                sums[name][0] += float(losses[where].sum())
                sums[name][1] += int(where.sum())
    model.train()
    return {name: round(total / max(1, n), 4) for name, (total, n) in sums.items()}
