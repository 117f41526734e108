"""Stage 3: when to fork.

The loss of stage 2 is over whole answers, of which the decision to fork is one token in hundreds: pairs hardly move it
(runs/README.md). Here the loss is over that decision alone. Of prompts that a reader labelled (`records.labels`) it
takes the model's own answers: where one thread is right, those that do not fork, and the probability of a promise at
their first tokens is to fall; where an answer should fork, those that do, and that of their promises is to rise: of
all, since answers that fork would else promise fewer chunks. With p the probability of `<|promise|>`:

    L = -sum log(1 - p)    over the first tokens of an answer in one thread
    L = -w sum log p       over the promises of one that forks

The first is the unlikelihood loss of Welleck et al. (ICLR 2020), equation 5. Anchors are further answers of the model,
of which all tokens are in the loss, as in stage 1: they keep the rest of the model where it was, or where the answers
that were chosen are. The tags' rows stay as they are unless `row_learning_rate` says otherwise: they would fork less at
all prompts alike.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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
from pastalm.train.dataset import Example, batches, collate, held_out, pack_sampled, provenance, truly_promised
from pastalm.train.loss import fork_losses, token_log_probs
from pastalm.train.packing import IGNORED, MIXED, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkConfig(run.RunConfig):
    """One run.

    data: the model's own answers.
    labels: which of their prompts should fork.
    window: first tokens of an answer in one thread where no promise is to come.
    fork_weight: w above: answers that should fork are fewer, and have one token in the loss.
    anchors: the model's own answers of which all tokens are in the loss. None: nothing but the decision is.
    anchor_weight: of the mean loss over an anchor's tokens.
    eager: where an answer may fork, it should.
    true_lengths: the promises say how long their chunks are.
    validation_prompts: prompts that are held out.
    """

    labels: Path
    window: int = 32
    fork_weight: float = 8.0
    anchors: Path | None = None
    anchor_weight: float = 4.0
    eager: bool = False
    true_lengths: bool = False
    validation_prompts: int = 64
    max_prompt_tokens: int = 256
    epochs: float = 4.0
    learning_rate: float = 4e-4
    row_learning_rate: float = 0.0


# ------------------------------------------------------------------------------ examples


def decision(whole: Packed, label: Label, vocabulary: Vocabulary, window: int) -> Packed:
    """An answer that does what its label says, labelled with its decisions: `<|promise|>` at the places of its promises
    (`should`), or at the first places of an answer without one, which ends there (`one`)."""
    promise = _promise(vocabulary)
    if label == "should":
        return replace(whole, labels=np.where(whole.labels == promise, promise, IGNORED))
    begin = int((whole.labels != IGNORED).argmax())
    end = begin + window
    cut = replace(
        whole,
        input_ids=whole.input_ids[:end],
        position_ids=whole.position_ids[:end],
        labels=whole.labels[:end].copy(),
        paths=whole.paths[:end],
        order=whole.order[:end],
        joins=None,
    )
    cut.labels[:begin], cut.labels[begin:] = IGNORED, promise
    return cut


def _promise(vocabulary: Vocabulary) -> int:
    tags = vocabulary.tags
    assert tags is not None, "a promise is a token only under a prepared vocabulary"
    return tags.promise


def packed(
    rows: Sequence[answers.Answer], tokenizer: Any, vocabulary: Vocabulary, config: ForkConfig, *, eos: int
) -> Iterator[tuple[answers.Answer, Packed, bool]]:
    """The answers whose prompts are short enough, packed, and whether each forks. Raises DataError."""
    for answer in rows:
        prompt = encode_chat(tokenizer, vocabulary, [{"role": "user", "content": answer.prompt}])
        if len(prompt) > config.max_prompt_tokens:
            continue
        if config.true_lengths:
            answer = truly_promised(answer, vocabulary)
        try:
            whole, _ = pack_sampled(prompt, answer, vocabulary, "promised", eos=eos)
        except DataError as error:
            raise DataError(f"answer {answer.choice} to {answer.id!r}: {error}") from None
        if len(whole) > len(prompt):
            yield answer, whole, bool((whole.input_ids[len(prompt) :] == _promise(vocabulary)).any())


def decisions(
    rows: Sequence[answers.Answer],
    label_of: Mapping[str, Label],
    tokenizer: Any,
    vocabulary: Vocabulary,
    config: ForkConfig,
    *,
    eos: int,
) -> Iterator[Example]:
    """Examples of kind "one" and "should", the labels of their prompts: decisions of the answers that do what these
    say. Raises DataError."""
    labelled = [row for row in rows if row.id in label_of]
    for answer, whole, forks in packed(labelled, tokenizer, vocabulary, config, eos=eos):
        label = label_of[answer.id]
        if label == "may" and config.eager:
            label = "should"
        if label != "may" and forks == (label == "should"):
            cut = decision(whole, label, vocabulary, config.window)
            yield Example(cut, answer.id, answer.prompt, label, answer.source, answer.licence)


def anchors(
    rows: Sequence[answers.Answer], tokenizer: Any, vocabulary: Vocabulary, config: ForkConfig, *, eos: int
) -> Iterator[Example]:
    """Examples of kind "anchor": whole answers. Raises DataError."""
    for answer, whole, _ in packed(rows, tokenizer, vocabulary, config, eos=eos):
        yield Example(whole, answer.id, answer.prompt, "anchor", answer.source, answer.licence)


def collated(examples: Sequence[Example], config: ForkConfig) -> dict[str, Tensor]:
    """A batch as `fork_losses` takes it."""
    inputs = collate([e.packed for e in examples], unlikely=[e.kind == "one" for e in examples])
    labelled = (inputs["labels"] != IGNORED).sum(1)
    weight_of = {"one": 1.0, "should": config.fork_weight, "anchor": config.anchor_weight}
    weights = torch.tensor([weight_of[e.kind] for e in examples])
    means = torch.tensor([e.kind == "anchor" for e in examples])
    return inputs | {"weights": torch.where(means, weights / labelled, weights)}


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
            losses = fork_losses(model, inputs)
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
    if config.anchors is not None:
        every += anchors(list(answers.read(config.anchors)), base.tokenizer, base.vocabulary, config, eos=base.eos)
    random.Random(config.seed).shuffle(every)
    validation, training = held_out(every, config.validation_prompts)
    if not training:
        raise DataError(f"{config.data}: all prompts are held out; sample answers to more of them")
    data = provenance([e.packed for e in training], [(e.kind, e.source, e.licence) for e in training])
    progress(f"training on {json.dumps(data)}")
    plan = run.planned(config, lambda tokens: batches(training, tokens, seed=config.seed))
    trainer: _Trainer = run.supervised(
        _Trainer, config, base, plan, lambda own: collated([training[i] for i in own], config)
    )
    curves = ("forks_one", "forks_should", *(["own_tokens"] if config.anchors else []))
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
    if config.anchors is not None and not config.anchors.is_file():
        raise DataError(f"no answers at {config.anchors}: make them with pasta sample")
    if config.start is None:
        raise RequestError("stage 3 continues from an adapter: give --start")
    adapters.read_card(config.start)
    if config.window < 1 or config.fork_weight <= 0 or config.anchor_weight < 0 or config.validation_prompts < 0:
        raise RequestError(
            "window must be 1 or more, fork_weight above 0, anchor_weight 0 or more, validation_prompts 0 or more"
        )


def _validate(trainer: _Trainer, validation: Sequence[Example]) -> dict[str, float]:
    """Share of the held-out answers of each label in which a promise is likelier than not at some labelled place; with
    anchors, the mean loss over a held-out one's tokens, nats."""
    model, config = trainer.model, trainer.settings
    model.eval()
    likely: dict[str, list[bool]] = {"one": [], "should": []}
    own_tokens: list[float] = []
    with torch.no_grad(), run.autocast(config):
        for batch in batches(validation, 2048) if validation else []:
            inputs = {k: v.to(model.device) for k, v in collated([validation[i] for i in batch], config).items()}
            each, rows = token_log_probs(model, inputs)
            for row, index in enumerate(batch):
                log_probs, kind = each[rows == row], validation[index].kind
                if kind == "anchor":
                    own_tokens += (-log_probs).tolist()
                else:
                    likely[kind].append(bool((log_probs > math.log(0.5)).any()))
    model.train()
    figures = {f"forks_{label}": round(sum(forks) / max(1, len(forks)), 4) for label, forks in likely.items()}
    return figures | ({"own_tokens": round(statistics.fmean(own_tokens), 4)} if own_tokens else {})
