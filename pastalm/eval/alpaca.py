"""AlpacaEval (Li et al. 2023) and its length-controlled win rate (Dubois et al. 2024), computed by its own package.

Outputs are written in the benchmark's format, so that its own command can judge them too. Verdicts of a judge
(records/scores.py) become annotations: preference 1 is the baseline's answer, 2 the system's.

The package looks up the difficulty of instructions by position, so the published form of the metric
(`length_controlled_v1`) needs all 805 prompts in order. For other sets of prompts the form without difficulties is
used, and reported as such.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pastalm.errors import DataError, ModelError
from pastalm.eval.compare import Pair
from pastalm.records.answers import Answer

WHOLE = 805
"""Prompts of AlpacaEval."""
NAME = "alpaca_eval"
"""As a file of prompts: the benchmark's file on the hub."""


def fetch() -> Path:
    """The benchmark's prompts, 805, with the outputs of its reference model. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset"))
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"cannot get AlpacaEval from the hub ({reason}): give --prompts a file") from None


@dataclass(frozen=True, slots=True)
class WinRate:
    """A win rate, in percent.

    win_rate: mean preference.
    length_controlled: the estimate at equal lengths; None if it cannot be computed.
    standard_error: of that estimate.
    n: pairs with a verdict.
    missing: pairs without a verdict, which are left out.
    form: name of the package's model.
    """

    win_rate: float
    length_controlled: float | None
    standard_error: float | None
    n: int
    missing: int
    form: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def outputs(answers: Sequence[Answer], generator: str) -> list[dict[str, str]]:
    """Answers in AlpacaEval's format, for `alpaca_eval --model_outputs`."""
    return [{"instruction": a.prompt, "output": a.text, "generator": generator, "dataset": a.category} for a in answers]


def verdicts(pairs: Sequence[Pair], generator: str) -> list[dict[str, Any]]:
    """A judge's verdicts in AlpacaEval's format; answers without a verdict are left out."""
    return [
        {
            "instruction": pair.answer.prompt,
            "output_1": pair.baseline.text,
            "generator_1": "baseline",
            "output_2": pair.answer.text,
            "generator_2": generator,
            "annotator": "judge",
            "preference": 1 + judged.win,
        }
        for pair in pairs
        if (judged := pair.scored.get("judge")) is not None and judged.win is not None
    ]


def win_rate(judged: Sequence[dict[str, Any]], *, pairs: int, gamed: Path | None = None) -> WinRate:
    """The win rate of the annotations of one system, raw and length-controlled.

    judged: annotations of `verdicts`.
    pairs: number of pairs sent to the judge.
    gamed: a copy of the benchmark's df_gamed.csv, if the hub cannot be reached.

    Raises DataError if there is no annotation, ModelError if the package or its file is not available.
    """
    if not judged:
        raise DataError("there are no verdicts of a judge: evaluate with --scorer judge")
    form = "length_controlled_v1" if len(judged) == WHOLE else "length_controlled_minimal"
    deltas = {len(row["output_1"]) - len(row["output_2"]) for row in judged}
    with _package(form, gamed, len(judged)) as (metrics, frame):
        if len(deltas) == 1 or len(judged) < 10:  # nothing to control for; too few for five folds
            rates = metrics.get_winrate(frame(list(judged)))
        else:
            rates = metrics.get_length_controlled_winrate(
                frame(list(judged)), glm_name=form, save_weights_dir=None, is_warn_extreme_changes=False
            )
    controlled, error = rates.get("length_controlled_winrate"), rates.get("lc_standard_error")
    return WinRate(
        win_rate=float(rates["win_rate"]),
        length_controlled=None if controlled is None else float(controlled),
        standard_error=None if error is None else float(error),
        n=len(judged),
        missing=pairs - len(judged),
        form=form,
    )


@contextlib.contextmanager
def _package(form: str, gamed: Path | None, rows: int) -> Iterator[Any]:
    """Yields the package's metrics, and a function that makes a table of rows.

    form: of the metric.
    gamed: a copy of the package's file on the hub. A form that does not need it gets a table of zeros.
    rows: length of that table.
    """
    try:
        import pandas
        from alpaca_eval import metrics
        from alpaca_eval.metrics import glm_winrate
    except ImportError as error:
        raise ModelError(f"{error.name} is missing: pip install 'pastalm[eval]'") from None
    fetch = glm_winrate.hf_hub_download
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form != "length_controlled_v1":
            gamed = Path(folder) / "zeros.csv"
            lines = ["preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
            gamed.write_text("\n".join([*lines, *(f"0.5,{i},0,0,False,none" for i in range(rows))]) + "\n")
        if gamed is not None:
            glm_winrate.hf_hub_download = lambda **_: str(gamed)
        try:
            yield metrics, pandas.DataFrame
        except OSError as error:
            raise ModelError(
                f"cannot get AlpacaEval's df_gamed.csv ({' '.join(str(error).split())[:120]}): give a copy of it"
            ) from None
        finally:
            glm_winrate.hf_hub_download = fetch
            logging.getLogger().setLevel(logging.WARNING)


def write_outputs(path: Path, answers: Sequence[Answer], generator: str) -> None:
    """Writes `outputs` as one JSON list. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(outputs(answers, generator), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
