"""What several tests of training begin from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pastalm.models import checkpoints
from pastalm.train.dataset import Mix
from pastalm.train.sft import SftConfig, train
from tests.test_models import BYTE_LEVEL, small_model
from tests.train.documents import DOCUMENTS


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and a stage-1 adapter of it."""
    folder = tmp_path_factory.mktemp("stage1")
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, folder / "base")
    rows = [
        {"id": str(i), "prompt": f"What of {i}?", "annotated": DOCUMENTS[i % 2], "tokens": 20, "chunks": 2 * (i % 2)}
        for i in range(30)
    ]
    data = folder / "annotated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SftConfig(
        data=data,
        out=folder / "out",
        model=str(folder / "base"),
        mix=Mix(token_budget=1500),
        batch_tokens=300,
        lora_rank=2,
        validation_rows=2,
    )
    train(config, str)
    return folder
