"""Files of prompts for the runs: {id, prompt, source, licence} a line, drawn by a seed.

    python runs/rows.py ANSWERS.jsonl --licensed Apache-2.0    # prompts of rows under that licence, whole file
    python runs/rows.py EVAL.jsonl --all                       # instruction or prompt of every row
    python runs/rows.py EVAL.jsonl --references                # {id, reference}: output or response of every row
    python runs/rows.py PROMPTS.jsonl --draw 300 --seed 7      # that many of them, at random
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from pastalm import jsonl

LONGEST = 900
"""Characters of a prompt; longer ones leave no room for an answer in a small model's context."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--licensed")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--references", action="store_true")
    parser.add_argument("--draw", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rows = []
    for i, (_, row) in enumerate(jsonl.read(chosen.file)):
        identity = str(row.get("id", row.get("index", i)))
        prompt = row.get("prompt", row.get("instruction", ""))
        if chosen.references:
            found = next((row[k] for k in ("reference", "response", "output") if k in row), None)
            found = found or next(iter(row["outputs"].values()))
            rows.append({"id": identity, "reference": found})
        elif chosen.all or (len(prompt) <= LONGEST and (chosen.licensed or "") in row.get("licence", "")):
            licence = chosen.licensed or row.get("licence", "")
            rows.append({"id": identity, "prompt": prompt, "source": row.get("source", ""), "licence": licence})
    if chosen.draw is not None:
        rows = random.Random(chosen.seed).sample(rows, min(chosen.draw, len(rows)))
    for found in rows:
        print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
