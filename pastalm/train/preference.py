"""Stage 2: preference optimisation (PASTA section 5.3) with the BoNBoN loss, on TRL's DPOTrainer.

Of N scored answers to each prompt (`pasta score`) the best and the worst make a pair. Both are packed as in stage 1:
the same mask, positions and labels. The loss is METHOD's, over log-probabilities summed over an answer's labels:

    L = -alpha log p(y+) + (1 - alpha) (log p(y+)/p(y-) - log p0(y+)/p0(y-) - 1/beta)^2

p0 is the model that the run starts from; its log-probabilities are computed once, before training. The default
1/beta is the best-of-N policy's own margin for N = 10 (Gui et al., "BoNBoN alignment", 2024):
(N-1) (1 + 1/2 + ... + 1/(N-1)).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from pastalm.core.layout import Policy
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import DataError, RequestError
from pastalm.models import adapters, chat_template
from pastalm.models.chat_template import encode_chat
from pastalm.records import scores
from pastalm.records.scores import Length, Scored
from pastalm.train import bookkeeping, run
from pastalm.train.dataset import collate, pack_sampled, provenance, truly_promised
from pastalm.train.loss import bonbon, log_probs
from pastalm.train.packing import MIXED, Packed

BEST_OF_TEN = 9 * sum(1 / k for k in range(1, 10))
"""1/beta at which IPO's optimum is the best-of-10 policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceConfig(run.RunConfig):
    """One round. lambda_: what quality is worth against speed (inf: quality alone). alpha: weight of the term that
    teaches y+ itself. sigma: unit of the scorer's differences, that of the stage-1 samples (None: of this data).
    length: which speedup is scores. positions: weight of each policy. max_tokens: longer answers are not
    chosen as better. true_lengths: the promises of the better answer say how long its
    chunks are, not what was sampled."""

    lambda_: float = 1.0
    alpha: float = 0.005
    beta: float = 1 / BEST_OF_TEN
    sigma: float | None = None
    length: Length = "theoretical"
    positions: Mapping[Policy, float] = field(default_factory=lambda: dict(MIXED))
    max_tokens: int = 640
    max_prompt_tokens: int = 256
    true_lengths: bool = False
    learning_rate: float = 1e-4
    row_learning_rate: float = 2e-4
    batch_tokens: int = 4096


# ------------------------------------------------------------------------------ pairs


@dataclass(frozen=True, slots=True)
class Pair:
    """The best and the worst answer to a prompt, packed, and how far apart they are in score. sampled: they are made
    of the tokens that were sampled."""

    better: Packed
    worse: Packed
    id: str
    gap: float
    source: str
    licence: str
    sampled: bool

    def __len__(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.better), len(self.worse))


def choose(
    rows: Sequence[Scored], lambda_: float, sigma: float, length: Length = "theoretical"
) -> Iterator[tuple[Scored, Scored, float]]:
    """(best, worst, gap) of each prompt whose answers differ in score. The best must have ended by itself, and must not
    fork where nothing asked for that. The worst is one that does, if it scores less than the best: what a pair teaches
    is to be when to fork, before how well to write."""
    ordered = sorted(rows, key=lambda r: (r.id, r.choice))
    for _, group in groupby(ordered, key=lambda r: r.id):
        scored_answers = [(s, r) for r in group if (s := r.score(lambda_, sigma, length)) is not None]
        ended = [(s, r) for s, r in scored_answers if r.finish_reason == "stop" and not r.unasked]
        if not ended:
            continue
        high, best = max(ended, key=lambda f: f[0])
        unasked = [(s, r) for s, r in scored_answers if r.unasked and s < high]
        low, worst = min(unasked or scored_answers, key=lambda f: f[0])
        if high > low and best.annotated != worst.annotated:
            yield best, worst, high - low


def pairs(
    rows: Sequence[Scored], tokenizer: Any, vocabulary: Vocabulary, config: PreferenceConfig, *, eos: int
) -> Iterator[Pair]:
    """Pairs that fit, each under one policy drawn by the seed."""
    rng = random.Random(config.seed)
    sigma = scores.spread(rows) if config.sigma is None else config.sigma
    for best, worst, gap in choose(rows, config.lambda_, sigma, config.length):
        prompt = encode_chat(tokenizer, vocabulary, [{"role": "user", "content": best.prompt}])
        if config.true_lengths:
            best = truly_promised(best, vocabulary)
        policy = rng.choices(list(config.positions), list(config.positions.values()))[0]
        (better, one), (worse, other) = (_packed(prompt, answer, vocabulary, policy, eos) for answer in (best, worst))
        if len(prompt) > config.max_prompt_tokens or len(better) > len(prompt) + config.max_tokens:
            continue
        if len(worse) <= len(prompt) + 2 * config.max_tokens:
            yield Pair(better, worse, best.id, gap, best.source, best.licence, one and other)


def _packed(
    prompt: Sequence[int], answer: Scored, vocabulary: Vocabulary, policy: Policy, eos: int
) -> tuple[Packed, bool]:
    """As `pack_sampled`: an answer that was cut off has no end to learn or to unlearn."""
    try:
        return pack_sampled(prompt, answer, vocabulary, policy, eos=eos)
    except DataError as error:
        raise DataError(f"answer {answer.choice} to {answer.id!r}: {error}") from None


def batches(pairs: Sequence[Pair], tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Indices of pairs in batches of about `tokens` padded tokens, both answers counted, like lengths together."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]))
    out: list[list[int]] = []
    batch: list[int] = []
    for index in order:
        if batch and 2 * (len(batch) + 1) * len(pairs[index]) > tokens:
            out.append(batch)
            batch = []
        batch.append(index)
    if batch:
        out.append(batch)
    random.Random(seed).shuffle(out)
    return out


# ------------------------------------------------------------------------------ the trainer


def inputs_of(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Rows y+, y-, y+, y-, … of some pairs."""
    return collate([one for pair in pairs for one in (pair.better, pair.worse)])


class _Trainer(run.Shared, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer with the loss above over our batches."""

    settings: PreferenceConfig

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # ours come with each batch

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Any:
        reference, counted = inputs.pop("reference"), inputs.pop("counted").float()
        with run.autocast(self.settings):
            policy = log_probs(model, inputs).view(-1, 2)
        losses, margin = bonbon(policy, reference, self.settings.alpha, self.settings.beta)
        mode = "train" if model.training else "eval"
        pairs = self.average(counted.sum())  # of each process
        for name, each in (("margin", margin.detach()), ("pairs_in_order", (margin > 0).float())):
            self._metrics[mode][name].append(float(self.average((each * counted).sum()) / pairs))
        loss = (losses * counted).sum() / pairs
        return (loss, None) if return_outputs else loss


# ------------------------------------------------------------------------------ a round


def train(config: PreferenceConfig, progress: Callable[[str], None] = print) -> Path:
    """Trains and returns the folder of the adapter, `out/adapter`. Raises DataError, ModelError, RequestError."""
    progress = run.aloud(config, progress)
    _check(config)
    rows = scores.read(config.data)
    base = run.begin(config, progress)
    sigma = scores.spread(rows) if config.sigma is None else config.sigma
    before = scores.summary(rows, [config.lambda_], sigma, config.length)
    progress(f"{config.data.name}, sigma {sigma:.4g}: {json.dumps({k: round(v, 4) for k, v in before.items()})}")
    chosen_pairs = list(pairs(rows, base.tokenizer, base.vocabulary, config, eos=base.eos))
    if not chosen_pairs:
        raise DataError(f"{config.data}: no two answers to one prompt differ in score; sample more to each")
    if anew := sum(not pair.sampled for pair in chosen_pairs):
        progress(
            f"{anew} of {len(chosen_pairs)} pairs keep no sampled tokens of this model: their text is encoded anew"
        )
    both = [one for pair in chosen_pairs for one in (pair.better, pair.worse)]
    data = provenance(both, [("pairs", pair.source or "not stated", pair.licence) for pair in chosen_pairs])
    data |= {"sigma": sigma, "samples": before}
    progress(f"training on {len(chosen_pairs)} pairs, {data['tokens']} packed tokens")
    adapted = run.adapted(config, base.model, base.tags)
    reference = _reference(config, adapted, chosen_pairs, progress)
    plan = run.planned(config, lambda tokens: batches(chosen_pairs, tokens, seed=config.seed))
    trainer = _trainer(config, adapted, base.tokenizer, chosen_pairs, plan, reference)
    trainer.add_callback(run.Log(config, progress, validate=dict, curves=("margin", "pairs_in_order")))
    started = time.perf_counter()
    run.go(trainer, config)
    final = _margins(trainer, chosen_pairs, reference, config)
    shown = "inf" if config.lambda_ == float("inf") else f"{config.lambda_:g}"
    card = run.RunSummary(
        stage=f"stage 2, lambda = {shown}",
        positions=list(config.positions),
        marker=chat_template.SEQUENTIAL_MARKER,
        data=data,
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - started,
        final=final,
        losses=[
            f"Pairs in order after training {final['pairs_in_order']:.3f}, mean margin {final['margin']:.1f} nats "
            f"(aim {1 / config.beta:.1f})."
        ],
    )
    return run.save(trainer, config, card)


def _check(config: PreferenceConfig) -> None:
    if not config.data.is_file():
        raise DataError(f"no scored answers at {config.data}: make them with pasta score")
    if config.start is None:
        raise RequestError("stage 2 continues from an adapter: give --start")
    adapters.read_card(config.start)
    checks = (config.lambda_ >= 0, 0 <= config.alpha <= 1, config.beta > 0)
    if not all(checks) or (config.sigma is not None and config.sigma <= 0):
        raise RequestError("lambda must be 0 or more, alpha in 0..1, beta and sigma above 0")
    if unknown := set(config.positions) - {"promised", "overlap"}:
        raise RequestError(f"unknown positions {sorted(unknown)}: use promised, overlap")


def _reference(
    config: PreferenceConfig, model: Any, chosen_pairs: Sequence[Pair], progress: Callable[[str], None]
) -> Tensor:
    """log p0 of both answers of each pair [n, 2], computed once and kept in `out/reference.jsonl`."""
    model.eval()

    def compute(batch: Sequence[int]) -> list[list[float]]:
        inputs = {k: v.to(model.device) for k, v in inputs_of([chosen_pairs[i] for i in batch]).items()}
        with torch.no_grad(), run.autocast(config):
            values: list[list[float]] = log_probs(model, inputs).view(-1, 2).tolist()
        return values

    def say(done: int) -> None:
        progress(f"log-probabilities of {done}/{len(chosen_pairs)} pairs before training")

    keys = [bookkeeping.digest(pair.better, pair.worse) for pair in chosen_pairs]
    return torch.tensor(bookkeeping.remembered(config, keys, batches(chosen_pairs, config.batch_tokens), compute, say))


def _trainer(
    config: PreferenceConfig,
    model: Any,
    tokenizer: Any,
    chosen_pairs: Sequence[Pair],
    plan: list[list[int]],
    reference: Tensor,
) -> _Trainer:
    def collated(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = [i for one in items for i in one["indices"]]
        own = run.share(batch)
        indices = own or batch[:1]  # a process that is left without any takes one, and does not count it
        counted = torch.tensor([bool(own)] * len(indices))
        return inputs_of([chosen_pairs[i] for i in indices]) | {"reference": reference[indices], "counted": counted}

    optimizer = run.optimizer(config, model)
    trainer = _Trainer(
        model=model,
        optimizers=(optimizer, None),
        args=DPOConfig(**run.arguments(config, len(plan)), beta=config.beta, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_dict({"indices": plan}),
        data_collator=collated,
        processing_class=tokenizer,
    )
    trainer.settings = config
    return trainer


def _margins(
    trainer: _Trainer, chosen_pairs: Sequence[Pair], reference: Tensor, config: PreferenceConfig
) -> dict[str, float]:
    """How far apart the trained model holds its pairs."""
    model = trainer.model
    model.eval()
    margins: list[float] = []
    with torch.no_grad(), run.autocast(config):
        for batch in batches(chosen_pairs, config.batch_tokens):
            inputs = {k: v.to(model.device) for k, v in inputs_of([chosen_pairs[i] for i in batch]).items()}
            policy = log_probs(model, inputs).view(-1, 2).cpu()
            _, margin = bonbon(policy, reference[batch], config.alpha, config.beta)
            margins += margin.tolist()
    return {
        "margin": sum(margins) / len(margins),
        "pairs_in_order": sum(m > 0 for m in margins) / len(margins),
    }
