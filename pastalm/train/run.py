"""What all training runs share: the folder, the optimizer, the log, the saved adapter and its card.

out/config.json   settings and hashes; a run with other settings is rejected (bookkeeping.py)
out/checkpoint-N  of transformers' Trainer; a run resumes from the newest
out/log.jsonl     losses, and validation at each checkpoint
out/loss.png      the losses as a plot
out/adapter       the result: weights, pasta.json, train.json (how it was made), README.md (the card)
"""

from __future__ import annotations

import json
import math
import platform
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft.utils import TrainableTokensWrapper
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from pastalm.core.vocabulary import TAG_TOKENS, Tags, Vocabulary
from pastalm.errors import DataError, ModelError
from pastalm.models import adapters, checkpoints, downloads, dtypes, end_tokens, lossless, preparing
from pastalm.models.checkpoints import is_quantised, quiet
from pastalm.train import bookkeeping
from pastalm.train.packing import IGNORED

WORKERS = 2
"""Processes that build batches while a GPU computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Settings of every run.

    data: the training data.
    out: the run's folder.
    model: the base model.
    start: an adapter to continue training from. None: a new one.
    epochs: passes over the data.
    learning_rate: of LoRA; the paper's 1e-5 is too small for it.
    row_learning_rate: of the tags' embedding rows, which are new and need to move further.
    warmup: share of the steps.
    batch_tokens: padded tokens in a step, for each process: two with 2,048 equal one with 4,096.
    lora_rank: of LoRA.
    full: train and save all weights instead of an adapter.
    gradient_checkpointing: uses less memory and computes each forward pass twice.
    flex: FlexAttention instead of a dense mask.
    save_steps: steps between checkpoints.
    overwrite: delete an earlier run in `out`.
    device: "cpu" or a torch device.
    seed: of all randomness.
    trust_remote_code: run Python code that comes with the model.
    """

    data: Path
    out: Path
    model: str = downloads.EMBEDDED
    start: Path | None = None
    epochs: float = 1.0
    learning_rate: float = 5e-4
    row_learning_rate: float = 5e-3
    warmup: float = 0.05
    batch_tokens: int = 2048
    lora_rank: int = 16
    full: bool = False
    gradient_checkpointing: bool = False
    flex: bool = False
    save_steps: int = 40
    overwrite: bool = False
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False

    @property
    def base_name(self) -> str:
        """The base model's name; of a local folder only the last part of its path."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model

    def described(self) -> dict[str, Any]:
        """The settings that affect the result, as JSON. Paths are reduced to their names."""
        settings = asdict(replace(self, out=Path(".")))
        for key in ("out", "overwrite", "trust_remote_code"):
            settings.pop(key)
        names = {key: value.name for key, value in settings.items() if isinstance(value, Path)}
        endless = {key: "inf" for key, value in settings.items() if value == math.inf}  # JSON has no such number
        plain = json.dumps(settings | names | endless | {"model": self.base_name}, default=str)
        return json.loads(plain)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Base:
    """The prepared model that a run starts from (float32). eos: the id that ends an answer in training."""

    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    tags: Tags
    eos: int


def aloud(config: RunConfig, progress: Callable[[str], None]) -> Callable[[str], None]:
    """`progress` for the main process, a no-op for the others."""
    return progress if PartialState(cpu=config.device == "cpu").is_main_process else lambda _: None


def begin(config: RunConfig, progress: Callable[[str], None]) -> Base:
    """Creates the folder, sets the seed and loads the model. Raises DataError, ModelError."""
    bookkeeping.claim(config)
    set_seed(config.seed)
    trust = config.trust_remote_code
    folder = downloads.pull(config.model, progress=progress, trust_remote_code=trust)
    model, tokenizer = checkpoints.read(folder, device=str(device(config)), trust_remote_code=trust)
    preparing.prepare(model, tokenizer)
    vocabulary = lossless.vocabulary_of(tokenizer, eos=end_tokens.end_tokens(model, tokenizer))
    assert vocabulary.tags is not None
    return Base(model, tokenizer, vocabulary, vocabulary.tags, end_tokens.taught_end(model, tokenizer))


def go(trainer: Any, config: RunConfig) -> None:
    """Trains, from the newest checkpoint if there is one. Raises DataError if the disk is full."""
    last = bookkeeping.newest(config.out)
    trainer.remove_callback(PrinterCallback)  # stdout is for the answer
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except OSError as error:
        raise DataError(
            f"cannot write to {config.out}: {error}; free some space, then run again to resume from its checkpoint"
        ) from None
    except Exception as error:
        if "No space left" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise DataError(
            f"the disk of {config.out} is full; free some space, then run again to resume from its checkpoint"
        ) from None


def device(config: RunConfig) -> Any:
    """The device of this process; each of several processes has its own GPU."""
    several = config.device == "cuda" and PartialState().num_processes > 1
    return PartialState().device if several else config.device


def adapted(config: RunConfig, model: Any, tags: Tags) -> Any:
    """The model on its device with a trainable adapter: LoRA on all linear layers and the six tag rows; with `full`,
    the model itself. Raises ModelError if `start` cannot be read or is of another base model."""
    from peft import LoraConfig, PeftModel, get_peft_model

    _check_trainable(config, model)
    if not is_quantised(model):  # those weights are where they belong
        model = model.to(device(config))
    if config.flex:
        model.set_attn_implementation("flex_attention")
    if config.full:
        whole = adapters.load_adapter(model, config.start) if config.start is not None else model
        return whole.requires_grad_(True).train()
    if config.start is not None:
        adapters.check_base(adapters.read_card(config.start), model, config.start)
        try:
            peft_model = PeftModel.from_pretrained(model, str(config.start), is_trainable=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"cannot continue from the adapter in {config.start}: {reason}") from None
        return _trainable(peft_model, config.start)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=_linear_layers(model),
        trainable_token_indices={name: list(tags) for name in _names(model, preparing.token_tables(model))},
        task_type="CAUSAL_LM",
    )
    return _trainable(get_peft_model(model, lora))


def _check_trainable(config: RunConfig, model: Any) -> None:
    """Raises ModelError, before training, for models that would fail later."""
    if config.full and is_quantised(model):
        raise ModelError("quantised weights cannot be trained: leave out --full, or train what they were made from")
    if unmet := [kind for kind in _layer_types(model) if kind not in ("full_attention", "sliding_attention")]:
        raise ModelError(f"this model has layers of {unmet[0]!r}, which take no attention mask: train another model")
    adapters.shape_of(model)


def _layer_types(model: Any) -> Sequence[str]:
    return getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()


def _names(model: Any, modules: Sequence[Any]) -> list[str]:
    """The names of some of a model's modules."""
    module_ids = {id(module) for module in modules}
    return [name for name, module in model.named_modules() if id(module) in module_ids]


def _linear_layers(model: Any) -> list[str]:
    """The names of the text decoder's linear layers; those of vision or audio parts are left out."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return _names(model, [m for m in model.get_decoder().modules() if isinstance(m, (Linear, Conv1D))])


def _trainable(adapted: Any, start: Path | None = None) -> Any:
    """The model, what is trained of it in float32, whose tag rows are trained wherever it has some, input and output.
    Raises ModelError if not."""
    base = adapted.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    rows = [module for module in adapted.modules() if isinstance(module, TrainableTokensWrapper)]
    if {id(embedding), id(head)} != {id(module) for module in rows}:
        if start is None:
            raise ModelError("this model's tag rows cannot be trained apart from its other weights: use --full")
        raise ModelError(f"the adapter in {start} has no tag rows of the output head: train it anew from the base")
    bias = getattr(head.original_module, "bias", None)
    if bias is not None:  # PEFT computes a head's rows without it
        head.register_forward_hook(lambda _, __, output: output + bias)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def optimizer(config: RunConfig, model: Any) -> torch.optim.Optimizer:
    """AdamW, with a separate learning rate for the tag rows."""
    rows: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rows if "trainable_tokens" in name else others).append(parameter)
    groups = [
        {"params": others, "lr": config.learning_rate},
        {"params": rows, "lr": config.row_learning_rate},
    ]
    fused = config.device != "cpu"
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)


def autocast(config: RunConfig) -> Any:
    """Products in bfloat16 on a GPU, also where no trainer has wrapped the model's forward pass in it."""
    return torch.autocast(config.device.partition(":")[0], dtype=torch.bfloat16, enabled=_half(config))


def _half(config: RunConfig) -> bool:
    return dtypes.training_dtype(config.device) == "bfloat16"


def arguments(config: RunConfig, steps: int) -> dict[str, Any]:
    """What TRL's configurations have in common here: our collator sees our columns, steps are batches of ours."""
    return {
        "output_dir": str(config.out),
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,  # the plan holds them all
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, int(steps * config.warmup)),
        "max_grad_norm": 1.0,
        "gradient_checkpointing": config.gradient_checkpointing,  # TRL's default is to
        "weight_decay": 0.0,
        "bf16": _half(config),
        "use_cpu": config.device == "cpu",
        "logging_steps": math.gcd(5, config.save_steps),  # so that a checkpoint never cuts a mean in two
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "seed": config.seed,
        "max_length": None,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0 if config.device == "cpu" else WORKERS,  # masks are made while a GPU computes
    }


def planned(config: RunConfig, batches: Callable[[int], list[list[int]]]) -> list[list[int]]:
    """The batches of all epochs, one a step, each shared by all processes. batches: those of one epoch, of so many
    tokens."""
    once = batches(config.batch_tokens * PartialState().num_processes)
    order = random.Random(config.seed)
    plan: list[list[int]] = []
    for _ in range(math.ceil(config.epochs)):
        plan += order.sample(once, len(once))
    return plan[: max(1, int(len(once) * config.epochs))]


def share(batch: Sequence[int]) -> list[int]:
    """What this process takes of a batch."""
    state = PartialState()
    return list(batch[state.process_index :: state.num_processes])


def share_of(
    batch: Sequence[int], collated: Callable[[Sequence[int]], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What this process takes of a batch, collated. One that is left without any takes one, and counts none of it."""
    own = share(batch)
    inputs = collated(own or batch[:1])
    if not own:
        inputs["labels"][:] = IGNORED
    return inputs


def supervised(
    kind: type[Any],
    config: RunConfig,
    base: Base,
    plan: list[list[int]],
    collated: Callable[[Sequence[int]], dict[str, torch.Tensor]],
) -> Any:
    """A trainer of the model with its adapter, over the batches of a plan. kind: a subclass of TRL's SFTTrainer.
    collated: the inputs of some examples, by their indices."""
    from trl import SFTConfig

    model = adapted(config, base.model, base.tags)
    trainer = kind(
        model=model,
        optimizers=(optimizer(config, model), None),
        args=SFTConfig(**arguments(config, len(plan)), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_dict({"indices": plan}),
        data_collator=lambda items: share_of([i for batch in items for i in batch["indices"]], collated),
        processing_class=base.tokenizer,
    )
    trainer.settings = config
    return trainer


class Shared:
    """For a trainer: each of several processes takes its share of every batch of the plan, in order."""

    train_dataset: Any
    data_collator: Any
    args: Any
    accelerator: Any

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole batches, for the collator to share."""
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=not self.args.use_cpu,
        )

    def average(self, own: torch.Tensor) -> torch.Tensor:
        """The mean of a number over all processes."""
        mean: torch.Tensor = self.accelerator.reduce(own.detach().clone(), reduction="mean")
        return mean


class Log(TrainerCallback):  # type: ignore[misc]
    """Writes log.jsonl and loss.png, and says where the training is. validate: figures at each checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        progress: Callable[[str], None],
        *,
        validate: Callable[[], dict[str, float]],
        curves: Sequence[str],
    ) -> None:
        self.config, self.progress, self.validate, self.curves = config, progress, validate, curves
        self.path = config.out / "log.jsonl"
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removes log entries after the checkpoint; adds its validation if that is missing."""
        if not state.is_world_process_zero:
            logged = [entry for entry in bookkeeping.entries(self.path) if entry.get("step", 0) <= state.global_step]
        else:
            logged = bookkeeping.cut(self.path, state.global_step)
        for entry in logged:
            self.last.update(entry)
        if not state.global_step:
            return
        if not any("loss" not in e and e["step"] == state.global_step for e in logged):
            self.on_save(args, state, control)
        elif state.is_world_process_zero:
            self._plot()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            figures = {k: v for k, v in logs.items() if k in (*self.curves, "loss", "learning_rate")}
            self._write({"step": state.global_step, **figures})
            self.progress(f"step {state.global_step}/{state.max_steps} loss {logs['loss']}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        figures = self.validate()
        if not state.is_world_process_zero:
            return
        self._write({"step": state.global_step, **figures})
        self._plot()

    def _plot(self) -> None:
        plot(self.path, self.config.out / "loss.png", self.curves)

    def _write(self, entry: dict[str, Any]) -> None:
        self.last.update(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def plot(log: Path, target: Path, curves: Sequence[str]) -> None:
    """Draws the loss and other curves of a log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key in ("loss", *curves):
        points = [(e["step"], e[key]) for e in entries if key in e]
        if points:
            style = "-" if len(points) > 20 or key == "loss" else "o-"
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What the card and train.json record.

    stage: "stage 1", ...
    positions: the position policies trained on.
    marker: the marker of sequential answers; None if there was none.
    data: from `dataset.provenance`.
    steps: training steps.
    seconds: wall-clock time.
    final: figures after training.
    losses: lines about them for the card.
    """

    stage: str
    positions: Sequence[str]
    marker: str | None
    data: Mapping[str, Any]
    steps: int
    seconds: float
    final: Mapping[str, Any]
    losses: Sequence[str]


def save(trainer: Any, config: RunConfig, summary: RunSummary) -> Path:
    """Writes the adapter (with `full`, the model) in bfloat16, and its cards; returns its folder. All processes must
    call it, to gather sharded weights; the main process writes.

    trainer: after training.
    config: the run.
    summary: for the cards.
    """
    folder = config.out / ("model" if config.full else "adapter")
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not PartialState().is_main_process:
        return folder
    if config.full:
        _save_model(model, weights, trainer.processing_class, folder)
    else:
        _save_adapter(model, weights, config, folder)
    base = model if config.full else model.get_base_model()
    adapters.write_card(
        folder,
        {
            "base": config.base_name,
            "shape": adapters.shape_of(base),
            "tags": list(TAG_TOKENS.values()),
            "positions": sorted(summary.positions),
            "sequential_marker": summary.marker,
        },
    )
    record = {
        "stage": summary.stage,
        "config": config.described(),
        "data": summary.data,
        "steps": summary.steps,
        "seconds_this_run": round(summary.seconds),
        "final": summary.final,
        "machine": _machine(config),
        "processes": PartialState().num_processes,
        "torch": torch.__version__,
    }
    if config.start is not None and (before := config.start / "train.json").is_file():
        record["before"] = json.loads(before.read_text())
    (folder / "train.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(record, summary.losses))  # PEFT's own is an empty form
    return folder


def _machine(config: RunConfig) -> str:
    gpu = config.device.startswith("cuda")
    return torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"


def _save_adapter(model: Any, weights: Mapping[str, Any], config: RunConfig, folder: Path) -> None:
    half = {
        name: value.to(torch.bfloat16) if "lora_" in name or "trainable_tokens" in name else value
        for name, value in weights.items()
    }
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = config.base_name
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, state_dict=half, save_embedding_layers=False, selected_adapters=["default"])


def _save_model(model: Any, weights: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    with quiet():
        half = {name: value.to(torch.bfloat16) for name, value in weights.items()}
        model.save_pretrained(folder, state_dict=half)
        tokenizer.save_pretrained(folder)


def _terms(data: Mapping[str, Any]) -> str:
    return "; ".join(f"{licence or 'not stated'} ({n})" for licence, n in sorted(data["licences"].items()))


def _before(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines about the data of the earlier runs that this one continues, the latest first."""
    while before := record.get("before"):
        data = before["data"]
        yield f"Goes on from {before['stage']}: {data['rows']} sequences, {data['tokens']} packed tokens."
        yield f"Terms of that data (rows): {_terms(data)}."
        yield ""
        record = before


def card(record: Mapping[str, Any], losses: Sequence[str]) -> str:
    """The model card, in Markdown. record: train.json. losses: lines about the result."""
    config, data = record["config"], record["data"]
    rows = [f"| {source} | {n} |" for source, n in sorted(data["sources"].items())]
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(data["kinds"].items()))
    lines = [
        f"# PASTA {'model from' if config['full'] else 'adapter for'} {config['model']} ({record['stage']})",
        "",
        "All weights were trained, with pastalm."
        if config["full"]
        else f"LoRA (rank {config['lora_rank']}, all linear layers) and the six tag rows, made with pastalm.",
        "",
        "## Data",
        "",
        f"{data['rows']} sequences ({kinds}), {data['tokens']} packed tokens, of them {data['labelled_tokens']}",
        f"in the loss. Terms of the data (rows): {_terms(data)}.",
        "",
        "| source | rows |",
        "| --- | --- |",
        *rows,
        "",
        *_before(record),
        "## Training",
        "",
        f"{record['steps']} steps in {record['seconds_this_run']} s on {record['machine']}, torch {record['torch']}.",
        *losses,
        "All settings are in `train.json`.",
    ]
    return "\n".join(lines) + "\n"
