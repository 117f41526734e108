"""One table of adapters: how often they fork, how fast and how good their answers are, over the same prompts.

    python runs/adapters.py stage1=a.pmi.jsonl,a.reference.jsonl lambda1=b.pmi.jsonl,b.reference.jsonl \\
        --sigma pmi=21 --sigma reference=0.09 --out table.md

Each file is what `pasta score` wrote for one greedy answer to each prompt. (Geometric) means with 95 % bootstrap
intervals over prompts; differences from the first adapter are paired. quality: 0.5 is Baseline-SFT's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pastalm import scored
from pastalm.eval.speed import interval
from pastalm.lang import Promise, linearize, parse
from pastalm.scored import Scored

LAMBDAS = (1.0, 2.0, 4.0, 8.0, math.inf)


@dataclass(frozen=True)
class Adapter:
    """An adapter's answers in order of prompt, by scorer."""

    name: str
    answers: dict[str, list[Scored]]

    @property
    def any(self) -> list[Scored]:
        return next(iter(self.answers.values()))


def shown(values: Sequence[float], of: Callable[[float], float] = float, digits: int = 2) -> str:
    mean, low, high = (of(x) for x in interval(values))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def chunks(answer: Scored) -> int:
    return sum(isinstance(mark, Promise) for mark in linearize(parse(answer.annotated)))


def rows(adapters: Sequence[Adapter], sigmas: dict[str, float]) -> list[str]:
    head = ["adapter", "prompts", "forks", "chunks", "theoretical", "matched", "smaller"]
    head += [f"{name} quality" for name in sigmas] + ["repetition", "cut off", "tokens"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for adapter in adapters:
        found = adapter.any
        counts = [chunks(a) for a in found]
        cells = [adapter.name, str(len(found)), f"{np.mean([c >= 2 for c in counts]):.2f}", f"{np.mean(counts):.1f}"]
        for length in ("theoretical", "matched", "smaller"):
            cells.append(shown([math.log(max(a.speedup(scored.check_length(length)), 1e-3)) for a in found], math.exp))
        for name, sigma in sigmas.items():
            cells.append(shown([q for a in adapter.answers[name] if (q := a.quality(sigma)) is not None]))
        cells += [
            f"{np.mean([a.repetition for a in found]):.3f}",
            f"{np.mean([a.finish_reason == 'length' for a in found]):.2f}",
            f"{np.mean([a.text_tokens for a in found]):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def differences(adapters: Sequence[Adapter], sigmas: dict[str, float]) -> list[str]:
    """Scores less those of the first adapter, on the same prompts."""
    first = adapters[0]
    lines = []
    for name, sigma in sigmas.items():
        head = [f"score by {name}, less {first.name}'s", *(f"lambda {x:g}" for x in LAMBDAS)]
        lines += ["", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for adapter in adapters[1:]:
            cells = [adapter.name]
            for lambda_ in LAMBDAS:
                pairs = zip(adapter.answers[name], first.answers[name], strict=True)
                both = [(a.score(lambda_, sigma), b.score(lambda_, sigma)) for a, b in pairs]
                cells.append(shown([x - y for x, y in both if x is not None and y is not None], digits=3))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(
    adapters: Annotated[list[str], typer.Argument(help="NAME=SCORED.jsonl,SCORED.jsonl: one file a scorer")],
    sigma: Annotated[list[str], typer.Option(help="SCORER=SIGMA, of the stage-1 samples")],
    out: Annotated[Path | None, typer.Option(help="write the table there too")] = None,
) -> None:
    """Prints the table."""
    sigmas = {name: float(value) for name, _, value in (s.partition("=") for s in sigma)}
    found = []
    for entry in adapters:
        name, _, files = entry.partition("=")
        answers = {}
        for file in files.split(","):
            ordered = sorted(scored.read(Path(file)), key=lambda a: a.id)
            answers[ordered[0].scorer] = ordered
        found.append(Adapter(name, answers))
    same = set.intersection(*({a.id for a in v} for x in found for v in x.answers.values()))
    for adapter in found:
        for name in adapter.answers:
            adapter.answers[name] = [a for a in adapter.answers[name] if a.id in same]
    text = "\n".join([*rows(found, sigmas), *differences(found, sigmas)]) + "\n"
    if out is not None:
        out.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
