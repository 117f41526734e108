"""Documents have the figures that stand in results/, and those of the shipped adapter are of the adapter that ships."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.models import contents
from pastalm.models.downloads import EMBEDDED

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "runs" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


FIGURES = load()
LENGTHS = "promised lengths, rank correlation"
"""A figure that a system without chunks lacks."""
PAGES = FIGURES.documents()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_documents_figures_are_those_of_the_results(page: Path) -> None:
    assert FIGURES.page(page) == page.read_text(encoding="utf-8"), "run `make figures`"


def test_any_other_digit_is_seen() -> None:
    """Every digit of every block, one after another."""
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = list(FIGURES.BLOCK.finditer(text))
        for block in blocks[:: max(1, len(blocks) // 6)]:
            digits = [place for place in range(block.start(3), block.end(3)) if text[place].isdigit()]
            assert digits or block[2].startswith("table"), f"{page}: an empty block {block[2]}"
            for place in digits[:3]:
                changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
                assert FIGURES.filled(changed) == text != changed
                seen += 1
    assert seen > 20


@given(st.text(alphabet="0123456789.() to*|-\n", max_size=30))
def test_whatever_stands_in_a_block_is_replaced(text: str) -> None:
    before, after = "a <!-- figures: two_stage / lambda2 / theoretical, matched / mean -->", "<!-- /figures --> b"
    assert FIGURES.filled(before + text + after) == f"{before}1.50{after}"


def test_what_is_said_of_the_shipped_adapter_is_measured() -> None:
    """A line about it with a figure has a block."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.search(r"shipped adapter|adapter that ships", line) and re.search(r"(?<![-\w.])\d+\.\d", line):
                assert "<!-- figures:" in line, f"{page.relative_to(ROOT)}: {line}"


def test_blocks_do_not_begin_a_line_of_prose() -> None:
    """There Markdown would read the whole line as HTML."""
    for page in PAGES:
        for block in FIGURES.BLOCK.finditer(page.read_text(encoding="utf-8")):
            line_before = block.string[: block.start()].rpartition("\n")[2]
            assert line_before.strip(" -*") or block[2].split()[0] in FIGURES.KINDS, f"{page}: {block[2]}"


def test_the_shipped_adapters_figures_are_of_the_adapter_that_ships() -> None:
    recorded = json.loads((ROOT / "results" / "shipped" / "figures.json").read_text())["adapters"]["shipped"]
    assert recorded == contents.of_adapter(EMBEDDED, "auto"), "run `make figures PROMPTS=FILE`: it measures the adapter"


def test_its_card_has_its_figures(tmp_path: Path) -> None:
    """Also a card that training has just written, which has no block yet."""
    assert FIGURES.CARDS_BLOCK in (ROOT / FIGURES.CARD).read_text(encoding="utf-8")
    card = tmp_path / FIGURES.CARD
    card.parent.mkdir(parents=True)
    card.write_text("# A new one\n")
    (tmp_path / "results").symlink_to(ROOT / "results")
    text = FIGURES.page(card, tmp_path)
    card.write_text(text)
    assert FIGURES.CARDS_BLOCK in text and "| shipped |" in text and FIGURES.page(card, tmp_path) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no_run / lambda2 / theoretical", "results/ has no no_run"),
        ("two_stage / lambda3 / theoretical", "no system 'lambda3'"),
        ("two_stage / lambda2 / speed", "no 'speed' of lambda2"),
        ("two_stage / lambda2 / theoretical / upright", "unknown form 'upright'"),
        ("two_stage / lambda2", "is not FILE / SYSTEM"),
        ("table two_stage / all", "is not FILE / SYSTEM"),
        (f"table seventh_run / baseline, faster / {LENGTHS}", f"no '{LENGTHS}' of baseline"),
        ("forking no_run", "results/ has no no_run"),
    ],
)
def test_a_block_that_names_nothing_is_one_clear_line(words: str, message: str) -> None:
    with pytest.raises(FIGURES.FigureError, match=re.escape(message)):
        FIGURES.written(words)


def test_tables_of_markdown_are_read_as_they_are_written() -> None:
    """The same figures from `table.md` as from `figures.json`."""
    table = FIGURES.systems("two_stage/table.md")
    for system, known in FIGURES.systems("two_stage").items():
        for name in ("theoretical", "theoretical, matched", "cut off"):
            assert table[system][name] == known[name]
