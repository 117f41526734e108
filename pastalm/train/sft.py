"""Stage 1: supervised finetuning on linear form (PASTA section 5.2), on TRL's SFTTrainer.

Mask, positions and labels come from layout.py, the same object that engines drive. LoRA on all linear
layers and the six new embedding rows; the loss is computed at labelled positions only, and weighs
the tokens that decide on forks more (`tag_weight`): a main thread that does not see what its chunks
say learns there when to stop promising. Checkpoints as it goes, and goes on from the newest.
"""

from __future__ import annotations

import json
import platform
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, set_seed
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from pastalm import models
from pastalm.errors import DataError, ModelError
from pastalm.layout import POLICIES
from pastalm.train.dataset import (
    Example,
    Mix,
    batches,
    collate,
    examples,
    provenance,
    read_annotated,
    read_repeats,
)
from pastalm.vocabulary import TAG_TOKENS, Tags


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """One training run. learning_rate: 1e-5, the paper's, does not move LoRA. row_learning_rate: of
    the six new rows, which have far to go. start: an adapter to go on from (else: new). repeats: the
    model's own answers (`pasta sample`), whose repetitions are unlearned, beside the data.
    batch_tokens: padded tokens a step. tag_weight: loss weight of the decision tokens."""

    data: Path
    out: Path
    model: str = models.EMBEDDED
    mix: Mix = field(default_factory=Mix)
    epochs: float = 1.0
    start: Path | None = None
    repeats: Path | None = None
    learning_rate: float = 5e-4
    row_learning_rate: float = 5e-3
    warmup: float = 0.05
    batch_tokens: int = 2048
    tag_weight: float = 2.0
    lora_rank: int = 16
    validation_rows: int = 16
    save_steps: int = 40
    resume: bool = True
    device: str = "cpu"
    seed: int = 0


def weighted_loss(
    model: Any, inputs: dict[str, Tensor], tags: Tags, tag_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean negative log-likelihood over labelled tokens (for rows to be unlearned, of any other
    token); their losses [m] and whether each is a decision (a tag, or what follows a promise) [m].
    inputs: as `collate` gives them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    hidden = base.model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
    ).last_hidden_state
    logits = base.lm_head(hidden[:, :-1][kept]).float()
    targets = labels[kept]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    unlikely = inputs["unlikely"][:, None].expand_as(kept)[kept]
    losses = torch.where(unlikely, _unlikelihood(losses), losses)
    ids = torch.tensor(tags.ids, device=targets.device)
    decision = torch.isin(targets, ids) | (inputs["input_ids"][:, :-1][kept] == tags.promise_end)
    weights = torch.where(decision, tag_weight, 1.0)
    return (losses * weights).sum() / weights.sum(), losses.detach(), decision


def _unlikelihood(losses: Tensor) -> Tensor:
    """-log(1 - p) of tokens whose -log p is given (Welleck et al. 2020, equation 5)."""
    return -torch.log(-torch.expm1(-losses.clamp_min(1e-6)))


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the loss above."""

    tags: Tags
    tag_weight: float

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, _, _ = weighted_loss(model, inputs, self.tags, self.tag_weight)
        return (loss, None) if return_outputs else loss


def train(config: SftConfig, progress: Callable[[str], None] = print) -> Path:
    """Trains and returns the folder of the adapter, `out/adapter`. Raises DataError, ModelError."""
    _check(config)
    set_seed(config.seed)
    model, tokenizer = models.load_base(models.pull(config.model, progress=progress))
    models.prepare(model, tokenizer)
    eos = sorted(models.end_tokens(model, tokenizer))
    vocabulary = models.vocabulary_of(tokenizer, eos=eos)
    rows = read_annotated(config.data)
    chosen = list(examples(rows, tokenizer, vocabulary, config.mix, eos=eos[0]))
    held, chosen = chosen[: config.validation_rows], chosen[config.validation_rows :]
    if not chosen:
        raise DataError(f"{config.data}: no usable answers are left to train on")
    if config.repeats is not None:
        chosen += read_repeats(config.repeats, tokenizer, vocabulary, config.mix, eos=eos[0])
        random.Random(config.seed).shuffle(chosen)
    progress(f"training on {json.dumps(provenance(chosen))}")
    plan = batches(chosen, config.batch_tokens, seed=config.seed)
    tags = vocabulary.tags
    assert tags is not None
    trainer = _trainer(config, model, tokenizer, chosen, plan, tags)
    log = _Log(config, trainer, held, tags, progress)
    trainer.add_callback(log)
    newest = _newest(config)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    seconds = time.perf_counter() - started
    folder = config.out / "adapter"
    _save(trainer.model, folder, config, seconds, provenance(chosen), log)
    return folder


def _check(config: SftConfig) -> None:
    if not config.data.is_file():
        raise DataError(f"no annotated data at {config.data}: make it with pasta annotate")
    if unknown := set(config.mix.positions) - set(POLICIES):
        raise DataError(f"unknown positions {sorted(unknown)}: use {', '.join(POLICIES)}")
    config.out.mkdir(parents=True, exist_ok=True)
    asked, path = _described(config), config.out / "config.json"
    if path.is_file() and config.resume and json.loads(path.read_text()) != asked:
        raise DataError(f"{config.out} holds a run of another configuration: use another --out, or --no-resume")
    path.write_text(json.dumps(asked, indent=2) + "\n")


def _described(config: SftConfig) -> dict[str, Any]:
    """The configuration without what does not change the result."""
    described = asdict(replace(config, out=Path("."), resume=True))
    described["data"] = config.data.name
    described.pop("out")
    described.pop("resume")
    for key in ("start", "repeats"):
        described[key] = path.name if (path := getattr(config, key)) else None
    described["model"] = _base_name(config)
    return json.loads(json.dumps(described, default=str))  # type: ignore[no-any-return]


def _base_name(config: SftConfig) -> str:
    """The base as others may know it: of a local folder only its name."""
    return Path(config.model).name if Path(config.model).is_dir() else config.model


def _newest(config: SftConfig) -> Path | None:
    found = [p for p in config.out.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    if not config.resume or not found:
        return None
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _trainer(
    config: SftConfig,
    model: Any,
    tokenizer: Any,
    chosen: list[Example],
    plan: list[list[int]],
    tags: Tags,
) -> _Trainer:
    adapted = _adapted(config, model, tags)
    steps = int(len(plan) * config.epochs)
    trainer = _Trainer(
        model=adapted,
        optimizers=(_optimizer(config, adapted), None),
        args=TrlConfig(
            output_dir=str(config.out),
            per_device_train_batch_size=1,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, int(steps * config.warmup)),
            max_grad_norm=1.0,
            gradient_checkpointing=False,  # TRL's default would pay each forward pass twice
            weight_decay=0.0,
            bf16=config.device != "cpu" or models.cpu_has_bfloat16(),
            use_cpu=config.device == "cpu",
            logging_steps=5,
            save_steps=config.save_steps,
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
            seed=config.seed,
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_num_workers=0,
        ),
        train_dataset=Dataset.from_dict({"indices": plan}),
        data_collator=lambda wanted: _collated(
            [chosen[i] for batch in wanted for i in batch["indices"]]
        ),
        processing_class=tokenizer,
    )
    trainer.tags, trainer.tag_weight = tags, config.tag_weight
    return trainer


def _collated(chosen: list[Example]) -> dict[str, Tensor]:
    return collate([e.packed for e in chosen], unlikely=[e.kind == "repeat" for e in chosen])


def _adapted(config: SftConfig, model: Any, tags: Tags) -> Any:
    """The model with a trainable adapter. Raises ModelError if `start` cannot be read."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if config.start is not None:
        try:
            return PeftModel.from_pretrained(model, str(config.start), is_trainable=True)
        except Exception as error:
            raise ModelError(f"cannot go on from the adapter in {config.start}: {error}") from None
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules="all-linear",
        trainable_token_indices=list(tags.ids),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _optimizer(config: SftConfig, model: Any) -> torch.optim.Optimizer:
    rows: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rows if "trainable_tokens" in name else others).append(parameter)
    groups = [
        {"params": others, "lr": config.learning_rate},
        {"params": rows, "lr": config.row_learning_rate},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


class _Log(TrainerCallback):  # type: ignore[misc]
    """Writes log.jsonl and loss.png, and says where the training is."""

    def __init__(
        self,
        config: SftConfig,
        trainer: _Trainer,
        held: list[Example],
        tags: Tags,
        progress: Callable[[str], None],
    ) -> None:
        self.config, self.trainer, self.held, self.tags = config, trainer, held, tags
        self.progress = progress
        self.path = config.out / "log.jsonl"
        self.last: dict[str, Any] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._write({"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]})
            self.progress(f"step {state.global_step}/{state.max_steps} loss {logs['loss']}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write({"step": state.global_step, **self.validate()})
        plot(self.path, self.config.out / "loss.png")

    def validate(self) -> dict[str, float]:
        """Mean loss over held-out answers: decision tokens and text apart. Under bfloat16 as trained."""
        model = self.trainer.model
        model.eval()
        sums = {"validation_tags": [0.0, 0], "validation_text": [0.0, 0]}
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            for batch in batches(self.held, self.config.batch_tokens):
                inputs = _collated([self.held[i] for i in batch])
                inputs = {k: v.to(model.device) for k, v in inputs.items()}
                _, losses, decision = weighted_loss(model, inputs, self.tags, 1.0)
                for name, where in (("validation_tags", decision), ("validation_text", ~decision)):
                    sums[name][0] += float(losses[where].sum())
                    sums[name][1] += int(where.sum())
        model.train()
        return {name: round(total / max(1, n), 4) for name, (total, n) in sums.items()}

    def _write(self, entry: dict[str, Any]) -> None:
        self.last.update(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def plot(log: Path, target: Path) -> None:
    """Draws the losses of a log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in (("loss", "-"), ("validation_text", "o-"), ("validation_tags", "s-")):
        points = [(e["step"], e[key]) for e in entries if key in e]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _save(
    model: Any,
    folder: Path,
    config: SftConfig,
    seconds: float,
    data: dict[str, Any],
    log: _Log,
) -> None:
    """The adapter in bfloat16, with its card and how it was trained."""
    final = log.validate()
    plot(log.path, config.out / "loss.png")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = _base_name(config)
    with models.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)
    models.write_card(
        folder,
        {
            "base": _base_name(config),
            "shape": models.shape_of(model.get_base_model()),
            "tags": list(TAG_TOKENS.values()),
            "positions": sorted(config.mix.positions),
            "sequential_marker": models.SEQUENTIAL_MARKER,
        },
    )
    record = {
        "config": _described(config),
        "data": data,
        "steps": log.trainer.state.global_step,
        "seconds_this_run": round(seconds),
        "final": {**log.last, **final},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {config.device}",
        "torch": torch.__version__,
    }
    (folder / "train.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(record))  # PEFT's own is an empty form


def card(record: Mapping[str, Any]) -> str:
    """What an adapter's users should know of it, from its train.json."""
    config, data, final = record["config"], record["data"], record["final"]
    rows = [f"| {source} | {n} |" for source, n in sorted(data["sources"].items())]
    terms = "; ".join(f"{licence or 'not stated'} ({n})" for licence, n in sorted(data["licences"].items()))
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(data["kinds"].items()))
    lines = [
        f"# PASTA adapter for {config['model']} (stage 1)",
        "",
        f"LoRA (rank {config['lora_rank']}, all linear layers) and six embedding rows, made with pastalm.",
        "",
        "## Data",
        "",
        f"{data['rows']} sequences ({kinds}), {data['tokens']} packed tokens, of them {data['labelled_tokens']}",
        f"in the loss. Terms of the data (rows): {terms}.",
        "",
        "| source | rows |",
        "| --- | --- |",
        *rows,
        "",
        "## Training",
        "",
        f"{record['steps']} steps in {record['seconds_this_run']} s on {record['machine']}, torch {record['torch']}.",
        f"Held-out loss, nats a token: {final['validation_tags']} on tags, {final['validation_text']} on text.",
        "All settings are in `train.json`.",
    ]
    return "\n".join(lines) + "\n"
