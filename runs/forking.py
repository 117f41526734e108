"""What share of a run's answers forks, by what their prompts ask for.

    python runs/forking.py results/frontier/figures.json
    python runs/forking.py FIGURES --labels LABELS.jsonl      # {id, label} a line, as of `pasta eval --labels`

FIGURES: `figures.json` of `pasta eval`, whatever options it was made with. A line a system; means with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pastalm.eval.intervals import mean
from pastalm.records import labels

MARKS = Path(__file__).parent / "marks" / "alpaca_eval_dev_forking.jsonl"


def table(figures: Path, marks: Path) -> str:
    """A Markdown table. figures: `figures.json`. marks: the labels."""
    lines = [f"| system | {' | '.join(f'forks, {label}' for label in labels.LABELS)} |"]
    lines.append("| --- " * (len(labels.LABELS) + 1) + "|")
    for name, system in json.loads(figures.read_text())["systems"].items():
        chunks = {prompt["id"]: prompt["chunks"] for prompt in system["prompts"]}
        known = labels.read(marks, chunks)
        forks = ([chunks[i] >= 2 for i, own in known.items() if own == label] for label in labels.LABELS)
        lines.append(f"| {name} | {' | '.join(str(mean(own)) if own else '' for own in forks)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--labels", type=Path, default=MARKS)
    chosen = parser.parse_args()
    print(table(chosen.figures, chosen.labels))


if __name__ == "__main__":
    main()
