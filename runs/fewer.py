"""Keeps the sampled answers to each prompt that are likely to make a pair of stage 2, so that fewer need scores.

    python runs/fewer.py ANSWERS.jsonl LABELS.jsonl > FEWER.jsonl

Where one thread is right: two answers that do not fork and one that does; elsewhere the three that are the fastest for
their text, of those that ended, and the slowest. LABELS: {id, label} a line.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from pastalm.records import answers, labels
from pastalm.records.answers import Answer
from pastalm.records.repetition import retold


def main() -> None:
    file, marks = Path(sys.argv[1]), Path(sys.argv[2])
    rows = sorted(answers.read(file), key=lambda row: (row.id, row.choice))
    label_of = labels.read(marks, [row.id for row in rows])
    kept = set()
    for identity, group in groupby(rows, key=lambda row: row.id):
        own = list(group)
        chosen = _one_thread(own) if label_of.get(identity) == "one" else _fastest(own)
        kept |= {(row.id, row.choice) for row in chosen}
    with file.open() as lines:
        for line in lines:
            row = json.loads(line)
            if "pasta" in row or (row["id"], row["choice"]) in kept:
                print(line, end="")


def _one_thread(rows: list[Answer]) -> list[Answer]:
    """The ended ones first."""
    ordered = sorted(rows, key=lambda row: row.finish_reason != "stop")
    return [row for row in ordered if not row.chunks][:2] + [row for row in ordered if row.chunks][:1]


def _fastest(rows: list[Answer]) -> list[Answer]:
    """First those whose chunks say nothing again that a sibling said."""
    by_speed = sorted(rows, key=lambda row: (retold(row.chunks) > 0, -len(row.text) / row.critical_path))
    ended = [row for row in by_speed if row.finish_reason == "stop"][:3]
    return ended + [row for row in by_speed if row not in ended][-1:]


if __name__ == "__main__":
    main()
