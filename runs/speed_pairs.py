"""The scored answers that teach to answer faster by forking: of each prompt the better and the worse one of its pair,
for the pairs that differ most in speed.

    python runs/speed_pairs.py SCORED.jsonl --pairs 170 > PAIRS.jsonl

Pairs as `pasta train prefer` chooses them. A pair is left out whose better answer does not fork, repeats more than an
eighth of its 4-grams or is of a quality below 0.4, and one whose answers are too long to be worth their training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fork_pairs import REPEATED, write

from pastalm.records import scores
from pastalm.records.scores import Scored
from pastalm.train.preference import choose

POOR = 0.4
LONGEST_BETTER, LONGEST_WORSE = 380, 450
"""Tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scored", type=Path)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=170)
    chosen = parser.parse_args()
    rows = scores.read(chosen.scored)
    kept = furthest(rows, chosen.lambda_, chosen.pairs)
    write([chosen.scored], lambda row: (row["id"], row["choice"]) in kept)


def furthest(rows: list[Scored], lambda_: float, count: int) -> set[tuple[str, int]]:
    """(id, choice) of the answers of so many pairs."""
    sigma = scores.spread(rows)

    def good(better: Scored, worse: Scored) -> bool:
        quality = better.quality(sigma)
        return (
            "<promise" in better.annotated
            and better.repetition <= REPEATED
            and quality is not None
            and quality >= POOR
            and better.tokens <= LONGEST_BETTER
            and worse.tokens <= LONGEST_WORSE
        )

    pairs = [(better, worse) for better, worse, _ in choose(rows, lambda_, sigma, "matched") if good(better, worse)]
    pairs.sort(key=lambda pair: pair[1].speedup("matched") - pair[0].speedup("matched"))
    return {(answer.id, answer.choice) for pair in pairs[:count] for answer in pair}


if __name__ == "__main__":
    main()
