"""Asks a model from Python: one answer as it is decoded, then several at once.

python examples/library.py "Give me five tips for staying healthy."
"""

from __future__ import annotations

import sys

from pastalm import LLM, SamplingParams

PROMPT = "Give me five tips for staying healthy, each with a short explanation."


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
    messages = [{"role": "user", "content": prompt}]
    with LLM() as llm:
        response = llm.stream(messages, SamplingParams(temperature=0, max_tokens=512))
        written = 0
        for _ in response:  # events; what is settled of the text does not change any more
            print(response.transcript.settled[written:], end="", flush=True)
            written = len(response.transcript.settled)
        print(response.transcript.text[written:])
        figures = response.transcript
        print(f"\n{figures.tokens} tokens, {len(figures.threads)} threads, {figures.steps} steps", file=sys.stderr)

        questions = [[{"role": "user", "content": f"Name a {thing}."}] for thing in ("river", "city", "bird")]
        for reply in llm.chat(questions, SamplingParams(temperature=0.7, seed=1, max_tokens=64)):
            print("-", reply.outputs[0].text.strip())


if __name__ == "__main__":
    main()
