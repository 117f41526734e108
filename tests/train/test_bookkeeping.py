"""Whose folder it is: another adapter, other data of the same name, and what was computed for others is not taken."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pastalm.core.language import Text
from pastalm.errors import DataError
from pastalm.models import checkpoints
from pastalm.records.documents import parse
from pastalm.train import bookkeeping, run
from pastalm.train.dataset import Mix
from pastalm.train.packing import pack
from pastalm.train.preference import PreferenceConfig
from pastalm.train.run import RunConfig
from pastalm.train.sft import SftConfig
from tests.laws.tiny import EOS, tiny_vocabulary
from tests.test_models import BYTE_LEVEL, small_model

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def config(tmp_path: Path) -> SftConfig:
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, tmp_path / "base")
    for name in ("first", "second"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter" / "adapter_model.safetensors").write_bytes(name.encode().ljust(9))
    (tmp_path / "data.jsonl").write_text('{"id": 1}\n')
    return SftConfig(
        data=tmp_path / "data.jsonl",
        out=tmp_path / "out",
        model=str(tmp_path / "base"),
        start=tmp_path / "first" / "adapter",
        mix=Mix(positions={"promised": 0.65, "overlap": 0.35}),
    )


def refused(config: RunConfig, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        bookkeeping.claim(config)
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_a_run_is_what_is_asked_of_it_by_contents(config: SftConfig, tmp_path: Path) -> None:
    bookkeeping.claim(config)
    before = (config.out / "config.json").read_text()
    assert str(tmp_path) not in before
    bookkeeping.claim(config)
    moved = tmp_path / "moved"  # what lies elsewhere is what it was
    for name in ("first", "base"):
        shutil.copytree(tmp_path / name, moved / name)
    shutil.copy(tmp_path / "data.jsonl", moved)
    bookkeeping.claim(
        replace(config, start=moved / "first" / "adapter", data=moved / "data.jsonl", model=str(moved / "base"))
    )
    refused(
        replace(config, start=tmp_path / "second" / "adapter"), "start is first (", "asked for second (", "--overwrite"
    )
    refused(replace(config, start=None), "start is first (", "asked for none")
    refused(replace(config, learning_rate=1e-3), "other settings", "learning_rate is 0.0005, asked for 0.001")
    refused(replace(config, mix=replace(config.mix, seed=3)), "mix is")
    (tmp_path / "data.jsonl").write_text('{"id": 2}\n')
    refused(config, "data is data.jsonl (", "asked for data.jsonl (")
    assert (config.out / "config.json").read_text() == before


def left(config: RunConfig) -> set[str]:
    return {str(path.relative_to(config.out)) for path in config.out.rglob("*") if path.is_file()}


def test_overwriting_leaves_nothing_of_the_run_before(config: SftConfig, tmp_path: Path) -> None:
    """Else the next start would go on from the checkpoint of a run that had come further."""
    bookkeeping.claim(config)
    for name in ("checkpoint-40/trainer_state.json", "adapter/README.md", "log.jsonl", "reference.jsonl", "notes.txt"):
        (config.out / name).parent.mkdir(exist_ok=True)
        (config.out / name).write_text('{"a": 1}')
    assert bookkeeping.newest(config.out) == config.out / "checkpoint-40"
    other = replace(config, start=tmp_path / "second" / "adapter", overwrite=True)
    bookkeeping.claim(other)
    assert left(other) == {"config.json", "notes.txt"}
    bookkeeping.claim(replace(other, overwrite=False))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_left_is_left_alone(config: SftConfig, overwrite: bool) -> None:
    (config.out / "adapter").mkdir(parents=True)
    (config.out / "adapter" / "mine").write_text("x")
    refused(replace(config, overwrite=overwrite), "has adapter but no config.json", "another --out")
    assert left(config) == {"adapter/mine"}


def test_a_configuration_that_is_not_whole_is_said(config: SftConfig) -> None:
    bookkeeping.claim(config)
    (config.out / "config.json").write_text('{"da')
    refused(config, "is damaged", "--overwrite")
    bookkeeping.claim(replace(config, overwrite=True))
    (config.out / "config.json").write_text("[1]")
    refused(config, "other settings")


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_from(tmp_path: Path) -> None:
    for step, state in ((8, '{"global_step": 8}'), (12, '{"global_st'), (16, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert bookkeeping.newest(tmp_path) == tmp_path / "checkpoint-8"


def test_a_log_is_cut_where_the_checkpoint_is(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert bookkeeping.cut(log, 0) == []
    log.write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 6, "lo')
    assert [entry["step"] for entry in bookkeeping.cut(log, 3)] == [2]
    assert log.read_text() == '{"step": 2, "loss": 1}\n'


# ------------------------------------------------------------------------------ log-probabilities before training


@pytest.fixture
def stage2(config: SftConfig) -> PreferenceConfig:
    return PreferenceConfig(data=config.data, out=config.out, model=config.model, start=config.start)


def test_numbers_are_kept_by_what_they_are_of_and_under_which_model(stage2: PreferenceConfig, tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def compute(batch: Any) -> list[list[float]]:
        asked.append(list(batch))
        return [[1.0 + i, 0.1] for i in batch]

    def numbers(config: PreferenceConfig, keys: str) -> list[list[float]]:
        asked.clear()
        plan = [list(range(len(keys)))[i : i + 2] for i in range(0, len(keys), 2)]
        return bookkeeping.remembered(config, list(keys), plan, compute, lambda _: None)

    wanted = [[1.0 + i, 0.1] for i in range(4)]
    assert numbers(stage2, "abcd") == wanted and asked == [[0, 1], [2, 3]]
    assert numbers(stage2, "abcd") == wanted and asked == []
    path = stage2.out / "reference.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # the last was cut: it is computed in the company that it had
    assert numbers(stage2, "abcd") == wanted and asked == [[2, 3]]
    assert path.read_bytes() == whole
    assert numbers(stage2, "abcx")[3] == wanted[3] and asked == [[2, 3]]
    other = replace(stage2, start=tmp_path / "second" / "adapter")
    with pytest.raises(DataError, match=r"start is first \(.*asked for second \("):
        numbers(other, "abcd")


def test_a_pair_is_known_by_its_tokens_positions_and_mask() -> None:
    vocabulary = tiny_vocabulary()
    forked = parse("".join(f'<promise topic="{t}" tokens="10"/><async>{t}{t}</async>' for t in "ab"))
    packed = [
        pack(prompt, document, vocabulary, policy, eos=eos)  # type: ignore[arg-type]
        for prompt in ([40, 41], [40, 42])
        for document in (forked, (Text("one"),))
        for policy in ("promised", "overlap")
        for eos in (EOS, None)
    ]
    found = {bookkeeping.digest(one) for one in packed}
    assert len(found) == len(packed) - 4, "without chunks both policies are the same"
    assert bookkeeping.digest(packed[0]) == bookkeeping.digest(pack([40, 41], forked, vocabulary, "promised", eos=EOS))
    assert np.array_equal(packed[0].input_ids, packed[2].input_ids), "of the same tokens, positions tell them apart"
    assert bookkeeping.digest(packed[0], packed[1]) != bookkeeping.digest(packed[1], packed[0])


def test_logs_are_read_as_json(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + "\nx\n")
    assert bookkeeping.entries(tmp_path / "log.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("lost", ["picture", "validation"])
def test_what_a_kill_kept_from_following_a_checkpoint_follows(lost: str, config: SftConfig) -> None:
    """Between a checkpoint and the picture of its losses a run can be cut off."""

    def begun(step: int) -> bytes:
        log = run.Log(config, str, validate=lambda: {"validation_text": 2.5}, curves=("validation_text",))
        log.on_train_begin(None, SimpleNamespace(global_step=step, is_world_process_zero=True), None)
        return log.path.read_bytes()

    picture = config.out / "loss.png"
    config.out.mkdir()
    losses = '{"step": 2, "loss": 3}\n{"step": 4, "loss": 2}\n'
    validation = '{"step": 4, "validation_text": 2.5}\n'
    (config.out / "log.jsonl").write_text(losses + validation)
    run.plot(config.out / "log.jsonl", picture, ("validation_text",))
    whole = picture.read_bytes()
    kept = validation if lost == "picture" else ""
    (config.out / "log.jsonl").write_text(f'{losses}{kept}{{"step": 6, "loss": 1}}\n')
    picture.write_bytes(whole[:99])
    assert begun(4).decode() == losses + validation
    assert picture.read_bytes() == whole
