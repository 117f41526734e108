"""The scored answers that teach an adapter when to fork: of each prompt the better and the worse one of its pair.

    python runs/fork_pairs.py SCORED.jsonl MORE.jsonl --labels LABELS.jsonl --sigma 0.12 --pairs 300 > PAIRS.jsonl

Pairs as `pasta train prefer` chooses them, drawn at random: where one thread is right those in which the worse answer
forks, all where an answer should fork, and where it may at most one in eight. An answer in one thread that repeats more
than an eighth of its 4-grams is not a better one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pastalm.records import jsonl, labels, scores
from pastalm.records.scores import Scored
from pastalm.train.preference import choose

REPEATED = 0.125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=10**6)
    parser.add_argument("--seed", type=int, default=3)
    chosen = parser.parse_args()
    rows = [row for file in chosen.files for row in scores.read(file)]
    label_of = labels.read(chosen.labels, [row.id for row in rows])
    kept = drawn(rows, label_of, chosen)
    write(chosen.files, lambda row: (row["id"], row["annotated"]) in kept)


def write(files: list[Path], kept: Callable[[Mapping[str, Any]], bool]) -> None:
    """The rows of some files of `pasta score` that are kept, behind the line that says what scored them."""
    sys.stdout.write(files[0].open().readline())
    for file in files:
        for _, row in jsonl.read(file):
            if kept(row):
                print(json.dumps(row, ensure_ascii=False))


def drawn(rows: list[Scored], label_of: dict[str, str], chosen: argparse.Namespace) -> set[tuple[str, str]]:
    """(id, text with its tags) of the answers that make pairs."""
    usable = [row for row in rows if "<promise" in row.annotated or row.repetition <= REPEATED]
    pairs = list(choose(usable, chosen.lambda_, chosen.sigma, "smaller"))
    random.Random(chosen.seed).shuffle(pairs)
    of_label = defaultdict(list)
    for better, worse, _ in pairs:
        label = label_of.get(better.id, "may")
        if label != "one" or worse.unasked:
            of_label[label].append((better, worse))
    of_label["may"] = of_label["may"][: len(of_label["one"] + of_label["should"]) // 8]
    taken = [pair for own in of_label.values() for pair in own]
    random.Random(chosen.seed).shuffle(taken)
    return {(answer.id, answer.annotated) for pair in taken[: chosen.pairs] for answer in pair}


if __name__ == "__main__":
    main()
