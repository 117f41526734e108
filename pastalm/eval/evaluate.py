"""One evaluation from models to report: systems answer, scorers score, figures are compared; gone on with where cut.

    folder/answers/NAME.jsonl             answers.py
    folder/scored/NAME.SCORER.jsonl       scored.py
    folder/alpaca_eval/NAME.json          AlpacaEval's own form
    folder/report/                        report.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pastalm import answers, scored
from pastalm.errors import RequestError
from pastalm.eval import alpaca
from pastalm.eval.baselines.copying import Copying
from pastalm.eval.baselines.skeleton import SkeletonOfThought
from pastalm.eval.compare import CountTokens, Row, figures, pairs
from pastalm.eval.means import Mean, mean
from pastalm.eval.quality import Scorer
from pastalm.eval.score import Counts, score
from pastalm.eval.systems import Decoding, System
from pastalm.layout import POLICIES, Policy
from pastalm.llm import LLM
from pastalm.scored import Length

BASELINE = "baseline"

METHODS: dict[str, Callable[[str, LLM], System]] = {
    "sot": lambda name, llm: SkeletonOfThought(name, llm),
    "sot-routed": lambda name, llm: SkeletonOfThought(name, llm, routed=True),
    "lookup": lambda name, llm: Copying(name, llm),
    "llma": lambda name, llm: Copying(name, llm, "references"),
}
"""Methods that need no model of their own: they run on the baseline's."""
COPYING = ("lookup", "llma")
"""Those that run on the transformers engine only; beside them every system does, so that like is timed against like."""


def check(wanted: Sequence[str]) -> list[str]:
    """The names of the systems of a command line, the baseline's first: a method, or NAME=ADAPTER; NAME=ADAPTER:off is
    that adapter with its tags off, NAME=ADAPTER:POLICY with those positions. Raises RequestError for what is none of
    these, or named twice."""
    names = [BASELINE]
    for entry in wanted:
        name, given, _ = entry.partition("=")
        if not given and name not in METHODS:
            raise RequestError(f"unknown system {entry!r}: use NAME=ADAPTER, {', '.join(METHODS)}")
        if name in names or not name or "/" in name:
            raise RequestError(f"{name!r} cannot name a system: use a name of its own, without a slash")
        names.append(name)
    return names


def build(wanted: Sequence[str], baseline: Decoding, load: Callable[[str, Policy | None], LLM]) -> Iterator[System]:
    """Those systems, each loaded when it is its turn, so that one at a time need fit into memory. load: a model with
    that adapter, and those positions (None: the engine's first). Raises as `check`, and what `load` raises."""
    check(wanted)
    yield baseline
    for entry in wanted:
        name, given, adapter = entry.partition("=")
        if given:
            folder, _, how = adapter.rpartition(":")
            policy = next((known for known in POLICIES if known == how), None)
            folder = folder if policy or how == "off" else adapter
            yield Decoding(name, load(folder, policy), parallelism=0.0 if how == "off" else 1.0)
        else:
            yield METHODS[name](name, baseline.llm)


def score_all(
    folder: Path,
    names: Sequence[str],
    scorers: Sequence[Scorer],
    count_tokens: CountTokens,
    *,
    references: Path,
    progress: Callable[[str, Counts], None] = lambda *_: None,
) -> dict[str, dict[str, int]]:
    """Scores the answers of every system against the baseline's; the answers without a verdict, by scorer and
    reason. Raises DataError, RemoteError."""
    missing: dict[str, dict[str, int]] = {}
    base = folder / "answers" / f"{BASELINE}.jsonl"
    for scorer in scorers:
        for name in names:
            source, target = folder / "answers" / f"{name}.jsonl", folder / "scored" / f"{name}.{scorer.name}.jsonl"

            def say(counts: Counts, name: str = name, scorer: Scorer = scorer) -> None:
                progress(f"{name} by {scorer.name}", counts)

            counts = score(source, base, target, scorer, count_tokens, references=references, progress=say)
            for why, many in counts.unscored.items():
                table = missing.setdefault(scorer.name, {})
                table[why] = table.get(why, 0) + many
    return missing


def compare_all(
    folder: Path,
    names: Sequence[str],
    sigmas: Mapping[str, float | None],
    count_tokens: CountTokens,
    length: Length = "theoretical",
) -> tuple[list[Row], dict[str, float]]:
    """A row for each system, and the unit of each scorer's differences: as given, else their standard deviation over
    all systems' answers. Raises DataError."""
    base = answers.read(folder / "answers" / f"{BASELINE}.jsonl")
    judged = {
        name: {
            scorer: scored.read(path)
            for scorer in sigmas
            if (path := folder / "scored" / f"{name}.{scorer}.jsonl").is_file() and path.stat().st_size
        }
        for name in names
    }
    units = {
        scorer: given or scored.spread([row for found in judged.values() for row in found.get(scorer, ())])
        for scorer, given in sigmas.items()
    }
    rows = []
    for name in names:
        found = pairs(answers.read(folder / "answers" / f"{name}.jsonl"), base, count_tokens, judged[name])
        rows.append(Row(name, found, figures(found, units, length)))
    return rows, units


def win_rates(folder: Path, rows: Sequence[Row], gamed: Path | None) -> dict[str, alpaca.WinRate]:
    """Every system's win rate by the judge, those without a verdict left out; it joins the row's figures.

    Writes folder/alpaca_eval/NAME.json, the answers in the benchmark's form. Raises DataError, ModelError."""
    found = {}
    for row in rows:
        path = folder / "alpaca_eval" / f"{row.system}.json"
        alpaca.write_outputs(path, [pair.answer for pair in row.pairs], row.system)
        if row.system != BASELINE and (judged := alpaca.verdicts(row.pairs, row.system)):
            won = alpaca.win_rate(judged, asked=len(row.pairs), gamed=gamed)
            row.figures["win rate, raw"] = mean([100 * (a["preference"] - 1) for a in judged])
            if (middle := won.length_controlled) is not None and (error := won.standard_error) is not None:
                low, high = middle - 1.96 * error, middle + 1.96 * error
                row.figures["win rate, length-controlled"] = Mean(middle, low, high, won.n)
            found[row.system] = won
    return found
