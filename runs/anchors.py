"""Answers to hold a model to in stage 3 (`pasta train fork --anchors`): of its own, those that are as they should be.

    python runs/anchors.py LABELS.jsonl ANSWERS.jsonl MORE.jsonl --gain 1.5 --one 300 > ANCHORS.jsonl

An answer is left out that was cut off, repeats more than an eighth of its 4-grams, does what its prompt's label does
not say, has a chunk that tells again what another one told, or forks for less than `--gain` times the tokens of its
critical path. Of several to one prompt the one stays that gains most.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fork_pairs import REPEATED

from pastalm.records import answers, jsonl, labels
from pastalm.records.answers import Answer
from pastalm.records.labels import Label
from pastalm.records.repetition import repetition, retold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--gain", type=float, default=1.0, help="tokens over critical path of an answer that forks")
    parser.add_argument("--one", type=int, default=10**6, help="answers in one thread, at most")
    chosen = parser.parse_args()
    rows = [(row, line) for file in chosen.files for row, line in read(file)]
    label_of = labels.read(chosen.labels, [row.id for row, _ in rows])
    rows = [(row, line) for row, line in rows if good(row, label_of.get(row.id), chosen.gain)]
    plain = [pair for pair in rows if not pair[0].chunks][: chosen.one]
    best: dict[str, tuple[Answer, str]] = {}
    for row, line in (*(pair for pair in rows if pair[0].chunks), *plain):
        if row.id not in best or gain(row) > gain(best[row.id][0]):
            best[row.id] = row, line
    sys.stdout.write(chosen.files[0].open().readline())  # what answered
    for _, line in best.values():
        print(line)


def read(file: Path) -> list[tuple[Answer, str]]:
    """The answers of a file, and each as its line has it."""
    lines = [json.dumps(line, ensure_ascii=False) for _, line in jsonl.read(file)]
    return list(zip(answers.read(file), lines, strict=True))


def gain(answer: Answer) -> float:
    return answer.tokens / answer.critical_path


def good(answer: Answer, label: Label | None, least: float) -> bool:
    """Whether an answer is as it should be. least: what one that forks should gain."""
    if label is None or answer.finish_reason != "stop" or repetition(answer.text) > REPEATED:
        return False
    if not answer.chunks:
        return label != "should"
    return label != "one" and not retold(answer.chunks) and gain(answer) >= least


if __name__ == "__main__":
    main()
