"""`frontier.sh` and `shipped.sh`: what they put on the chart, and where. `pasta` is played, the scripts are real."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pastalm.eval.evaluate import check, parse_system

ROOT = Path(__file__).parents[1]

PLAYED = '''#!{python} -SE
"""Plays `pasta eval`: notes its arguments, leaves a report and answers."""
import json, pathlib, sys
words = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[0] == "eval":
    report, out = (pathlib.Path(words[words.index(name) + 1]) for name in ("--report", "--out"))
    report.mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "figures.json"):
        (report / name).write_text("{{}}")
    (out / "answers").mkdir(parents=True, exist_ok=True)
    head = {{"pasta": {{"format": 1, "command": "eval"}}}}
    row = {{"id": "7", "prompt": "A secret?", "annotated": "No.", "tokens": 3}}
    (out / "answers" / "sot.jsonl").write_text(json.dumps(head) + "\\n" + json.dumps(row) + "\\n")
'''


def play(script: str, folder: Path, **variables: str) -> list[list[str]]:
    """Runs a script. Returns the arguments of each call of `pasta`."""
    tools, log = folder / "bin", folder / "calls"
    tools.mkdir(exist_ok=True)
    (tools / "pasta").write_text(PLAYED.format(python=sys.executable, log=str(log)))
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (folder / "prompts.jsonl").write_text("{}\n")
    environment = os.environ | variables | {"PASTA": str(tools / "pasta"), "OUT": str(folder / "out")}
    environment.setdefault("RESULTS", str(folder / "results"))
    command = ["bash", str(ROOT / "runs" / script), str(folder / "prompts.jsonl")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_everything_is_on_the_chart(tmp_path: Path) -> None:
    more = ROOT / "adapters" / "lambda2"
    (words,) = play("frontier.sh", tmp_path, MORE=f"apar-small={more}")
    systems = words[1 : words.index("--baseline")]
    names = check(systems)
    adapters = {path.parent.name for path in (ROOT / "adapters").glob("*/adapter_config.json")} - {"baseline"}
    assert len(adapters) >= 5
    assert set(names) == adapters | {
        "baseline",
        "apar-small",
        "shipped",
        "shipped-lookup",
        "sot",
        "sot-routed",
        "lookup",
        "llma",
    }
    lookup = parse_system(systems[names.index("shipped-lookup") - 1])
    assert (lookup.adapter, lookup.drafts, lookup.off) == ("auto", "lookup", False)
    assert words[words.index("--engine") + 1] == "native" and int(words[words.index("--timed") + 1]) >= 50
    assert "--public" in words and "--limit" not in words
    with lzma.open(tmp_path / "results" / "answers.jsonl.xz", "rt") as file:
        (row,) = map(json.loads, file)
    assert row == {"system": "sot", "id": "7", "annotated": "No.", "tokens": 3}
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["answers.jsonl.xz", "figures.json"]


@pytest.mark.parametrize("script", ["frontier.sh", "shipped.sh"])
def test_a_trial_leaves_the_results_alone(script: str, tmp_path: Path) -> None:
    calls = play(script, tmp_path, LIMIT="3", AGAINST="0")
    assert calls[0][calls[0].index("--limit") + 1] == "3"
    assert not any((tmp_path / "results").glob("*"))
    assert list((tmp_path / "out").rglob("figures.json"))


def test_an_adapter_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        play("frontier.sh", tmp_path, MORE="apar-small=nowhere")
    assert failed.value.returncode == 2 and failed.value.stderr.decode() == "there is no adapter at nowhere\n"


def test_the_shipped_adapter_is_measured_as_it_ships(tmp_path: Path) -> None:
    (words,) = play("shipped.sh", tmp_path, AGAINST="0")
    assert words[:2] == ["eval", "shipped=auto"] and words[words.index("--engine") + 1] == "native"
    assert "--dtype" not in words and "--labels" in words and "--sigma" in words
