"""Reports of an evaluation: figures.json, plots, and one self-contained HTML page.

The page shows all answers side by side, with coloured chunks and timelines. `public` leaves out prompts and answers,
for prompts whose licence does not allow redistribution; their ids remain.
"""

from __future__ import annotations

import base64
import io
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pastalm.core.language import Promise, Sync, Text
from pastalm.errors import DataError
from pastalm.eval import compare
from pastalm.eval.compare import Pair, SystemFigures
from pastalm.eval.intervals import Mean
from pastalm.records.documents import Async, Document

LIBRARIES = ("pastalm", "torch", "transformers", "llama-cpp-python")


def environment() -> dict[str, str]:
    """Date, versions and machine of the measurement."""
    versions = {
        "made": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except ImportError:
            continue
    return versions


def write(
    folder: Path,
    rows: Sequence[SystemFigures],
    table: str,
    *,
    baseline: str,
    settings: Mapping[str, Any],
    public: bool = False,
) -> Path:
    """Writes figures.json, table.md, the plots and index.html; returns the page's path.

    folder: of the report.
    rows: the systems' figures.
    table: from `compare.markdown`.
    baseline: name of the baseline.
    settings: of the evaluation (command, options, load), for JSON and page.
    public: leave out prompts and answers.

    Raises DataError if the folder cannot be written, or has an index.html that is not such a report.
    """
    if (folder / "index.html").exists() and not (folder / "figures.json").exists():
        raise DataError(f"{folder} holds another index.html: give another --report")
    pictures = {name: draw(rows) for name, draw in PICTURES.items()}
    page = _page(rows, baseline, settings, {k: v for k, v in pictures.items() if v}, public)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "figures.json").write_text(json.dumps(figures(rows, baseline, settings), indent=1) + "\n")
        (folder / "table.md").write_text(table)
        for name, picture in pictures.items():
            if picture:
                (folder / f"{name}.png").write_bytes(picture)
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}") from None
    return folder / "index.html"


def figures(rows: Sequence[SystemFigures], baseline: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON: per system all figures with n and interval, by category and by number of chunks, and the
    figures of each prompt by its id."""
    return {
        "environment": environment(),
        **settings,
        "baseline": baseline,
        "systems": {
            row.system: {
                "figures": {name: value.to_dict() for name, value in row.figures.items()},
                "by category": _plain(compare.groups(row.pairs, lambda p: p.answer.category)),
                "by chunks": _plain(compare.groups(row.pairs, _chunks)),
                "prompts": [_prompt_figures(pair) for pair in row.pairs],
            }
            for row in rows
        },
    }


def _plain(table: Mapping[str, Mapping[str, Mean]]) -> dict[str, dict[str, dict[str, float]]]:
    return {key: {name: value.to_dict() for name, value in figures.items()} for key, figures in table.items()}


def _prompt_figures(pair: Pair) -> dict[str, Any]:
    own = pair.answer
    keys = (
        "tokens",
        "critical_path",
        "steps",
        "passes",
        "seconds",
        "first_seconds",
        "matched_seconds",
        "finish_reason",
    )
    table = {"id": own.id, "chunks": pair.chunks, **{key: getattr(own, key) for key in keys}}
    table |= {name: round(value, 4) for name, value in pair.speedups.items()}
    for name, scored in pair.scored.items():
        table[name] = scored.difference if scored.win is None else scored.win
    return table


def _chunks(pair: Pair) -> int:
    return min(pair.chunks, 9)


# ------------------------------------------------------------------------------ pictures


def _drawn(draw: Callable[[Any], bool]) -> bytes:
    """A PNG; b"" if `draw` returns False, since there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.8))
    try:
        if not draw(axes):
            return b""
        axes.grid(alpha=0.25)
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120)
        return buffer.getvalue()
    finally:
        pyplot.close(figure)


MEASURED, IN_PASSES, THEORETICAL = "realized, matched", "in passes, matched", "theoretical, matched"
"""By the clock, by forward passes (threads and drafts), by the critical path (threads alone)."""


def _measured(row: SystemFigures) -> str:
    """The name of a system's main speedup: the measured one if there is one, else what it would be if every pass took
    equally long."""
    return next(name for name in (MEASURED, IN_PASSES, THEORETICAL) if name in row.figures)


QUALITIES = ("win rate, length", "win rate", "quality")
"""What stands for quality, the best that there is."""


def frontier(rows: Sequence[SystemFigures]) -> bytes:
    """Quality against speedup, with intervals both ways."""
    return _frontier(rows, _measured)


def frontier_passes(rows: Sequence[SystemFigures]) -> bytes:
    """The same by forward passes, of all prompts, where the other is by the clock."""
    if any(IN_PASSES not in row.figures for row in rows) or all(_measured(row) == IN_PASSES for row in rows):
        return b""
    return _frontier(rows, lambda _: IN_PASSES)


def frontier_theoretical(rows: Sequence[SystemFigures]) -> bytes:
    """The same by theory, which counts no drafts."""
    if all(_measured(row) == THEORETICAL for row in rows):
        return b""
    return _frontier(rows, lambda _: THEORETICAL)


def speedups(rows: Sequence[SystemFigures]) -> bytes:
    """Each system's speedups side by side: threads alone, threads and drafts, and what the clock says of both."""
    names = {
        THEORETICAL: "theoretical: text over critical path (threads)",
        IN_PASSES: "in passes: text over forward passes (threads and drafts)",
        MEASURED: "realized: by the clock",
    }

    def draw(axes: Any) -> bool:
        shown = {name: label for name, label in names.items() if any(name in row.figures for row in rows)}
        if len(shown) < 2:
            return False
        for i, (name, label) in enumerate(shown.items()):
            bars = [(j, row.figures[name]) for j, row in enumerate(rows) if name in row.figures]
            axes.bar(
                [j + 0.8 / len(shown) * (i + 0.5) - 0.4 for j, _ in bars],
                [value.mean for _, value in bars],
                0.8 / len(shown),
                yerr=[[_bars(value)[side][0] for _, value in bars] for side in (0, 1)],
                capsize=2,
                label=label,
            )
        axes.set_xticks(range(len(rows)), [f"{row.system}\nn={len(row.pairs)}" for row in rows], fontsize=8)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylabel("speedup, length-matched, geometric mean")
        axes.legend(fontsize=8)
        return True

    return _drawn(draw)


def _frontier(rows: Sequence[SystemFigures], speedup: Callable[[SystemFigures], str]) -> bytes:
    def draw(axes: Any) -> bool:
        figure_names = dict.fromkeys(n for row in rows for n in row.figures)
        name = next((n for start in QUALITIES for n in figure_names if n.startswith(start)), None)
        if name is None:
            return False
        shown = sorted((row for row in rows if name in row.figures), key=lambda row: row.figures[speedup(row)].mean)
        for row in shown:
            x, y = row.figures[speedup(row)], row.figures[name]
            many = f"n={x.n}" if x.n == y.n else f"n={x.n} and {y.n}"
            axes.errorbar(
                x.mean,
                y.mean,
                xerr=_bars(x),
                yerr=_bars(y),
                fmt=_marker(rows, row),
                capsize=3,
                elinewidth=0.8,
                color=_colour(rows, row),
                label=f"{row.system} ({many})",
            )
        axes.axvline(1, color="grey", linewidth=0.8)
        even = 50 if name.startswith("win rate") else 0.5
        axes.axhline(even, color="grey", linewidth=0.8)
        names = " or ".join(dict.fromkeys(speedup(row) for row in shown))
        axes.set_xlabel(f"speedup ({names}), geometric mean, 95 % interval")
        axes.set_ylabel(f"{name} (baseline: {even})")
        _legend(axes)
        return True

    return _drawn(draw)


MARKERS = "os^Dv<>P"


def _place(rows: Sequence[SystemFigures], row: SystemFigures) -> int:
    """By which a system has the same marker and colour in every picture."""
    return [r.system for r in rows].index(row.system)


def _marker(rows: Sequence[SystemFigures], row: SystemFigures) -> str:
    return MARKERS[_place(rows, row) % len(MARKERS)]


def _colour(rows: Sequence[SystemFigures], row: SystemFigures) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](_place(rows, row) % 20)


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _bars(value: Mean) -> list[list[float]]:
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]


def _bar_groups(rows: Sequence[SystemFigures], key: Callable[[Pair], Any], label: str) -> bytes:
    """What was measured, if it was for every prompt; else passes, if they were counted; else theory."""

    def whole(name: str) -> bool:
        return all((value := row.figures.get(name)) is not None and value.n == len(row.pairs) for row in rows)

    speedup = next(name for name in (MEASURED, IN_PASSES, THEORETICAL) if whole(name))

    def draw(axes: Any) -> bool:
        tables = {row.system: compare.groups(row.pairs, key) for row in rows}
        names = sorted({value for table in tables.values() for value in table})
        if len(names) < 2:
            return False
        width = 0.8 / len(rows)
        for i, row in enumerate(rows):
            table = tables[row.system]
            bars = [(j, table[n][speedup]) for j, n in enumerate(names) if speedup in table.get(n, {})]
            axes.bar(
                [j + i * width for j, _ in bars],
                [value.mean for _, value in bars],
                width,
                yerr=[[_bars(v)[side][0] for _, v in bars] for side in (0, 1)],
                capsize=2,
                color=_colour(rows, row),
                label=row.system,
            )
        counts = {n: max(t[n][speedup].n for t in tables.values() if n in t) for n in names}
        axes.set_xticks([j + 0.4 - width / 2 for j in range(len(names))])
        axes.set_xticklabels([f"{n or 'none'}\nn≤{counts[n]}" for n in names], fontsize=8)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xlabel(label)
        axes.set_ylabel(f"speedup ({speedup}), geometric mean")
        _legend(axes)
        return True

    return _drawn(draw)


def by_category(rows: Sequence[SystemFigures]) -> bytes:
    """Speedup by the prompts' category."""
    return _bar_groups(rows, lambda pair: pair.answer.category, "category")


def by_chunks(rows: Sequence[SystemFigures]) -> bytes:
    """Speedup by the number of chunks of the answer."""
    return _bar_groups(rows, _chunks, "chunks of the answer (9: or more)")


def realized_theoretical(rows: Sequence[SystemFigures]) -> bytes:
    """Each prompt's realized against its theoretical speedup, length-matched."""

    def draw(axes: Any) -> bool:
        most = 1.0
        for row in rows:
            points = [(s[THEORETICAL], s[MEASURED]) for s in _both(row)]
            if points:
                legend = f"{row.system} (n={len(points)})"
                axes.scatter(*zip(*points, strict=True), s=10, alpha=0.6, color=_colour(rows, row), label=legend)
                most = max(most, *(max(point) for point in points))
        if not axes.collections:
            return False
        axes.plot([0, most], [0, most], color="grey", linewidth=0.8)
        axes.set_xlabel("theoretical speedup, length-matched")
        axes.set_ylabel("realized speedup, length-matched")
        _legend(axes)
        return True

    return _drawn(draw)


def _both(row: SystemFigures) -> list[dict[str, float]]:
    return [s for pair in row.pairs if MEASURED in (s := pair.speedups)]


def lengths(rows: Sequence[SystemFigures]) -> bytes:
    """How long the readers' texts are: a histogram a system, one above the other, with its median."""

    def draw(axes: Any) -> bool:
        import numpy as np

        most = max(pair.text_tokens for row in rows for pair in row.pairs)
        for place, row in enumerate(reversed(rows)):
            values = [pair.text_tokens for pair in row.pairs]
            shares, edges = np.histogram(values, bins=40, range=(0, most))
            axes.stairs(place + 0.9 * shares / shares.max(), edges, baseline=place, fill=True, color=_colour(rows, row))
            axes.vlines(np.median(values), place, place + 0.9, color="black", linewidth=1)
        labels = [f"{row.system} (n={len(row.pairs)})" for row in reversed(rows)]
        axes.set_yticks([place + 0.4 for place in range(len(rows))], labels, fontsize=8)
        axes.set_ylim(-0.2, len(rows) + 0.2)
        axes.set_xlabel("tokens of the reader's text; line: median")
        return True

    return _drawn(draw)


PICTURES: dict[str, Callable[[Sequence[SystemFigures]], bytes]] = {
    "frontier": frontier,
    "frontier-passes": frontier_passes,
    "frontier-theoretical": frontier_theoretical,
    "speedups": speedups,
    "by-category": by_category,
    "by-chunks": by_chunks,
    "realized-theoretical": realized_theoretical,
    "lengths": lengths,
}

# ------------------------------------------------------------------------------ the page


def _page(
    rows: Sequence[SystemFigures],
    baseline: str,
    settings: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    public: bool,
) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape

    loader = PackageLoader("pastalm.eval", ".")
    template = Environment(loader=loader, autoescape=select_autoescape(["html"])).get_template("report.html")
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    return template.render(
        baseline=baseline,
        settings={key: value for key, value in settings.items() if isinstance(value, str | int | float)},
        environment=environment(),
        names=names,
        rows=rows,
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        answers=None if public else json.dumps(_browsed(rows, baseline)).replace("<", "\\u003c"),
        shown=_shown,
    )


def _shown(value: Mean | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.2f}" if math.isclose(value.low, value.high) else str(value)


def _browsed(rows: Sequence[SystemFigures], baseline: str) -> list[dict[str, Any]]:
    """Every prompt with all answers to it, for the page's browser."""
    entries: dict[str, dict[str, Any]] = {}
    for row in rows:
        for pair in row.pairs:
            entry = entries.setdefault(
                pair.answer.id,
                {
                    "id": pair.answer.id,
                    "prompt": pair.answer.prompt,
                    "category": pair.answer.category,
                    "answers": [_shown_answer(baseline, pair.baseline, {})],
                },
            )
            entry["answers"].append(_shown_answer(row.system, pair.answer, pair.speedups))
    return list(entries.values())


def _shown_answer(system: str, answer: Any, speedups: Mapping[str, float]) -> dict[str, Any]:
    return {
        "system": system,
        "parts": _parts(answer.document),
        "tokens": answer.tokens,
        "path": answer.critical_path,
        "passes": answer.passes,
        "seconds": answer.seconds,
        "reason": answer.finish_reason,
        "threads": [[t["topic"], t["start_step"], t["end_step"] or 0] for t in answer.threads],
        "speedups": {name: round(value, 2) for name, value in speedups.items()},
    }


def _parts(document: Document) -> list[list[Any]]:
    """[text, number of its chunk or 0, topic]; "sync" for a sync."""
    parts: list[list[Any]] = []
    number, topic = 0, ""
    for node in document:
        if isinstance(node, Text):
            parts.append([node.text, 0, ""])
        elif isinstance(node, Promise):
            number, topic = number + 1, f"{node.topic}, {node.tokens} promised"
        elif isinstance(node, Async):
            parts += [[text, number, topic] for text, *_ in _parts(node.body)]
        elif isinstance(node, Sync):
            parts.append(["", -1, "sync"])
    return parts
