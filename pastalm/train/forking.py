"""Stage 3: when to fork.

The loss of stage 2 is over whole answers, of which the decision to fork is one token in hundreds: pairs hardly move it
(runs/README.md). Here the loss is over that decision alone. Of prompts that a reader labelled (`records.labels`) it
takes the model's own answers: where one thread is right, those that do not fork, and the probability of a promise at
their first tokens is to fall; where an answer should fork, those that do, and that of their first promise is to
rise. With p the probability of `<|promise|>`:

    L = -sum log(1 - p)    over the first tokens of an answer in one thread
    L = -w log p           at the first promise of one that forks

The first is the unlikelihood loss of Welleck et al. (ICLR 2020), equation 5. No other token is in the loss. The tags'
rows stay as they are unless `row_learning_rate` says otherwise: they would fork less at all prompts alike.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import DataError, RequestError
from pastalm.models import adapters, chat_template
from pastalm.models.chat_template import encode_chat
from pastalm.records import answers, labels
from pastalm.records.labels import Label
from pastalm.train import run
from pastalm.train.dataset import Example, batches, collate, held_out, pack_sampled, provenance
from pastalm.train.loss import fork_losses, token_log_probs
from pastalm.train.packing import IGNORED, MIXED, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkConfig(run.RunConfig):
    """One run.

    data: the model's own answers.
    labels: which of their prompts should fork.
    window: first tokens of an answer in one thread where no promise is to come.
    fork_weight: w above: answers that should fork are fewer, and have one token in the loss.
    eager: where an answer may fork, it should.
    validation_prompts: prompts that are held out.
    """

    labels: Path
    window: int = 32
    fork_weight: float = 8.0
    eager: bool = False
    validation_prompts: int = 64
    max_prompt_tokens: int = 256
    epochs: float = 4.0
    learning_rate: float = 4e-4
    row_learning_rate: float = 0.0


# ------------------------------------------------------------------------------ examples


def decision(packed: Packed, label: Label, vocabulary: Vocabulary, window: int) -> Packed | None:
    """The beginning of an answer, in which the labels are its decision: `<|promise|>` at the place of its first
    promise, or at the first places of an answer without one. None if it does not do what its label says, or may do
    either."""
    tags = vocabulary.tags
    assert tags is not None, "a promise is a token only under a prepared vocabulary"
    begin = int((packed.labels != IGNORED).argmax())
    promises = (packed.input_ids[begin:] == tags.promise).nonzero()[0]
    if label == "may" or (label == "should") != (len(promises) > 0):
        return None
    end = begin + (int(promises[0]) + 1 if len(promises) else window)
    cut = replace(
        packed,
        input_ids=packed.input_ids[:end],
        position_ids=packed.position_ids[:end],
        labels=packed.labels[:end].copy(),
        paths=packed.paths[:end],
        order=packed.order[:end],
        joins=None,
    )
    first = end - 1 if len(promises) else begin
    cut.labels[:first], cut.labels[first:] = IGNORED, tags.promise
    return cut


def decisions(
    rows: Sequence[answers.Answer],
    label_of: Mapping[str, Label],
    tokenizer: Any,
    vocabulary: Vocabulary,
    config: ForkConfig,
    *,
    eos: int,
) -> Iterator[Example]:
    """Examples of kind "one" and "should", the labels of their prompts."""
    for answer in rows:
        if (label := label_of.get(answer.id)) is None:
            continue
        if label == "may" and config.eager:
            label = "should"
        prompt = encode_chat(tokenizer, vocabulary, [{"role": "user", "content": answer.prompt}])
        if len(prompt) > config.max_prompt_tokens:
            continue
        try:
            whole, _ = pack_sampled(prompt, answer, vocabulary, "promised", eos=eos)
        except DataError as error:
            raise DataError(f"answer {answer.choice} to {answer.id!r}: {error}") from None
        if len(whole) > len(prompt) and (cut := decision(whole, label, vocabulary, config.window)) is not None:
            yield Example(cut, answer.id, answer.prompt, label, answer.source, answer.licence)


def _collated(examples: Sequence[Example]) -> dict[str, Tensor]:
    return collate([e.packed for e in examples], unlikely=[e.kind == "one" for e in examples])


# ------------------------------------------------------------------------------ the run


class _Trainer(run.Shared, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the loss above."""

    settings: ForkConfig

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        with run.autocast(self.settings):
            losses = fork_losses(model, inputs, self.settings.fork_weight)
        counted = (inputs["labels"] != IGNORED).any(1).sum().float()
        loss = losses.sum() / self.average(counted)
        return (loss, None) if return_outputs else loss


def train(config: ForkConfig, progress: Callable[[str], None] = print) -> Path:
    """Trains and returns the folder of the adapter, `out/adapter`. Raises DataError, ModelError, RequestError."""
    progress = run.aloud(config, progress)
    _check(config)
    rows = list(answers.read(config.data))
    label_of = labels.read(config.labels, [row.id for row in rows])
    base = run.begin(config, progress)
    every = list(decisions(rows, label_of, base.tokenizer, base.vocabulary, config, eos=base.eos))
    kinds = {example.kind for example in every}
    if missing := [label for label in ("one", "should") if label not in kinds]:
        does = {"one": "do not fork (pasta sample --sequential)", "should": "fork"}[missing[0]]
        raise DataError(f"{config.data}: no answers to prompts labelled {missing[0]!r} that {does}")
    random.Random(config.seed).shuffle(every)
    validation, training = held_out(every, config.validation_prompts)
    if not training:
        raise DataError(f"{config.data}: all prompts are held out; sample answers to more of them")
    data = provenance([e.packed for e in training], [(e.kind, e.source, e.licence) for e in training])
    progress(f"training on {json.dumps(data)}")
    plan = run.planned(config, lambda tokens: batches(training, tokens, seed=config.seed))
    trainer: _Trainer = run.supervised(_Trainer, config, base, plan, lambda own: _collated([training[i] for i in own]))
    curves = ("forks_one", "forks_should")
    trainer.add_callback(run.Log(config, progress, validate=lambda: _validate(trainer, validation), curves=curves))
    started = time.perf_counter()
    run.go(trainer, config)
    final = _validate(trainer, validation)
    summary = run.RunSummary(
        stage="stage 3, when to fork",
        positions=list(MIXED),
        marker=chat_template.SEQUENTIAL_MARKER,
        data=data,
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - started,
        final=final,
        losses=[
            "Of the held-out answers a promise is likelier than not in "
            + " and ".join(f"{final[f'forks_{label}']:.2f} of those labelled `{label}`" for label in ("one", "should"))
            + "."
        ],
    )
    return run.save(trainer, config, summary)


def _check(config: ForkConfig) -> None:
    if not config.data.is_file():
        raise DataError(f"no answers at {config.data}: make them with pasta sample")
    if config.start is None:
        raise RequestError("stage 3 continues from an adapter: give --start")
    adapters.read_card(config.start)
    if config.window < 1 or config.fork_weight <= 0 or config.validation_prompts < 0:
        raise RequestError("window must be 1 or more, fork_weight above 0, validation_prompts 0 or more")


def _validate(trainer: _Trainer, validation: Sequence[Example]) -> dict[str, float]:
    """Share of the held-out answers of each label in which a promise is likelier than not at some labelled place."""
    model = trainer.model
    model.eval()
    likely: dict[str, list[bool]] = {"one": [], "should": []}
    with torch.no_grad(), run.autocast(trainer.settings):
        for batch in batches(validation, 2048) if validation else []:
            inputs = {k: v.to(model.device) for k, v in _collated([validation[i] for i in batch]).items()}
            each, rows = token_log_probs(model, inputs)
            for row, index in enumerate(batch):
                likely[validation[index].kind].append(bool((each[rows == row] > math.log(0.5)).any()))
    model.train()
    return {f"forks_{label}": round(sum(forks) / max(1, len(forks)), 4) for label, forks in likely.items()}
