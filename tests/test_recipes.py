"""Options from a file are those of the command line; the recipes of the tree are for the verbs as they are."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from pastalm.cli import app
from pastalm.train import preference, sft

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "runs" / "recipes").glob("*.toml"))

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `pasta train VERB` on a recipe's text; returns the settings that the run would have, or its result."""
    made: list[Any] = []

    def keep(config: Any, progress: Any) -> str:
        made.append(config)
        return "out"

    monkeypatch.setattr(sft, "train", keep)
    monkeypatch.setattr(preference, "train", keep)
    data, recipe = tmp_path / "data.jsonl", tmp_path / "recipe.toml"
    data.write_text("")

    def ran(verb: str, text: str, *words: str) -> Any:
        recipe.write_text(text)
        required = ["--out", "out", *(["--start", "adapter"] if verb == "prefer" else [])]
        made.clear()
        result: Result = CliRunner().invoke(
            app, ["train", verb, str(data), *required, "--config", str(recipe), *words], prog_name="pasta"
        )
        return made[0] if made else result

    return ran


NUMBERS = {"learning-rate": "learning_rate", "row-learning-rate": "row_learning_rate", "epochs": "epochs"}


@given(
    values=st.dictionaries(st.sampled_from(sorted(NUMBERS)), st.floats(1e-6, 10), min_size=1),
    on_the_line=st.sets(st.sampled_from(sorted(NUMBERS))),
    verb=st.sampled_from(["sft", "prefer"]),
)
def test_a_file_says_what_the_command_line_would(
    values: dict[str, float], on_the_line: set[str], verb: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What the line says goes first, and what neither says is the verb's default."""
    with pytest.MonkeyPatch.context() as patch:
        ran = run.__wrapped__(tmp_path_factory.mktemp("recipe"), patch)  # type: ignore[attr-defined]
        text = f"[{verb}]\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
        words = [word for name in sorted(on_the_line) for word in (f"--{name}", "0.25")]
        by_file, by_line = ran(verb, text, *words), ran(verb, "", *words)
        for name, field in NUMBERS.items():
            expected = 0.25 if name in on_the_line else values.get(name, getattr(by_line, field))
            assert getattr(by_file, field) == expected


def test_tables_are_a_verbs_own_and_the_rest_is_for_both(run: Run) -> None:
    text = 'model = "a"\n[sft]\nlora-rank = 4\nsyncs = false\n[prefer]\nlambda = 2\nmodel = "b"\n'
    first, second = run("sft", text), run("prefer", text)
    assert (first.model, first.lora_rank, first.mix.syncs) == ("a", 4, False)
    assert (second.model, second.lambda_) == ("b", 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorarank = 4", "sets 'lorarank', which pasta train sft does not take"),
        ("lambda = 4", "sets 'lambda', which pasta train sft does not take"),
        ("config = 'x'", "sets 'config'"),
        ("[stf]\nseed = 1", "has a table for 'stf': use fork, prefer, sft"),
        ("seed = [1, 2]", "sets 'seed' to a list: give one value"),
        ("seed = ", "is not TOML"),
        ("learning-rate = 'fast'", "--learning-rate"),
        ("full = true\nlora-rank = 4", "--lora-rank does nothing with --full"),
    ],
)
def test_a_mistake_is_one_clear_line(run: Run, text: str, message: str) -> None:
    result = run("sft", text)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_file_that_is_not_there_is_one_clear_line(run: Run, tmp_path: Path) -> None:
    result = run("sft", "", "--config", str(tmp_path / "none.toml"))
    assert result.exit_code == 2 and "none.toml: No such file" in result.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_of_the_tree_are_read_by_both_stages(run: Run, recipe: Path) -> None:
    for verb in ("sft", "prefer"):
        settings = run(verb, recipe.read_text())
        assert settings.device == "cuda" and settings.gradient_checkpointing and settings.batch_tokens == 8192


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dry_run", ROOT / "runs" / "recipes" / "dry_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_trains_both_stages_at_a_fraction_of_its_width(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run = load()
    words = ["dry_run", str(recipe), str(tmp_path), "--narrow", "8", "--vocabulary", "1000", "--tokens", "6000"]
    monkeypatch.setattr(sys, "argv", words)
    seconds = iter(range(100))

    def in_this_process(*words: str) -> tuple[float, float]:
        result = CliRunner().invoke(app, ["train", *words])
        assert result.exit_code == 0, result.output
        return float(next(seconds)), 0.0

    monkeypatch.setattr(dry_run, "train", in_this_process)
    dry_run.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["layers"] == 2 and figures["stage 1, tokens"] > 100
    assert (tmp_path / recipe.stem / "stage2" / "adapter" / "pasta.json").is_file()
    assert 8.0e9 < figures["weights of the whole model"] < 8.3e9
