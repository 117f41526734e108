"""Several processes train what one does on the same batches, and one of them writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pastalm.core.language import Promise, Sync, Text
from pastalm.models import checkpoints, loading
from pastalm.records.documents import Async, Document, render
from pastalm.records.scores import Scored
from pastalm.train import preference, sft
from pastalm.train.dataset import Mix
from pastalm.train.preference import PreferenceConfig
from pastalm.train.sft import SftConfig
from tests.test_models import BYTE_LEVEL, small_model

TIPS: Document = (
    Text("Tips.\n"),
    Promise("sleep", 10),
    Async((Text("1. Sleep well.\n"),)),
    Promise("food", 10),
    Async((Text("2. Eat greens.\n"),)),
    Sync(),
    Text("Both help."),
)
PLAIN: Document = (Text("Only one thing to say."),)
SAME = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, annotated answers and scored ones: few enough that a batch may be one answer."""
    folder = tmp_path_factory.mktemp("processes")
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, folder / "base")
    rows: list[dict[str, Any]] = []
    for i in range(60):
        document = TIPS if i % 3 else PLAIN
        row = {"id": str(i), "prompt": f"What of {i}?" + " And?" * (i % 5), "annotated": render(document)}
        rows.append(row | {"tokens": 20, "chunks": 2 if i % 3 else 0})
    (folder / "annotated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = Scored(
        id="",
        choice=0,
        prompt="",
        annotated=render(PLAIN),
        finish_reason="stop",
        tokens=40,
        text_tokens=30,
        critical_path=30,
        baseline_tokens=40,
        scorer="pmi",
        difference=0.0,
    )
    scored = [
        replace(one, id=str(i), choice=c, prompt=f"What of {i}?" + " And?" * (i % 4))
        for i in range(9)
        for c, one in enumerate((plain, replace(plain, annotated=render(TIPS), critical_path=10)))
    ]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row.to_dict()) + "\n" for row in scored))
    return folder


def in_two(command: str, config: SftConfig | PreferenceConfig, *options: str) -> None:
    """A real run of the command in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    launched += ["--master_port", str(port), "-m", "--", "pastalm.cli", "train", command, str(config.data), *options]
    launched += ["--out", str(config.out), "--model", config.model, "--save-steps", str(config.save_steps)]
    launched += ["--epochs", str(config.epochs), "--batch-tokens", str(config.batch_tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launched, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(config.out / "adapter")], "one of them speaks"


def record(config: SftConfig | PreferenceConfig) -> dict[str, Any]:
    found = json.loads((config.out / "adapter" / "train.json").read_text())
    assert isinstance(found, dict)
    return found


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def are_one_training(one: SftConfig | PreferenceConfig, two: SftConfig | PreferenceConfig) -> None:
    """Losses and weights of two runs are equal, weights as the last checkpoint has them, in float32; the second was of
    two processes."""
    assert (record(one)["processes"], record(two)["processes"]) == (1, 2)
    steps = record(one)["steps"]
    assert record(two)["steps"] == steps > 2
    assert record(two)["final"] == pytest.approx(record(one)["final"], abs=1e-3)
    entries, others = log(one.out), log(two.out)
    assert [entry["step"] for entry in entries] == [entry["step"] for entry in others]
    for entry, other in zip(entries, others, strict=True):
        assert other == pytest.approx(entry, rel=1e-4, abs=1e-4)  # learning rates too: warm-up is of the same steps
    ours, theirs = (load_file(run.out / f"checkpoint-{steps}" / "adapter_model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert weights.dtype == torch.float32
        assert float((weights - theirs[name]).abs().max()) < SAME, name


def test_sft_in_two_processes_is_that_of_one(data: Path, tmp_path: Path) -> None:
    """One process has batches of twice as many tokens. Some batches hold one answer, so that of two one has none."""
    one = SftConfig(
        data=data / "annotated.jsonl",
        out=tmp_path / "one",
        model=str(data / "base"),
        mix=Mix(token_budget=2400),
        lora_rank=2,
        batch_tokens=200,
        save_steps=2,
    )
    two = replace(one, out=tmp_path / "two", batch_tokens=100)
    sft.train(one, str)
    in_two("sft", two, "--token-budget", "2400", "--lora-rank", "2")
    are_one_training(one, two)
    assert loading.load(two.model, adapter=str(two.out / "adapter"), dtype="float32").prepared


def test_prefer_in_two_processes_is_that_of_one(data: Path, tmp_path: Path) -> None:
    stage_1 = SftConfig(
        data=data / "annotated.jsonl",
        out=tmp_path / "stage 1",
        model=str(data / "base"),
        mix=Mix(token_budget=1800),
        lora_rank=2,
    )
    one = PreferenceConfig(
        data=data / "scored.jsonl",
        out=tmp_path / "one",
        model=stage_1.model,
        start=sft.train(stage_1, str),
        batch_tokens=400,
        save_steps=2,
        epochs=2,
    )
    two = replace(one, out=tmp_path / "two", batch_tokens=200)
    preference.train(one, str)
    in_two("prefer", two, "--start", str(one.start))
    are_one_training(one, two)
    references = [(run.out / "reference.jsonl").read_text().splitlines() for run in (one, two)]
    assert len(references[0]) == len(references[1]), "one process wrote them"
