"""Draws the terminal view of a trace as an SVG: `python runs/terminal_svg.py TRACE TARGET [--at 0.6]`.

The trace comes from `pasta generate --trace`. --at: how far into the answer, 1 for its end.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console

from pastalm.events import from_json
from pastalm.view import View

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
    console.save_svg(str(chosen.target), title=chosen.title)


if __name__ == "__main__":
    main()
