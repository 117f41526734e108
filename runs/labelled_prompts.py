"""Prompts of a file that are labelled, for the rounds of stage 2: every N-th one that forks, or may, and of the others
every N-th too, up to a number.

    python runs/labelled_prompts.py ANSWERS.jsonl LABELS.jsonl --part 1 --of 2 --one 90
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from pastalm.records import labels, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--one", type=int, help="prompts whose answer is one thread, at most")
    parser.add_argument("--only", choices=labels.LABELS, help="prompts of this label")
    chosen = parser.parse_args()
    prompt_of = {p.id: p for p in prompts.read(chosen.file)}
    label_of = labels.read(chosen.labels, prompt_of)
    # in the order of the labels, which is a random one
    marked = [json.loads(line)["id"] for line in chosen.labels.open()]
    forking = [i for i in marked if i in label_of and label_of[i] != "one"]
    others = [i for i in marked if i in label_of and label_of[i] == "one"]
    ids = forking[chosen.part - 1 :: chosen.of] + others[chosen.part - 1 :: chosen.of][: chosen.one]
    ids = [i for i in ids if chosen.only in (None, label_of[i])]
    random.Random(chosen.part - 1).shuffle(ids)
    for p in (prompt_of[i] for i in ids):
        print(json.dumps({"id": p.id, "prompt": p.text, "source": p.source, "licence": p.licence}))


if __name__ == "__main__":
    main()
