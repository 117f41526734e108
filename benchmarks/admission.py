"""How long a decoding answer waits while long prompts are read.

    python benchmarks/admission.py [--engine native] [--prompts 3] [--length 3500]

One answer decodes, then several prompts arrive at once. Prints the milliseconds between its tokens (median and maximum)
before they arrive and while they are read, and the seconds until each of them has its first token. With a large
`--budget` they are read in one step.
"""

from __future__ import annotations

import argparse
import statistics
import time

from pastalm import LLM, SamplingParams
from pastalm.models.downloads import EMBEDDED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--length", type=int, default=3500)
    parser.add_argument("--budget", type=int, help="prompt tokens in a step in which others decode")
    args = parser.parse_args()
    llm = LLM(args.model, engine=args.engine, max_num_seqs=1 + args.prompts, max_model_len=args.length + 512)
    if args.budget:
        llm.driver.engine._budget = args.budget  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, parallelism=0)
    first = llm.submit("Once upon a time", params)

    def gap() -> float:
        """Milliseconds until the first answer has its next token."""
        begun, tokens = time.perf_counter(), first.transcript.tokens
        while first.transcript.tokens == tokens:
            llm.driver.step()
        return 1e3 * (time.perf_counter() - begun)

    before = [gap() for _ in range(60)][10:]
    begun = time.perf_counter()
    late = [
        llm.driver.submit([100 + i, *range(1000, 1000 + args.length)], params, positions=llm.positions)
        for i in range(args.prompts)
    ]
    during: list[float] = []
    waits: dict[str, float] = {}
    while len(waits) < len(late):
        during.append(gap())
        for response in late:
            if response.transcript.tokens:
                waits.setdefault(response.request.id, time.perf_counter() - begun)
    for when, gaps in (("before", before), ("while they are read", during)):
        print(f"{when}: {statistics.median(gaps):.1f} ms between tokens, at most {max(gaps):.1f}")
    print("first tokens after", ", ".join(f"{seconds:.1f} s" for seconds in waits.values()))


if __name__ == "__main__":
    main()
