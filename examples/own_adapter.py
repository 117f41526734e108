"""Teaches a model to fork on your own answers, and asks it: annotate, train, load.

    python examples/own_adapter.py answers.jsonl runs/out/mine "Give me five tips for staying healthy."

ANSWERS has a row an answer: {"prompt": "...", "response": "..."}; some hundreds, lists and plain text, are a start (16
prompts are held out). Interrupted and started again, each command continues where it was.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from pastalm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a hub name or a folder")
    chosen = parser.parse_args()

    chosen.out.mkdir(parents=True, exist_ok=True)
    annotated = chosen.out / "annotated.jsonl"
    pasta("annotate", chosen.answers, annotated, "--tokenizer", chosen.model)
    pasta("train", "sft", annotated, "--out", chosen.out / "run", "--model", chosen.model)

    with LLM(chosen.model, adapter=str(chosen.out / "run" / "adapter")) as llm:
        messages = [{"role": "user", "content": chosen.prompt}]
        answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=256))[0].outputs[0]
    print(answer.text)
    print(f"{len(answer.transcript.threads) - 1} chunks, parallelism {answer.transcript.parallelism:.2f}")


def pasta(*arguments: object) -> None:
    """Runs a command; ends with its exit code if it fails."""
    done = subprocess.run(["pasta", *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
