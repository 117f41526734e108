"""Prompts to which a model forked and should not, or did not and should: where stage 3 has most to teach.

    python runs/mistaken.py LABELS.jsonl ANSWERS.jsonl MORE.jsonl --only one > PROMPTS.jsonl

Prompts labelled `one` to which every answer forks, and `should` or `may` to which none does, for `pasta sample`. The
beginning of an answer mostly shows what it does.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from pastalm.records import answers, labels
from pastalm.records.answers import Answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--only", choices=labels.LABELS, nargs="+", default=labels.LABELS)
    parser.add_argument("--ended", action="store_true", help="a sequential answer that was cut off does not count")
    chosen = parser.parse_args()
    answers_to = defaultdict[str, list[Answer]](list)
    for file in chosen.files:
        for row in answers.read(file):
            answers_to[row.id].append(row)
    for identity, label in labels.read(chosen.labels, answers_to).items():
        rows = answers_to[identity]
        if label in chosen.only and not any(right(row, label, chosen.ended) for row in rows):
            first = rows[0]
            prompt = {"id": identity, "prompt": first.prompt, "source": first.source, "licence": first.licence}
            print(json.dumps(prompt))


def right(answer: Answer, label: labels.Label, ended: bool) -> bool:
    """Whether an answer does what its prompt's label says. `may` counts as `should`."""
    forks = "<promise" in answer.annotated
    if label != "one":
        return forks
    return not forks and (answer.finish_reason == "stop" or not ended)


if __name__ == "__main__":
    main()
