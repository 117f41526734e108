"""The script of both stages, killed: it goes on to what it would have made. `pasta` is played, the script is real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "runs" / "smollm2_two_stage.sh"

PLAYED = '''#!{python} -S
"""Plays pasta: writes what each verb would, half of it first. Killed at call number KILL, and its caller with it."""
import json, os, pathlib, signal, sys
here = pathlib.Path({folder!r})
log = here / "calls"
call = len(log.read_text().splitlines()) if log.exists() else 0
verb, *words = sys.argv[1:]
with log.open("a") as file:
    file.write(verb + chr(10))

def die():
    if call == int(os.environ.get("KILL", -1)):
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

def option(name, default=None):
    return words[words.index(name) + 1] if name in words else default

def lines(path, wanted):  # goes on where the file is; a torn last line is cut off
    path = pathlib.Path(path)
    content = path.read_text() if path.exists() else ""
    there = content[: content.rfind(chr(10)) + 1].splitlines()
    for i in range(len(there), wanted):
        there.append(f"{{path.name}} {{i}} {{' '.join(w for w in words if not w.startswith('/'))}}")
        path.write_text(chr(10).join(there) + chr(10) + "torn")
        if i == wanted // 2:
            die()
    die()
    path.write_text(chr(10).join(there) + chr(10))

for name in ("--adapter", "--start"):
    given = option(name)
    assert given in (None, "none") or pathlib.Path(given, "README.md").exists(), (name, given)
if verb == "train":
    out = pathlib.Path(option("--out"))
    out.mkdir(exist_ok=True)
    (out / "checkpoint").write_text("half")
    die()
    (out / "adapter").mkdir(exist_ok=True)
    (out / "adapter" / "README.md").write_text(" ".join(w for w in words if not w.startswith("/")))
elif verb == "score":
    lines(words[1], 4)
    print(json.dumps({{"sigma": 7.5}}))
elif verb == "eval":
    os.makedirs(option("--out"), exist_ok=True)
    lines(pathlib.Path(option("--out"), "table.md"), 3)
else:
    assert pathlib.Path(words[0]).stat().st_size
    lines(words[1], 24)
'''


def play(folder: Path, *, kill: int = -1) -> int:
    """Runs the script once; its exit code. What it makes is in folder/out."""
    tools = folder / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "pasta").write_text(PLAYED.format(python=sys.executable, folder=str(folder)))
    played = 'case $1 in */positions.py) echo "$2"; exit;; esac'  # it would load the adapters
    (tools / "python").write_text(f'#!/bin/sh\n{played}\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    rows = [{"id": i, "prompt": f"What of {i}?", "response": "x", "licence": "Apache-2.0"} for i in range(40)]
    for name in ("answers", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {
        "PASTA": str(tools / "pasta"),
        "OUT": str(folder / "out"),
        "KILL": str(kill),
        "LAMBDAS": "1 inf",
        "ROUNDS": "2",
        "OWN_PROMPTS": "5",
        "ROUND_PROMPTS": "4",
    }
    command = ["bash", str(SCRIPT), str(folder / "answers.jsonl"), str(folder / "eval.jsonl")]
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=300).returncode


def made(folder: Path) -> dict[str, str]:
    """All files that the script left, but for those that say `half`."""
    found = sorted(p for p in (folder / "out").rglob("*") if p.is_file())
    return {str(p.relative_to(folder / "out")): p.read_text() for p in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert play(folder) == 0
    assert len((folder / "calls").read_text().splitlines()) >= CALLS
    return folder


def test_a_whole_run_makes_every_adapter_and_the_table(whole: Path) -> None:
    found = made(whole)
    adapters = {name.split("/")[0] for name in found if name.endswith("adapter/README.md")}
    rounds = {f"lambda{x}_round{n}" for x in ("1", "inf") for n in (1, 2)}
    assert adapters >= rounds | {"baseline", "stage1", "stage1_own", "arm_own", "arm_given", "arm_serial"}
    assert "--lambda inf" in found["lambdainf_round2/adapter/README.md"]
    assert "--start lambdainf_round1/adapter" in found["lambdainf_round2/adapter/README.md"]
    assert "--sigma 7.5" in found["lambda1_round2/adapter/README.md"]
    assert "--untagged" in found["baseline/adapter/README.md"]
    first, second = ({json.loads(row)["id"] for row in found[f"prompts_round{n}.jsonl"].splitlines()} for n in (1, 2))
    assert len(first) == len(second) == 4 and not first & second, "each round has prompts of its own"
    assert "--references" in found["samples_stage1.pmi.jsonl"]
    assert "--sigma 7.5" in found["samples_lambda1_round1.pmi.jsonl"]
    table = found["eval/table.md"]
    assert all(f"{name}={name}/adapter" in table for name in rounds | {"stage1", "stage1_own"})
    trained = (whole / "calls").read_text().count("train")
    assert play(whole) == 0
    assert made(whole) == found, "started again, it changes nothing"
    assert (whole / "calls").read_text().count("train") == trained, "nothing is trained twice"


CALLS = 32


@pytest.mark.parametrize("kill", range(2, CALLS, 6))
def test_killed_in_the_middle_it_goes_on_to_the_same(whole: Path, tmp_path: Path, kill: int) -> None:
    assert play(tmp_path, kill=kill) != 0
    assert made(tmp_path) != made(whole)
    assert play(tmp_path) == 0
    assert made(tmp_path) == made(whole)
