"""Checks that drafts do not change a real model's answers: replays every token (SPEC "equal").

    python runs/lossless.py PROMPTS.jsonl --limit 50

In one forward pass over an answer, the logit of each token must be within a tolerance of the largest one: 1e-3 in
float32, 0.5 in bfloat16. Prompt lookup and LLMA are the model with forking off; then its threads with all drafters.
Every guess is fed, as if rows cost nothing. Prints the largest gap, the number of answers that are identical to those
without drafts, and the forward passes that drafts saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pastalm import LLM, SamplingParams
from pastalm.core.driver import Response
from pastalm.core.events import Event
from pastalm.engines.batching import BatchingEngine
from pastalm.engines.drafts.budget import StepCosts
from pastalm.eval.replay import replay
from pastalm.models import loading
from pastalm.records import prompts
from pastalm.records.prompts import Prompt
from pastalm.records.transcripts import linear_tokens

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
FREE = StepCosts(lambda rows: 1 + rows * 1e-6)


@dataclass(frozen=True)
class Method:
    """How answers are drafted, and whether they fork."""

    name: str
    drafts: str
    parallelism: float


METHODS = (
    Method("prompt lookup", "lookup", 0.0),
    Method("LLMA", "references", 0.0),
    Method("threads, all drafters", "auto", 1.0),
)


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
    reference = loading.load(adapter=chosen, dtype=dtype).model
    engine = llm.driver.engine
    assert isinstance(engine, BatchingEngine)
    engine._drafting.costs = FREE
    worst = 0.0
    for method in METHODS:
        far: list[float] = []
        same = tokens = passes = accepted = 0
        asked = prompts.read(source, limit)
        for prompt in asked:
            own, _ = _decode(llm, prompt, _params(prompt, method, max_tokens, "off"))
            found, events = _decode(llm, prompt, _params(prompt, method, max_tokens, method.drafts))
            far += replay(reference, found.prompt_token_ids, events, llm.positions)
            same += list(linear_tokens(found.transcript)) == list(linear_tokens(own.transcript))
            tokens, passes = tokens + found.transcript.tokens, passes + found.transcript.passes
            accepted += found.transcript.accepted.total()
        print(
            f"{method.name}: {len(asked)} answers, {tokens} tokens in {passes} passes ({tokens / passes:.2f} a pass, "
            f"{accepted} guesses came true); worst gap {max(far):.2g} (tolerance {TOLERANCE[dtype]}); "
            f"{same} as without drafts, token for token",
            flush=True,
        )
        worst = max(worst, *far)
    raise typer.Exit(worst > TOLERANCE[dtype])


def _params(prompt: Prompt, method: Method, max_tokens: int, drafts: str) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        parallelism=method.parallelism,
        drafts=drafts,
        references=prompt.references,
    )


def _decode(llm: LLM, prompt: Prompt, params: SamplingParams) -> tuple[Response, Sequence[Event]]:
    response = llm.stream([{"role": "user", "content": prompt.text}], params)
    return response, list(response)


if __name__ == "__main__":
    typer.run(main)
