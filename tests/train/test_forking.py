"""Stage 3: the loss is over the decision to fork alone, and a run learns where to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pastalm.core.language import round_length
from pastalm.errors import DataError, RequestError
from pastalm.records.answers import Answer
from pastalm.records.documents import Document, parse
from pastalm.records.labels import Label
from pastalm.train import run
from pastalm.train.dataset import collate
from pastalm.train.forking import ForkConfig, anchors, collated, decision, decisions, train
from pastalm.train.loss import fork_losses, masks
from pastalm.train.packing import IGNORED, pack
from tests.laws.tiny import EOS, TAGS, tiny_model, tiny_vocabulary
from tests.strategies import documents
from tests.train.documents import DOCUMENTS
from tests.train.resuming import assert_resumes

VOCABULARY = tiny_vocabulary()
PROMPT = [40, 41, 42]
PLAIN, FORKING = parse(DOCUMENTS[0]), parse(DOCUMENTS[1])


@given(documents(2, st.sampled_from(["a b", "c\n", "x"]), size=3))
def test_only_the_decisions_are_in_the_loss(document: Document) -> None:
    """All promises of an answer, or the first places of one without any, which ends there."""
    whole = pack(PROMPT, document, VOCABULARY, "promised", eos=EOS)
    before = whole.labels.copy()
    promises = np.flatnonzero(whole.input_ids == TAGS.promise)
    decided = decision(whole, "should" if len(promises) else "one", VOCABULARY, 4)
    assert np.array_equal(before, whole.labels), "the answer itself is as it was"
    n = len(decided)
    assert np.array_equal(decided.input_ids, whole.input_ids[:n])
    assert np.array_equal(decided.visible, whole.visible[:n, :n])
    labelled = np.flatnonzero(decided.labels != IGNORED)
    assert set(decided.labels[labelled]) == {TAGS.promise}
    if len(promises):
        assert labelled.tolist() == promises.tolist() and n == len(whole)
    else:
        assert labelled.tolist() == list(range(len(PROMPT), min(len(PROMPT) + 4, len(whole)))) and labelled[-1] == n - 1


@settings(max_examples=10)
@given(st.lists(st.tuples(st.booleans(), st.floats(0.1, 10)), min_size=1, max_size=3))
def test_the_loss_is_the_equation(rows: list[tuple[bool, float]]) -> None:
    model = tiny_model("llama")
    packed = [
        decision(pack(PROMPT, FORKING if forks else PLAIN, VOCABULARY, eos=EOS), kind, VOCABULARY, 4)
        for forks, _ in rows
        for kind in (("should" if forks else "one"),)
    ]
    inputs = collate(packed, unlikely=[not forks for forks, _ in rows])
    losses = fork_losses(model, inputs | {"weights": torch.tensor([weight for _, weight in rows])})
    for (forks, weight), row, loss in zip(rows, packed, losses.tolist(), strict=True):
        alone = {name: value for name, value in collate([row]).items() if name not in ("labels", "unlikely")}
        logits = model(**alone | {"attention_mask": masks(model, alone)}).logits
        p = torch.softmax(logits[0], -1)[:, TAGS.promise][np.flatnonzero(row.labels != IGNORED) - 1]
        expected = -weight * (p.log().sum() if forks else (1 - p).log().sum())
        assert loss == pytest.approx(float(expected), rel=1e-6)


# ------------------------------------------------------------------------------ a run


@pytest.fixture
def config(start: Path, tmp_path: Path) -> ForkConfig:
    """Prompts that tell by their beginning whether they should fork, two answers to each, in one thread and forking."""
    asked: dict[str, tuple[str, Label]] = {
        f"{kind}{i}": (f"{kind * 4} {i}", label)
        for kind, label in (("a", "one"), ("z", "should"), ("m", "may"))
        for i in range(24)
    }
    data, labels = tmp_path / "answers.jsonl", tmp_path / "labels.jsonl"
    rows = [answer(i, prompt, text) for i, (prompt, _) in asked.items() for text in DOCUMENTS[:2]]
    data.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    labels.write_text("".join(json.dumps({"id": i, "label": label}) + "\n" for i, (_, label) in asked.items()))
    return ForkConfig(
        data=data,
        labels=labels,
        out=tmp_path / "out",
        model=str(start / "base"),
        start=start / "out" / "adapter",
        learning_rate=1e-2,
        row_learning_rate=1e-2,
        batch_tokens=300,
        epochs=20,
        validation_prompts=12,
        save_steps=20,
        window=6,
        fork_weight=2.0,
    )


def answer(identity: str, prompt: str, annotated: str) -> Answer:
    return Answer(
        id=identity,
        prompt=prompt,
        choice=int("<async>" in annotated),
        annotated=annotated,
        tokens=20,
        critical_path=20,
        finish_reason="stop",
        source="made up",
        licence="CC0",
    )


def test_a_run_learns_where_to_fork(config: ForkConfig) -> None:
    said: list[str] = []
    folder = train(config, said.append)
    record = json.loads((folder / "train.json").read_text())
    assert record["stage"] == "stage 3, when to fork"
    assert record["data"]["kinds"].keys() == {"one", "should"} and record["data"]["rows"] < 48
    assert record["final"]["forks_one"] < 0.2 and record["final"]["forks_should"] > 0.8
    card = (folder / "README.md").read_text()
    assert "labelled `should`" in card and "Goes on from stage 1: " in card
    logged = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert any("forks_one" in entry for entry in logged)


@pytest.mark.parametrize("eager", [False, True])
def test_only_answers_that_do_what_their_label_says_are_taken(config: ForkConfig, eager: bool) -> None:
    """The decision of each, and of anchors the whole, whatever they do."""
    config = replace(config, eager=eager)
    base = run.begin(config, str)
    rows = [answer(label, "say it", text) for label in ("one", "may", "should") for text in DOCUMENTS[:2]]
    label_of: dict[str, Label] = {"one": "one", "may": "may", "should": "should"}
    taken = list(decisions(rows, label_of, base.tokenizer, base.vocabulary, config, eos=base.eos))
    forking = [bool((e.packed.input_ids == base.tags.promise).any()) for e in taken]
    assert [(e.id, e.kind, forks) for e, forks in zip(taken, forking, strict=True)] == [
        ("one", "one", False),
        *([("may", "should", True)] if eager else []),
        ("should", "should", True),
    ]
    taken += anchors(rows, base.tokenizer, base.vocabulary, config, eos=base.eos)
    assert [e.id for e in taken if e.kind == "anchor"] == [row.id for row in rows]
    for example, weight in zip(taken, collated(taken, config)["weights"].tolist(), strict=True):
        labelled = int((example.packed.labels != IGNORED).sum())
        of = {"one": 1.0, "should": config.fork_weight, "anchor": config.anchor_weight / labelled}
        assert weight == pytest.approx(of[example.kind])


def test_promises_say_how_long_their_chunks_are_if_asked(config: ForkConfig) -> None:
    """Those of decisions and of anchors."""
    base = run.begin(config, str)
    tags, encode = base.tags, base.vocabulary.encode
    promise = [tags.promise, *encode("a"), tags.tokens, *encode("90"), tags.promise_end]
    chunk = [tags.async_open, *encode("1. One is said.\n"), tags.async_close]
    row = replace(
        answer("should", "say it", '<promise topic="a" tokens="90"/><async>1. One is said.\n</async>'),
        token_ids=(*promise, *chunk, base.eos),
    )
    said = round_length(len(chunk) - 2)
    assert said != 90, "a chunk of 90 tokens would show nothing"
    for true, number in ((False, "90"), (True, str(said))):
        told = replace(config, true_lengths=true)
        taken = [
            *decisions([row], {"should": "should"}, base.tokenizer, base.vocabulary, told, eos=base.eos),
            *anchors([row], base.tokenizer, base.vocabulary, told, eos=base.eos),
        ]
        assert [example.kind for example in taken] == ["should", "anchor"]
        for example in taken:
            ids = example.packed.input_ids.tolist()
            place = ids.index(tags.tokens)
            assert ids[place + 1 : ids.index(tags.promise_end)] == encode(number)


def test_anchors_keep_the_rest_of_the_model(config: ForkConfig) -> None:
    """Held-out answers of the same kind are likelier than where nothing but the decision counts."""
    losses = []
    for weight in (1e-6, 4.0):
        out = config.out / str(weight)
        folder = train(replace(config, anchors=config.data, anchor_weight=weight, out=out, epochs=4), str)
        losses.append(json.loads((folder / "train.json").read_text())["final"]["own_tokens"])
    assert losses[1] < losses[0]


def test_the_rows_of_the_tags_stay_as_they_are(config: ForkConfig) -> None:
    assert config.start is not None
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (config.start, train(replace(config, row_learning_rate=0.0, epochs=1), str))
    )
    rows = [name for name in before if "token" in name]
    assert rows and all(torch.equal(before[name], after[name]) for name in rows)
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() - set(rows))


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(
    config: ForkConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes(train, replace(config, epochs=2, save_steps=2), tmp_path / "again", monkeypatch)


def test_what_cannot_be_trained_on_is_one_clear_line(config: ForkConfig, tmp_path: Path) -> None:
    def refused(error: type[Exception], said: str, **changes: Any) -> None:
        with pytest.raises(error, match=said) as caught:
            train(replace(config, **changes), str)
        assert "\n" not in str(caught.value)

    def kept(name: str, which: Callable[[dict[str, Any]], bool]) -> Path:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(
            "".join(line + "\n" for line in config.data.read_text().splitlines() if which(json.loads(line)))
        )
        return file

    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"id": "elsewhere", "label": "one"}\n')
    refused(DataError, "make them with pasta sample", data=tmp_path / "none.jsonl")
    refused(DataError, "labels none of these prompts", labels=strange)
    refused(RequestError, "give --start", start=None)
    refused(RequestError, "window must be", window=0)
    refused(RequestError, "anchor_weight 0 or more", anchor_weight=-1.0)
    refused(DataError, "make them with pasta sample", anchors=tmp_path / "none.jsonl")
    forks = kept("forks", lambda row: "<async>" in row["annotated"])
    none = kept("none", lambda row: "<async>" not in row["annotated"])
    refused(DataError, "no answers to prompts labelled 'one' that do not fork", data=forks, out=tmp_path / "o1")
    refused(DataError, "no answers to prompts labelled 'should' that fork", data=none, out=tmp_path / "o2")
    refused(DataError, "all prompts are held out", validation_prompts=1000, out=tmp_path / "o3")
