"""Scoring files of answers: every verdict is kept, what is missing is counted and asked about again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from pastalm.errors import DataError, RemoteError
from pastalm.eval.quality import Candidate, Judge, Verdict
from pastalm.eval.score import score
from pastalm.records import scores
from pastalm.records.answers import Answer
from pastalm.records.chat_client import ChatClient
from tests.served import Reply, completion, replaying

PROMPTS = 80


def answers(path: Path, word: str, *, of: int = PROMPTS) -> Path:
    rows = [
        Answer(id=str(i), prompt=f"p{i}", annotated=f"{word} {i}", tokens=3, critical_path=3, finish_reason="stop")
        for i in range(of)
    ]
    path.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    return path


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    return answers(tmp_path / "a.jsonl", "gold"), answers(tmp_path / "b.jsonl", "iron"), tmp_path / "out.jsonl"


def test_a_judge_that_fails_half_the_time_costs_no_verdict(files: tuple[Path, Path, Path]) -> None:
    """It fails, keeps silent or talks nonsense on half of the prompts, then recovers."""
    sick = True

    def answer(body: dict[str, Any]) -> Reply:
        text = body["messages"][-1]["content"]
        number = int(text.split("# Instruction\np")[1].split("\n")[0])
        if sick and number % 6 == 1:
            return 500, {}, {"error": {"message": "overloaded"}}
        if sick and number % 6 == 3:
            time.sleep(5)
        if sick and number % 6 == 5:
            return completion("As a language model")
        return completion("M" if "gold" in text.split("# Answer M")[1] else "m")

    samples, baseline, target = files
    with replaying(answer) as url:
        judge = Judge(ChatClient(url, "m", retries=0, timeout=2.5, patience=60, concurrency=16))
        counts = score(samples, baseline, target, judge, words)
        assert {row.id for row in scores.read(target)} == {str(i) for i in range(0, PROMPTS, 2)}
        assert counts.written == PROMPTS / 2
        assert sum(counts.unscored.values()) == PROMPTS / 2 and len(counts.unscored) == 3
        sick = False
        counts = score(samples, baseline, target, judge, words)
    assert (counts.skipped, counts.written, counts.unscored) == (PROMPTS / 2, PROMPTS / 2, {})
    rows = scores.read(target)
    assert len({row.id for row in rows}) == len(rows) == PROMPTS
    assert all(row.win == 1 for row in rows)


def test_a_judge_that_dies_ends_the_run_with_what_was_judged(files: tuple[Path, Path, Path]) -> None:
    asked = 0

    def answer(body: dict[str, Any]) -> Reply:
        nonlocal asked
        asked += 1
        return completion("M") if asked <= 130 else (503, {}, {"error": {"message": "gone"}})

    samples, baseline, target = files
    with replaying(answer) as url:
        judge = Judge(ChatClient(url, "m", retries=0, concurrency=1))
        with pytest.raises(RemoteError, match="answers 503.*gone.*run again to resume"):
            score(samples, baseline, target, judge, words)
    assert len(scores.read(target)) == 64


def test_a_baseline_that_lacks_a_prompt_is_said(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    samples, _, target = files
    short = answers(tmp_path / "short.jsonl", "iron", of=10)
    with pytest.raises(DataError, match="has no answer to prompt '10'"):
        score(samples, short, target, Judge(ChatClient("http://127.0.0.1:1/v1", "m")), words)


class Even:
    """Everything is as good as the baseline."""

    name = "pmi"

    def compare(self, candidates: list[Candidate]) -> list[Verdict]:
        return [Verdict(difference=0.0) for _ in candidates]


def test_a_score_knows_whether_the_sequential_answer_is_made_of_parts(tmp_path: Path) -> None:
    item = "needs a sentence or two of its own, as do all those that stand in this list"
    listed = "".join(f"- Number {n} {item}.\n" for n in range(3))
    samples, baseline = answers(tmp_path / "a.jsonl", "gold", of=2), answers(tmp_path / "b.jsonl", listed, of=2)
    score(samples, baseline, tmp_path / "by_baseline.jsonl", Even(), words)
    assert [row.asked for row in scores.read(tmp_path / "by_baseline.jsonl")] == [True, True]
    references = tmp_path / "references.jsonl"
    references.write_text(json.dumps({"id": "0", "reference": "One thing."}) + "\n")
    score(samples, baseline, tmp_path / "by_reference.jsonl", Even(), words, references=references)
    assert {row.id: row.asked for row in scores.read(tmp_path / "by_reference.jsonl")} == {"0": False, "1": True}


def test_a_label_says_what_a_prompt_asks_for_before_any_sequential_answer(tmp_path: Path) -> None:
    item = "needs a sentence or two of its own, as do all those that stand in this list"
    listed = "".join(f"- Number {n} {item}.\n" for n in range(3))
    samples, baseline = answers(tmp_path / "a.jsonl", "gold", of=4), answers(tmp_path / "b.jsonl", listed, of=4)
    labels = tmp_path / "labels.jsonl"
    rows = [{"id": "0", "label": "one"}, {"id": "1", "label": "may"}, {"id": "2", "label": "should"}]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score(samples, baseline, tmp_path / "s.jsonl", Even(), words, labels=labels)
    assert [row.asked for row in scores.read(tmp_path / "s.jsonl")] == [False, True, True, True]
    labels.write_text("".join(json.dumps({**row, "label": "one"}) + "\n" for row in rows))
    with pytest.raises(DataError, match="has changed"):
        score(samples, baseline, tmp_path / "s.jsonl", Even(), words, labels=labels)
