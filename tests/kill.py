"""Kills the real commands at random moments and starts them again: they leave what an undisturbed run leaves.

    python tests/kill.py --moments 20 [annotate sample score eval sft prefer]

Each command runs in a process of its own, forked from this one, so that what takes long (imports) is done once and the
moments fall into the command's own work. Each is killed once or twice in a row. What is compared is every byte of the
files that a command leaves, but for what a clock measured (seconds, in answers of `eval` and in a card).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that has threads cannot be forked
sys.path.insert(0, str(Path(__file__).parents[1]))

CLOCK = ("seconds", "first_seconds", "matched_seconds", "steps", "passes")
"""Drafts are fed by what passes take on this clock, so steps and passes are measured too."""
UNTIMED = ("config.json", "log.jsonl", "reference.jsonl", "loss.png")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "pasta.json")


@dataclass(frozen=True, slots=True)
class Command:
    """words: of the command line, given where it writes. left: the bytes it leaves there, by name."""

    words: Callable[[Path], list[str | Path]]
    left: Callable[[Path], dict[str, bytes]]


def a_file(out: Path) -> dict[str, bytes]:
    return {"file": out.read_bytes()}


def evaluated(out: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "scored").glob("*.jsonl"))}
    for path in sorted((out / "answers").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
        found[str(path.relative_to(out))] = json.dumps(kept).encode()
    return found


def trained(out: Path) -> dict[str, bytes]:
    paths = [*(out / name for name in UNTIMED), *(out / "adapter" / name for name in ADAPTER)]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths if p.exists()}


# ------------------------------------------------------------------------------ what they work on

LISTED = "Two things:\n\n1. Sleep: do it every day, and do it well, for weeks.\n2. Food: eat greens and beans.\n"
FORKED = "".join(f'<promise topic="{t}" tokens="10"/><async>{t} is one.\n</async>' for t in ("one", "two"))


def lines(path: Path, rows: Iterator[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(work: Path, rows: int) -> dict[str, Command]:
    """A tiny model, data for every command, and the commands. rows: of the largest files."""
    from pastalm.models import checkpoints, preparing
    from tests.test_models import byte_level, small_model

    model, tokenizer = small_model(330), byte_level()
    preparing.prepare(model, tokenizer)
    model.generation_config.eos_token_id = 1
    checkpoints.save(model, tokenizer, work / "model")
    base: list[str | Path] = ["--model", work / "model"]
    source = lines(
        work / "answers.jsonl",
        ({"id": str(i), "prompt": f"What of {i}?", "response": f"{LISTED}\nSo much for {i}." * 4} for i in range(rows)),
    )
    prompts = lines(work / "prompts.jsonl", ({"id": i, "prompt": f"What of {i}?"} for i in range(rows // 10)))
    few = lines(work / "few.jsonl", ({"id": i, "prompt": f"What of {i}?"} for i in range(8)))
    sampled = lines(
        work / "sampled.jsonl",
        (
            {
                "id": str(i), "choice": c, "prompt": f"What of {i}?", "annotated": f"{FORKED * c}plain {'x' * i} {c}",
                "tokens": 30 + c, "critical_path": 30 - 9 * c, "finish_reason": "stop",
            }
            for i in range(rows // 3)
            for c in range(3)
        ),
    )  # fmt: skip
    baseline = lines(work / "baseline.jsonl", (json.loads(row) for row in sampled.read_text().splitlines()[::3]))
    annotated = lines(
        work / "annotated.jsonl",
        (
            {"id": str(i), "prompt": f"What of {i}?", "annotated": f"{FORKED * (i % 3 > 0)}Number {i}.", "tokens": 20,
             "chunks": 2 * (i % 3 > 0)}
            for i in range(120)
        ),
    )  # fmt: skip
    scored = lines(
        work / "scored.jsonl",
        (
            {
                "id": str(i), "choice": c, "prompt": f"What of {i}?", "annotated": f"{FORKED * c}plain {i} {c}",
                "finish_reason": "stop", "tokens": 40, "text_tokens": 30, "critical_path": 30 - 9 * c,
                "baseline_tokens": 40, "scorer": "pmi", "difference": float(c),
            }
            for i in range(rows // 16)
            for c in range(3)
        ),
    )  # fmt: skip
    options: list[str | Path] = ["--batch-tokens", "300", "--save-steps", "2"]
    start = work / "start"
    run(["train", "sft", annotated, "--out", start, *base, "--token-budget", "5000", *options], work / "start.log")
    # the model is packed, so that no command's time holds that
    run(["generate", "hello", *base, "--dtype", "float32", "--max-tokens", "2"], work / "start.log")
    return {
        "annotate": Command(lambda out: ["annotate", source, out, "--tokenizer", work / "model"], a_file),
        "sample": Command(
            lambda out: ["sample", prompts, out, *base, "--n", "2", "--temperature", "1", "--max-tokens", "48",
                         "--max-num-seqs", "4", "--dtype", "float32"], a_file
        ),
        "score": Command(
            lambda out: ["score", sampled, out, "--baseline", baseline, *base, "--tokenizer", work / "model"], a_file
        ),
        "eval": Command(
            lambda out: ["eval", "mine=none", "off=none:off", "lookup", "--prompts", few, "--baseline", "none",
                         "--out", out, *base, "--max-tokens", "24", "--scorer", "pmi", "--requests", "3",
                         "--timed", "2"], evaluated
        ),
        "sft": Command(
            lambda out: ["train", "sft", annotated, "--out", out, *base, "--token-budget", str(15 * rows),
                         "--lora-rank", "2", *options], trained
        ),
        "prefer": Command(
            lambda out: ["train", "prefer", scored, "--out", out, *base, "--start", start / "adapter", "--epochs", "2",
                         *options], trained
        ),
    }  # fmt: skip


# ------------------------------------------------------------------------------ running and killing


def begin(words: list[str | Path], log: Path) -> int:
    """Starts a command; its process id."""
    pid = os.fork()
    if pid:
        return pid
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pastalm.cli import app

    try:
        app([str(word) for word in words])
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    finally:
        os._exit(1)


def run(words: list[str | Path], log: Path) -> float:
    """Runs a command to its end; seconds."""
    started = time.perf_counter()
    _, status = os.waitpid(begin(words, log), 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - started


def kill(words: list[str | Path], seconds: float, log: Path) -> bool:
    """Runs a command for a while and kills it; whether it was still running."""
    pid = begin(words, log)
    time.sleep(seconds)
    running = os.waitpid(pid, os.WNOHANG) == (0, 0)
    if running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return running


def try_all(name: str, command: Command, work: Path, moments: int, rng: random.Random) -> int:
    """Says what happened; the moments after which something else was left."""
    log = work / f"{name}.log"
    seconds = run(command.words(work / f"{name}-whole"), log)
    whole, failed, killed, half = command.left(work / f"{name}-whole"), 0, 0, 0
    assert whole
    for moment in range(moments):
        out = work / "again" / f"{name}-whole"
        out.parent.mkdir(exist_ok=True)
        for _ in range(rng.choice((1, 1, 2))):
            killed += kill(command.words(out), rng.uniform(0, seconds), log)
        half += out.exists()
        run(command.words(out), log)
        left = command.left(out)
        if apart := [key for key in {*whole, *left} if whole.get(key) != left.get(key)]:
            failed += 1
            print(f"{name}, moment {moment}: {', '.join(sorted(apart))} differ", flush=True)
            shutil.copytree(out.parent, work / f"{name}-failed-{moment}")
        shutil.rmtree(out.parent)
    print(
        f"{name}: killed {killed} times at {moments} moments of {seconds:.1f} s, {half} of them after it had begun to "
        f"write; {moments - failed} left the same bytes",
        flush=True,
    )
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a quarter of the rows")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (chosen.keep or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        os.environ["PASTALM_CACHE"] = str(work / "cache")
        import pastalm.eval.evaluate
        import pastalm.train.preference
        import pastalm.train.sft  # noqa: F401

        commands = prepare(work, 100 if chosen.small else 400)
        rng = random.Random(chosen.seed)
        wanted = chosen.commands or list(commands)
        failed = sum(try_all(name, commands[name], work, chosen.moments, rng) for name in wanted)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
