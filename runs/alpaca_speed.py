"""Speed of the shipped adapter on AlpacaEval prompts (see pastalm/eval/speed.py). Resumable.

    python runs/alpaca_speed.py PROMPTS.jsonl --out results/alpaca_speed.jsonl

PROMPTS: one JSON object a line with `instruction` and, if there is one, `id`. Nothing else should run
on the machine. Records go to --out as they come, with ids instead of prompts; the table is printed and
written beside them. --limit 0 only draws it from the records that are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pastalm import LLM
from pastalm.eval.speed import markdown, read_records, run, summary
from pastalm.models import EMBEDDED


def main(
    prompts: Path,
    out: Annotated[Path, typer.Option(help="records, JSONL")] = Path("results/alpaca_speed.jsonl"),
    model: Annotated[str, typer.Option(help="a name, a folder, or a GGUF file")] = EMBEDDED,
    adapter: Annotated[str, typer.Option(help="auto, or a folder")] = "auto",
    limit: Annotated[int | None, typer.Option(help="prompts in this run")] = None,
    max_tokens: int = 1024,
    dtype: str = "auto",
) -> None:
    """Measures, and prints the table of all that is measured so far."""
    if limit == 0:
        records = read_records(out)
    else:
        llm = LLM(model, adapter=adapter, dtype=dtype, max_num_seqs=1)
        records = run(llm, prompts, out, limit=limit, max_tokens=max_tokens)
    if not records:
        raise SystemExit(f"{out} holds no records yet: give no --limit, or one above 0")
    forking = [record for record in records if record.chunks >= 2]
    text = "## All prompts\n\n" + markdown(summary(records))
    if forking:
        text += "\n## Those that fork (2 chunks or more)\n\n" + markdown(summary(forking))
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
