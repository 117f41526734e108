"""An evaluation, from models to report: systems answer, scorers score, figures are compared. Can be resumed.

folder/answers/NAME.jsonl             answers.py
folder/scored/NAME.SCORER.jsonl       scores.py
folder/alpaca_eval/NAME.json          AlpacaEval's own form
folder/report/                        report.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastalm.core.layout import POLICIES, Policy
from pastalm.core.params import DRAFTERS
from pastalm.errors import DataError, RequestError
from pastalm.eval import alpaca, measure
from pastalm.eval.baselines.skeleton import SkeletonOfThought
from pastalm.eval.compare import CountTokens, SystemFigures, figures, pairs
from pastalm.eval.intervals import Mean, mean
from pastalm.eval.quality import Scorer
from pastalm.eval.score import ScoreCounts, score
from pastalm.eval.systems import Decoding, System
from pastalm.llm import LLM
from pastalm.records import answers, jsonl, scores
from pastalm.records.jsonl import Bad
from pastalm.records.labels import Label
from pastalm.records.prompts import Prompt
from pastalm.records.scores import Length

BASELINE = "baseline"

METHODS: dict[str, Callable[[str, LLM], System]] = {
    "sot": lambda name, llm: SkeletonOfThought(name, llm),
    "sot-routed": lambda name, llm: SkeletonOfThought(name, llm, routed=True),
}
"""Methods that run on the baseline's model."""
COPYING = {"lookup": "lookup", "llma": "references"}
"""Methods that are the baseline with one drafter, by its name: prompt lookup decoding (Saxena, 2023) and LLMA (Yang et
al., arXiv 2304.04487)."""
EVERY = "drafts"
"""In place of drafters' names: all of them, as `drafts="auto"`."""


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """A system as named on the command line.

    name: of the system.
    adapter: its folder; "" for a method that needs none.
    policy: position policy. None: the engine's first.
    off: decode without forking.
    drafts: as in SamplingParams.
    """

    name: str
    adapter: str = ""
    policy: Policy | None = None
    off: bool = False
    drafts: str = "off"

    @property
    def method(self) -> str:
        """How it answers, for the header of its file."""
        if self.name in METHODS and not self.adapter:
            return self.name
        drafts = "" if self.drafts == "off" else f", drafts {self.drafts}"
        return ("sequential" if self.off else "asynchronous") + drafts


def parse_system(entry: str) -> SystemSpec:
    """Parses a system: a method, NAME=ADAPTER, NAME=ADAPTER:off (no forking) or NAME=ADAPTER:POLICY (position policy).
    An adapter may end in +drafts (all drafters) or in names of drafters, as in +lookup,siblings. Raises RequestError if
    it is none of these."""
    name, separator, adapter = entry.partition("=")
    if not separator:
        if name in COPYING:
            return SystemSpec(name, off=True, drafts=COPYING[name])
        if name not in METHODS:
            raise RequestError(f"unknown system {entry!r}: use NAME=ADAPTER, {', '.join([*METHODS, *COPYING])}")
        return SystemSpec(name)
    adapter, drafts = _drafts(adapter)
    folder, _, suffix = adapter.rpartition(":")
    policy = next((policy for policy in POLICIES if policy == suffix), None)
    return SystemSpec(name, folder if policy or suffix == "off" else adapter, policy, suffix == "off", drafts)


def _drafts(adapter: str) -> tuple[str, str]:
    """Splits what an adapter's entry says of drafts off its end. A plus sign before a slash is part of the folder's
    name. Raises RequestError for an unknown drafter."""
    entry, plus, names = adapter.rpartition("+")
    if not plus or "/" in names:
        return adapter, "off"
    if names == EVERY:
        return entry, "auto"
    if not set(names.split(",")) <= set(DRAFTERS):
        raise RequestError(f"unknown drafts {names!r} of {entry}: end in +{EVERY}, or in some of +{','.join(DRAFTERS)}")
    return entry, names


def check(entries: Sequence[str]) -> list[str]:
    """The names of all systems, the baseline's first. Raises RequestError as `parse_system`, and if a name repeats
    or cannot be a file name."""
    names = [BASELINE]
    for entry in entries:
        name = parse_system(entry).name
        if name in names or not name or "/" in name:
            raise RequestError(f"{name!r} cannot name a system: use a name of its own, without a slash")
        names.append(name)
    return names


def build(entries: Sequence[str], baseline: Decoding, load: Callable[[str, Policy | None], LLM]) -> Iterator[System]:
    """Yields the systems. Each is loaded when it is needed, so only one must fit into memory.

    entries: systems as on the command line.
    baseline: the baseline.
    load: loads a model with an adapter and a position policy (None: the engine's first).

    Raises as `check` and `load`.
    """
    check(entries)
    yield baseline
    for spec in map(parse_system, entries):
        if spec.method in METHODS:
            yield METHODS[spec.method](spec.name, baseline.llm)
        elif spec.adapter:
            parallelism = 0.0 if spec.off else 1.0
            yield Decoding(spec.name, load(spec.adapter, spec.policy), parallelism=parallelism, drafts=spec.drafts)
        else:
            yield Decoding(spec.name, baseline.llm, parallelism=0, drafts=spec.drafts)


def described(
    entries: Sequence[str],
    adapter_of: Callable[[str], dict[str, str] | None],
    baseline: str,
    settings: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The header of each system's file, by name.

    entries: systems as on the command line.
    adapter_of: gives name and hash of an adapter.
    baseline: the baseline's adapter.
    settings: settings that all systems share.

    Raises RequestError, ModelError.
    """
    base = {**settings, "adapter": adapter_of(baseline)}
    headers = {BASELINE: {"method": "sequential", **base}}
    for spec in map(parse_system, entries):
        if spec.adapter:
            headers[spec.name] = {
                **base,
                "method": spec.method,
                "adapter": adapter_of(spec.adapter),
                "positions": spec.policy,
            }
        else:
            headers[spec.name] = {**base, "method": spec.method}
    return headers


def check_folder(
    folder: Path, headers: Mapping[str, Mapping[str, Any]], prompts: Sequence[Prompt], *, overwrite: bool
) -> None:
    """Raises DataError if a system has answers that were made with other settings, before anything is decoded."""
    for name in headers:
        measure.results(folder / "answers", name, headers, prompts, overwrite=overwrite)


def check_scores(
    folder: Path, names: Sequence[str], models: Mapping[str, Mapping[str, Any]], *, overwrite: bool
) -> None:
    """The same check for scores. models: name and hash of each scorer's model."""
    for name in names:
        for scorer, header in models.items():
            path = folder / "scored" / f"{name}.{scorer}.jsonl"
            jsonl.Results(path, scores.KIND, {"scorer": scorer, **header}, overwrite=overwrite)


WHAT = ("model", "adapter", "method", "positions")
"""Header fields that identify a system, apart from how it was measured."""


def check_answers(folder: Path, headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks, before answers are only read, that they are from the systems named. Files without a header, and adapters
    that are not in `headers`, are not checked. Raises DataError."""
    for name, requested in headers.items():
        path = folder / "answers" / f"{name}.jsonl"
        if (recorded := jsonl.header(path)) is None:
            continue
        keys = [key for key in WHAT if key in requested]
        if changes := jsonl.differences({k: recorded.get(k) for k in keys}, {k: requested[k] for k in keys}):
            raise DataError(f"{path} has the answers of another system ({'; '.join(changes)}): name that one")


def score_all(
    folder: Path,
    names: Sequence[str],
    scorers: Sequence[Scorer],
    count_tokens: CountTokens,
    *,
    references: Path,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    bad: Bad | None = None,
    progress: Callable[[str, ScoreCounts], None] = lambda *_: None,
) -> dict[str, dict[str, int]]:
    """Scores the answers of every system against the baseline's.

    folder: of the evaluation.
    names: of the systems.
    scorers: the scorers.
    count_tokens: counts the tokens of a text.
    references: a file of reference answers.
    models: name and hash of each scorer's model.
    overwrite, bad: as in `score`.
    progress: called with the name of a system and a scorer, and the counts.

    Returns the number of answers without a verdict, by scorer and reason. Raises DataError, RemoteError.
    """
    missing: dict[str, dict[str, int]] = {}
    base = folder / "answers" / f"{BASELINE}.jsonl"
    for scorer in scorers:
        for name in names:
            source, target = folder / "answers" / f"{name}.jsonl", folder / "scored" / f"{name}.{scorer.name}.jsonl"

            def say(counts: ScoreCounts, name: str = name, scorer: Scorer = scorer) -> None:
                progress(f"{name} by {scorer.name}", counts)

            counts = score(
                source,
                base,
                target,
                scorer,
                count_tokens,
                references=references,
                models=(models or {}).get(scorer.name),
                overwrite=overwrite,
                bad=bad,
                progress=say,
            )
            for why, count in counts.unscored.items():
                table = missing.setdefault(scorer.name, {})
                table[why] = table.get(why, 0) + count
    return missing


def compare_all(
    folder: Path,
    names: Sequence[str],
    sigmas: Mapping[str, float | None],
    count_tokens: CountTokens,
    length: Length = "theoretical",
    *,
    labels: Mapping[str, Label] | None = None,
) -> tuple[list[SystemFigures], dict[str, float]]:
    """The figures of each system, and the unit of each scorer's differences.

    folder: of the evaluation.
    names: of the systems.
    sigmas: unit of each scorer's differences (None: their standard deviation over all systems' answers).
    count_tokens: counts the tokens of a text.
    length: the tokens that a speedup counts.
    labels: as in `figures`.

    Raises DataError.
    """
    base = answers.read(folder / "answers" / f"{BASELINE}.jsonl")
    judged = {
        name: {
            scorer: scores.read(path)
            for scorer in sigmas
            if (path := folder / "scored" / f"{name}.{scorer}.jsonl").is_file() and any(jsonl.read(path))
        }
        for name in names
    }
    units = {
        scorer: unit or scores.spread([row for by_scorer in judged.values() for row in by_scorer.get(scorer, ())])
        for scorer, unit in sigmas.items()
    }
    rows = []
    for name in names:
        by_scorer = pairs(answers.read(folder / "answers" / f"{name}.jsonl"), base, count_tokens, judged[name])
        rows.append(SystemFigures(name, by_scorer, figures(by_scorer, units, length, labels=labels)))
    return rows, units


def win_rates(folder: Path, rows: Sequence[SystemFigures], gamed: Path | None) -> dict[str, alpaca.WinRate]:
    """The win rate of every system that a judge has scored. Adds it to the system's figures.

    Writes the answers in AlpacaEval's format to folder/alpaca_eval/NAME.json.

    folder: of the evaluation.
    rows: the systems' figures.
    gamed: as in `alpaca.win_rate`.

    Raises DataError, ModelError.
    """
    rates = {}
    for row in rows:
        path = folder / "alpaca_eval" / f"{row.system}.json"
        alpaca.write_outputs(path, [pair.answer for pair in row.pairs], row.system)
        if row.system != BASELINE and (judged := alpaca.verdicts(row.pairs, row.system)):
            rate = alpaca.win_rate(judged, pairs=len(row.pairs), gamed=gamed)
            row.figures["win rate, raw"] = mean([100 * (a["preference"] - 1) for a in judged])
            if (middle := rate.length_controlled) is not None and (error := rate.standard_error) is not None:
                low, high = middle - 1.96 * error, middle + 1.96 * error
                row.figures["win rate, length-controlled"] = Mean(middle, low, high, rate.n)
            rates[row.system] = rate
    return rates
