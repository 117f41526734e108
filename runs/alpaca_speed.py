"""Speed of the shipped adapter on AlpacaEval prompts (see pastalm/eval/speed.py). Resumable.

    python runs/alpaca_speed.py PROMPTS.jsonl --out results/alpaca_speed.jsonl

PROMPTS: one JSON object a line with `instruction` and, if there is one, `id`. Nothing else should run
on the machine. Prints the table; records go to --out as they come, with ids instead of prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pastalm import LLM
from pastalm.eval.speed import markdown, run, summary


def main(
    prompts: Path,
    out: Annotated[Path, typer.Option(help="records, JSONL")] = Path("results/alpaca_speed.jsonl"),
    adapter: Annotated[str, typer.Option(help="auto, or a folder")] = "auto",
    limit: Annotated[int | None, typer.Option(help="prompts in this run")] = None,
    max_tokens: int = 1024,
    dtype: str = "auto",
) -> None:
    """Measures, and prints the table of all that is measured so far."""
    llm = LLM(adapter=adapter, dtype=dtype, max_num_seqs=1)
    records = run(llm, prompts, out, limit=limit, max_tokens=max_tokens)
    print(markdown(summary(records)))


if __name__ == "__main__":
    typer.run(main)
