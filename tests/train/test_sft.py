"""The loss of a packed response is what its threads' tokens cost one by one; training for real, tiny."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pastalm.errors import DataError
from pastalm.lang import Async, AsyncOpen, Document, Promise, Sync, Text, linearize
from pastalm.layout import IGNORED, pack, pack_serial
from pastalm.train.dataset import collate, read_annotated
from pastalm.train.sft import weighted_loss
from tests.laws.tiny import EOS, TAGS, tiny_model, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
PROMPT = [40, 41, 42]
DOCUMENT: Document = (
    Text("Two tips.\n"),
    Promise("sleep", 20),
    Async((Text("1. Sleep eight hours.\n"),)),
    Promise("food", 30),
    Async((Text("2. Eat "), Promise("greens", 10), Async((Text("greens"),)), Text("\n"))),
    Sync(),
    Text("Both take practice."),
)


def losses(model: Any, packed: Any) -> tuple[float, int]:
    with torch.no_grad():
        _, each, _ = weighted_loss(model, collate([packed]), TAGS, 1.0)
    return float(each.double().sum()), len(each)


def test_serial_rows_cost_what_an_ordinary_causal_model_gives_them() -> None:
    model = tiny_model("llama")
    for row in pack_serial(PROMPT, DOCUMENT, VOCABULARY, eos=EOS):
        with torch.no_grad():
            logits = model(torch.from_numpy(row.input_ids)[None]).logits[0].log_softmax(-1)
        expected = -sum(
            float(logits[i - 1, label])
            for i, label in enumerate(row.labels.tolist())
            if label != IGNORED
        )
        total, _ = losses(model, row)
        assert math.isclose(total, expected, rel_tol=1e-5)


@pytest.mark.parametrize("policy", ["promised", "overlap"])
def test_every_token_but_the_forced_ones_is_labelled_once(policy: Any) -> None:
    packed = pack(PROMPT, DOCUMENT, VOCABULARY, policy, eos=EOS)
    forced = sum(isinstance(mark, AsyncOpen) for mark in linearize(DOCUMENT))
    labelled = int((packed.labels != IGNORED).sum())
    assert labelled == len(packed) - len(PROMPT) - forced
    serial = pack_serial(PROMPT, DOCUMENT, VOCABULARY, eos=EOS)
    assert sum(int((row.labels != IGNORED).sum()) for row in serial) == labelled


def test_a_chunk_costs_the_same_whatever_its_sibling_says() -> None:
    model = tiny_model("qwen3")
    other = list(DOCUMENT)
    other[2] = Async((Text("1. Rest when tired!!\n"),))

    def chunk_loss(document: Document) -> float:
        packed = pack(PROMPT, document, VOCABULARY, "promised", eos=EOS)
        batch = collate([packed])
        own = torch.tensor([path == (1,) for path in packed.paths])
        batch["labels"][0, ~own] = IGNORED
        with torch.no_grad():
            _, each, _ = weighted_loss(model, batch, TAGS, 1.0)
        return float(each.sum())

    assert math.isclose(chunk_loss(DOCUMENT), chunk_loss(tuple(other)), rel_tol=1e-6)


def test_padding_changes_nothing() -> None:
    model = tiny_model("llama")
    one = pack(PROMPT, DOCUMENT, VOCABULARY, "promised", eos=EOS)
    two = pack(PROMPT, (Text("short"),), VOCABULARY, "promised", eos=EOS)
    with torch.no_grad():
        _, together, _ = weighted_loss(model, collate([one, two]), TAGS, 1.0)
    apart = losses(model, one)[0] + losses(model, two)[0]
    assert math.isclose(float(together.double().sum()), apart, rel_tol=1e-5)


def test_unreadable_annotations_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match="cannot read"):
        read_annotated(path)
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_annotated(path)
    fine = {"id": "1", "prompt": "p", "annotated": "x", "tokens": 9, "chunks": 0}
    broken = {**fine, "annotated": "<async>x"}
    path.write_text(json.dumps(fine) + "\n" + json.dumps(broken) + "\n")
    with pytest.raises(DataError, match=r"line 2.*annotate it again"):
        read_annotated(path)
