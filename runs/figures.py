"""Writes the figures of `results/` into the documents.

    python runs/figures.py            # write them: `make figures`
    python runs/figures.py --check    # say what differs, and exit with 1

A document says where each figure comes from; what stands between the two comments is written by this program.

    <!-- figures: FILE / SYSTEM / FIGURE / FORM -->1.50 (1.43 to 1.56)<!-- /figures -->

FILE      results/FILE/figures.json, or results/FILE.json of that form (`systems`, each with `figures`), or
          results/FILE.md, a table with a line for each system
FIGURE    its name there
FORM      interval (if it is left out): mean and 95 % interval; bold: the same, the mean in bold; mean; n

    <!-- figures: table FILE / SYSTEM, SYSTEM / FIGURE; FIGURE as HEAD; FIGURE:mean -->

is a table of systems (`all`: those of the file) and figures, without columns that the file lacks; of `all`, empty
where a system lacks one. `forking FILE` is that of `forking.py`. The adapter that ships gets a table of
results/shipped at the end of its card.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pastalm.eval.intervals import Mean

sys.path.insert(0, str(Path(__file__).parent))

import forking

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/*.md",
    "*/README.md",
    "benchmarks/*.md",
    "adapters/*/README.md",
    "pastalm/adapters/*/README.md",
)
BLOCK = re.compile(r"(<!-- figures: (.+?) -->)(.*?)(<!-- /figures -->)", re.DOTALL)
CARD = "pastalm/adapters/smollm2-135m-instruct/README.md"
CARDS_BLOCK = (
    "<!-- figures: table shipped / baseline, shipped / forks; chunks:mean; theoretical; theoretical, matched; "
    "realized, matched; "
    "text against the baseline's:mean as text; quality, pmi; quality, reference; repetition:mean; cut off:mean; "
    "malformed:mean -->"
)
CARDS_HEAD = """
## Figures

Greedy answers to AlpacaEval prompts on the native engine with its default weights, against Baseline-SFT.
"""


class FigureError(Exception):
    """A block that names something that is not there."""


@dataclass(frozen=True)
class Cell:
    """One figure of a system. text: as a table has it. n: prompts."""

    text: str
    n: int

    def shown(self, form: str) -> str:
        mean, space, interval = self.text.partition(" ")
        forms = {"interval": self.text, "bold": f"**{mean}**{space}{interval}", "mean": mean, "n": str(self.n)}
        if form not in forms:
            raise FigureError(f"unknown form {form!r}: use {', '.join(forms)}")
        return forms[form]


Systems = Mapping[str, Mapping[str, Cell]]
"""Figures by system and name."""


@cache
def systems(file: str, root: Path = ROOT) -> Systems:
    """The figures of a file under results/. Raises FigureError."""
    folder = root / "results"
    for path in (folder / file / "figures.json", folder / f"{file}.json"):
        if path.is_file():
            by_name = json.loads(path.read_text(encoding="utf-8"))["systems"]
            return {
                name: {figure: Cell(str(Mean(**value)), value["n"]) for figure, value in system["figures"].items()}
                for name, system in by_name.items()
            }
    if (folder / file).suffix == ".md" and (folder / file).is_file():
        return _table_of((folder / file).read_text(encoding="utf-8"))
    raise FigureError(f"results/ has no {file}")


def _table_of(text: str) -> Systems:
    lines = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines() if " | " in line]
    head, _, *rows = lines
    table: dict[str, dict[str, Cell]] = {}
    for row in rows:
        if len(row) != len(head):
            break  # another table
        cells = dict(zip(head, row, strict=True))
        table[row[0]] = {name: Cell(cell, int(cells.get("prompts", "0"))) for name, cell in cells.items()}
    return table


def figure(file: str, system: str, name: str, root: Path = ROOT) -> Cell:
    """One figure. Raises FigureError."""
    known = systems(file, root)
    if system not in known:
        raise FigureError(f"{file} has no system {system!r}, only {', '.join(known)}")
    if name not in known[system]:
        raise FigureError(f"{file} has no {name!r} of {system}")
    return known[system][name]


def _one(words: str, root: Path) -> str:
    parts = [part.strip() for part in words.split(" / ")]
    if len(parts) not in (3, 4):
        raise FigureError(f"{words!r} is not FILE / SYSTEM / FIGURE / FORM")
    return figure(parts[0], parts[1], parts[2], root).shown(parts[3] if len(parts) == 4 else "interval")


def _table(words: str, root: Path) -> str:
    parts = [part.strip() for part in words.split(" / ")]
    if len(parts) != 3:
        raise FigureError(f"table {words!r} is not FILE / SYSTEM, SYSTEM / FIGURE; FIGURE")
    file, named, columns = parts
    known = systems(file, root)
    names = list(known) if named == "all" else named.split(", ")
    heads, cells = [], []
    for column in columns.split(";"):
        asked, _, head = column.strip().partition(" as ")
        name, _, form = asked.partition(":")
        if not any(name in known[system] for system in names if system in known):
            continue
        heads.append(head or name)
        cells.append((name, form or "interval"))
    lines = [f"| system | prompts | {' | '.join(heads)} |", "| --- " * (len(heads) + 2) + "|"]
    for system in names:
        prompts = figure(file, system, "forks", root).n
        row = (
            "" if named == "all" and name not in known[system] else figure(file, system, name, root).shown(form)
            for name, form in cells
        )
        lines.append(f"| {system} | {prompts} | {' | '.join(row)} |")
    return _block("\n".join(lines))


def _forking(words: str, root: Path) -> str:
    path = root / "results" / words / "figures.json"
    if not path.is_file():
        raise FigureError(f"results/ has no {words}")
    return _block(forking.table(path, forking.MARKS))


def _block(text: str) -> str:
    return f"\n{text}\n"


KINDS: Mapping[str, Callable[[str, Path], str]] = {"table": _table, "forking": _forking}


def written(words: str, root: Path = ROOT) -> str:
    """What a block says. words: what stands after `figures:`. Raises FigureError."""
    kind, _, rest = words.partition(" ")
    return KINDS[kind](rest, root) if kind in KINDS else _one(words, root)


def filled(text: str, root: Path = ROOT) -> str:
    """A document with its figures. Raises FigureError."""
    return BLOCK.sub(lambda found: found[1] + written(found[2], root) + found[4], text)


def documents(root: Path = ROOT) -> list[Path]:
    """Every document that may have figures."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def page(path: Path, root: Path = ROOT) -> str:
    """A document as it should be. Raises FigureError, with the document's name."""
    text = path.read_text(encoding="utf-8")
    if path == root / CARD and CARDS_BLOCK not in text:
        text = f"{text.rstrip()}\n{CARDS_HEAD}\n{CARDS_BLOCK}<!-- /figures -->\n"
    try:
        return filled(text, root)
    except FigureError as error:
        raise FigureError(f"{path.relative_to(root)}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    try:
        changed = [(path, text) for path in documents() if (text := page(path)) != path.read_text(encoding="utf-8")]
    except FigureError as error:
        sys.exit(f"figures: {error}")
    for path, text in changed:
        print(f"{path.relative_to(ROOT)} {'differs from results/' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and changed:
        sys.exit(1)


if __name__ == "__main__":
    main()
