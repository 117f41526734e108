"""Checks that copied drafts do not change a real model's answers: replays every token (SPEC "equal").

    python runs/lossless.py PROMPTS.jsonl --limit 50

In one forward pass over an answer, the logit of each token must be within a tolerance of the largest one: 1e-3 in
float32, 0.5 in bfloat16. Prints the largest gap, the number of answers that are identical to the engine's own, and the
forward passes that copying saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pastalm import LLM, SamplingParams
from pastalm.core.events import TokenSet
from pastalm.eval.baselines.copying import Copying
from pastalm.eval.replay import ForwardPass, gaps
from pastalm.records import prompts

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def main(
    source: Annotated[Path, typer.Argument(help="prompts, with references for LLMA")],
    limit: int = 50,
    max_tokens: int = 256,
    dtype: str = "float32",
    adapter: str = "auto",
) -> None:
    """Prints a line for each method; exits with 1 if a token lies outside the tolerance."""
    chosen = None if adapter == "none" else adapter
    llm = LLM(engine="transformers", adapter=chosen, dtype=dtype, max_num_seqs=1)
    asked = prompts.read(source, limit)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, parallelism=0)
    own = {p.id: llm.chat([{"role": "user", "content": p.text}], params)[0].outputs[0].token_ids for p in asked}
    methods = [Copying("prompt lookup", llm), Copying("LLMA", llm, "references")]
    worst = 0.0
    for method in methods:
        found = {p.id: method.decode(p, max_tokens) for p in asked}
        far = [max(_gaps(llm, method.prompt_ids(p), found[p.id].tokens)) for p in asked]
        same = sum(tuple(found[p.id].tokens) == tuple(own[p.id]) for p in asked)
        tokens, passes = (sum(n) for n in zip(*((len(f.tokens), f.passes) for f in found.values()), strict=True))
        print(
            f"{method.name}: {len(asked)} answers, {tokens} tokens in {passes} passes ({tokens / passes:.2f} a pass); "
            f"worst gap {max(far):.2g} (tolerance {TOLERANCE[dtype]}); {same} as the engine's own, token for token",
            flush=True,
        )
        worst = max(worst, *far)
    raise typer.Exit(worst > TOLERANCE[dtype])


def _gaps(llm: LLM, prompt: list[int], tokens: list[int]) -> list[float]:
    tags = llm.loaded.vocabulary.tags
    allowed = TokenSet.all_but(*tags.ids) if tags else None
    return gaps(llm.loaded.model, ForwardPass.plain(prompt, tokens, allowed))


if __name__ == "__main__":
    typer.run(main)
