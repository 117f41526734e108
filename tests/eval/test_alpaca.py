"""Length-controlled win rates: AlpacaEval's published ones come out of their published annotations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("alpaca_eval")

from pastalm.errors import DataError, ModelError
from pastalm.eval import alpaca
from pastalm.records.answers import Answer

FIXTURE = Path(__file__).parents[1] / "data" / "alpaca_eval_lc.json.gz"
"""Preferences and length differences of eight models of the leaderboard, and the published figures."""


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    with gzip.open(FIXTURE, "rt") as file:
        return json.load(file)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def gamed(published: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for df_gamed.csv. The model's loss is linear in its preferences, so any with the two published
    moments will do: here a logistic curve of length and difficulty."""
    from scipy.optimize import fsolve

    difficulty = np.asarray(published["instruction_difficulty"])
    lengths = {name: np.asarray(found) for name, found in published["gamed_std_delta_len"].items()}
    x = np.tanh(np.concatenate(list(lengths.values())))
    d = np.tile(difficulty, len(lengths))
    wanted = [published["gamed_moments"][name] for name in ("S_len", "S_diff")]

    def preference(w: Any) -> Any:
        return 1 / (1 + np.exp(-(w[0] * x + w[1] * d)))

    w = fsolve(lambda w: [(preference(w) * x).sum() - wanted[0], (preference(w) * d).sum() - wanted[1]], [-1.0, 1.0])
    path = tmp_path_factory.mktemp("alpaca") / "df_gamed.csv"
    lines = ["preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
    p = iter(preference(w))
    for name, found in lengths.items():
        lines += [
            f"{next(p)},{i},{length},{hard},False,{name}"
            for i, (length, hard) in enumerate(zip(found, difficulty, strict=True))
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def annotations(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Only the difference in length matters of the outputs."""
    return [
        {
            "instruction": str(i),
            "output_1": "x" * max(0, delta),
            "generator_1": "gpt4_1106_preview",
            "output_2": "x" * max(0, -delta),
            "generator_2": "model",
            "annotator": "judge",
            "preference": preference,
        }
        for i, (preference, delta) in enumerate(
            zip(model["preference"], model["len_baseline_minus_model"], strict=True)
        )
    ]


@pytest.mark.parametrize("name", ["gemma-7b-it", "claude-2", "alpaca-7b", "vicuna-7b-v1.5"])
def test_published_win_rates_are_reproduced(name: str, published: dict[str, Any], gamed: Path) -> None:
    model = published["models"][name]
    found = alpaca.win_rate(annotations(model), pairs=805, gamed=gamed)
    assert found.form == "length_controlled_v1"
    assert (found.n, found.missing) == (805, 0)
    assert found.win_rate == pytest.approx(model["published_win_rate"], abs=0.001)
    assert found.length_controlled == pytest.approx(model["published_lc_win_rate"], abs=0.1)


def test_a_subset_is_controlled_without_difficulties_and_says_so(published: dict[str, Any]) -> None:
    """A judge that likes length alone: at equal lengths nobody wins."""
    rng = np.random.default_rng(0)
    deltas = rng.integers(-900, 900, size=200)
    liked = 1 + 1 / (1 + np.exp(2 * np.tanh(deltas / deltas.std())))
    rows = annotations({"preference": liked.tolist(), "len_baseline_minus_model": (deltas - 0).tolist()})
    longer = [row for row, delta in zip(rows, deltas, strict=True) if delta < 300]
    found = alpaca.win_rate(longer, pairs=200)
    assert found.form == "length_controlled_minimal"
    assert found.missing == 200 - len(longer) > 0
    assert found.win_rate > 55
    assert found.length_controlled == pytest.approx(50, abs=1)


def test_equal_lengths_need_no_control_and_no_verdict_is_an_error() -> None:
    rows = annotations({"preference": [2.0, 1.0, 2.0, 2.0], "len_baseline_minus_model": [5] * 4})
    found = alpaca.win_rate(rows, pairs=4)
    assert (found.win_rate, found.length_controlled) == (75, None)
    with pytest.raises(DataError, match="no verdicts of a judge"):
        alpaca.win_rate([], pairs=3)


def test_outputs_have_the_benchmarks_form(tmp_path: Path) -> None:
    given = Answer(
        id="1",
        prompt="Hi?",
        category="koala",
        annotated='<promise topic="a" tokens="10"/><async>One. </async><sync/>Two.',
        tokens=9,
        critical_path=7,
        finish_reason="stop",
    )
    alpaca.write_outputs(tmp_path / "out" / "model.json", [given], "pasta")
    assert json.loads((tmp_path / "out" / "model.json").read_text()) == [
        {"instruction": "Hi?", "output": "One. Two.", "generator": "pasta", "dataset": "koala"}
    ]


def test_the_hubs_prompts_or_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps([{"instruction": "Hi?", "output": "Hello.", "dataset": "koala"}]))
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(file))
    assert alpaca.fetch() == file
    assert asked == [(("tatsu-lab/alpaca_eval", "alpaca_eval.json"), {"repo_type": "dataset"})]

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(ModelError, match=r"cannot get AlpacaEval from the hub \(no network\): give --prompts"):
        alpaca.fetch()
