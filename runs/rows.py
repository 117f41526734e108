"""Files of prompts for the runs: {id, prompt, source, licence} a line.

python runs/rows.py ANSWERS.jsonl --licensed Apache-2.0    # prompts of rows under that licence
python runs/rows.py PROMPTS.jsonl --draw 300 --seed 7      # so many prompts, at random
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from pastalm.records import prompts

LONGEST = 900
"""Maximum number of characters of a prompt; longer ones leave too little of a small model's context for an answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--licensed")
    parser.add_argument("--draw", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    wanted = chosen.licensed or ""
    rows = [p for p in prompts.read(chosen.file) if len(p.text) <= LONGEST and wanted in p.licence]
    if chosen.draw is not None:
        rows = random.Random(chosen.seed).sample(rows, min(chosen.draw, len(rows)))
    for p in rows:
        row = {"id": p.id, "prompt": p.text, "source": p.source, "licence": chosen.licensed or p.licence}
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
