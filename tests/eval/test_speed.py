"""The speed measurement: its figures by hand, its records on disk, and the whole on the real model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pastalm.errors import DataError
from pastalm.eval import speed
from pastalm.lang import parse

RECORD = speed.SpeedRecord(
    id="a",
    chunks=4,
    largest_group=3,
    repeats=0,
    cut=1,
    malformed=False,
    tokens=120,
    steps=45,
    critical_path=50,
    seconds=2.0,
    text_tokens=90,
    finish_reason="stop",
    off_tokens=100,
    off_seconds=5.0,
    off_finish_reason="stop",
    tag_traces=0,
    matched_seconds=4.0,
    annotated="",
    off_text="",
)


def test_speedups_are_those_of_the_definitions() -> None:
    assert RECORD.speedups == {
        "theoretical": 100 / 50,
        "realized": 5.0 / 2.0,
        "text_ratio": 90 / 100,
        "theoretical_matched": 90 / 50,
        "realized_matched": 4.0 / 2.0,
        "realized_over_theoretical_matched": pytest.approx((4.0 / 2.0) / (90 / 50)),
    }


def test_the_summary_counts_and_takes_geometric_means() -> None:
    slow = replace(RECORD, id="b", chunks=0, cut=0, off_tokens=25, finish_reason="length")
    both = replace(slow, id="c", off_finish_reason="length")
    many = replace(RECORD, id="d", largest_group=16, repeats=1)
    off = replace(RECORD, id="e", off_finish_reason="length", tag_traces=2)
    table = speed.summary([RECORD, slow, both, many, off])
    assert table["prompts"] == 5
    assert table["forking (2 chunks or more)"] == 3 / 5
    assert table["at a cap of tokens or promises where tags off is not"] == 2
    assert table["the other way round"] == 1
    assert table["answers with a chunk cut at its budget"] == table["chunks cut at their budget"] == 3
    assert table["answers with a repeated topic"] == table["tag traces in tags-off text"] == 1
    mean = table["theoretical"]["geometric mean"]
    assert mean == pytest.approx(math.prod([2, 0.5, 0.5, 2, 2]) ** 0.2)
    assert table["theoretical"]["low"] < mean < table["theoretical"]["high"]
    assert f"| theoretical, geometric mean | {mean:.2f} (" in speed.markdown(table)


def test_groups_end_at_syncs_and_nested_ones_are_apart() -> None:
    text = (
        '<promise topic="a" tokens="10"/><async>x<promise topic="n" tokens="10"/><async>y</async></async>'
        '<promise topic="b" tokens="10"/><async>z</async><sync/>and'
        '<promise topic="a" tokens="10"/><async>w</async>'
    )
    assert sorted(speed._groups(parse(text))) == [["a"], ["a", "b"], ["n"]]


def test_records_are_read_again_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    target = tmp_path / "records.jsonl"
    assert speed.read_records(target) == []
    target.write_text(json.dumps(asdict(RECORD)) + "\n" + '{"id": "torn')
    assert speed.read_records(target) == [RECORD]
    assert target.read_text().endswith("}\n")


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    for name, said in (("none.jsonl", "cannot read"), ("bad.jsonl", "line 1: 'instruction' must be")):
        with pytest.raises(DataError, match=said):
            speed.read_prompts(tmp_path / name)


def test_a_run_on_the_embedded_model_goes_on_where_it_was(tmp_path: Path) -> None:
    from pastalm import LLM

    rows = ["Name three fruits.", "What is the capital of France?"]
    prompts, target = tmp_path / "prompts.jsonl", tmp_path / "out" / "records.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "instruction": t}) + "\n" for i, t in enumerate(rows)))
    llm = LLM(dtype="float32", max_num_seqs=1, max_model_len=512)
    said: list[str] = []
    first = speed.run(llm, prompts, target, max_tokens=60, limit=1, progress=said.append)
    both = speed.run(llm, prompts, target, max_tokens=60, progress=said.append)
    assert len(first) == 1 and len(said) == 2
    assert {r.id for r in both} == {"0", "1"} and speed.read_records(target) == both
    for record in both:
        assert record.tag_traces == 0 and not record.malformed
        assert min(record.seconds, record.off_seconds, record.matched_seconds) > 0
        assert record.text_tokens <= record.tokens + 1
        assert record.critical_path <= record.tokens
