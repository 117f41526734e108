"""Draws the terminal view of a trace as an SVG, which loads nothing from another host.

    pasta generate --trace answer.jsonl "Give me five tips for staying healthy, each with a short explanation."
    python examples/trace_to_picture.py answer.jsonl picture.svg --at 0.6

--at: how far into the answer, 1 for its end.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console

from pastalm.cli.view import View
from pastalm.records.traces import from_json

WIDTH, HEIGHT = 104, 34


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--at", type=float, default=1.0)
    parser.add_argument("--title", default="pasta generate")
    chosen = parser.parse_args()
    events = [from_json(line) for line in chosen.trace.read_text().splitlines()]
    view = View(chosen.title)
    for event in events:
        if event.time <= chosen.at * events[-1].time:
            view.apply(event)
    console = Console(record=True, width=WIDTH, height=HEIGHT, file=io.StringIO())
    done = view.transcript.finished
    console.print(view.final(WIDTH) if done else view.frame(console, WIDTH, HEIGHT))
    chosen.target.parent.mkdir(parents=True, exist_ok=True)
    picture = console.export_svg(title=chosen.title)
    chosen.target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
