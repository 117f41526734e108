"""Seconds per answer, asynchronous on our engines, against the fastest sequential decoding there is here.

    pasta export q4_0.gguf --gguf Q4_0 && pasta export q8_0.gguf --gguf Q8_0
    python benchmarks/answers.py PROMPTS.jsonl --gguf q8_0.gguf --against q4_0.gguf --out answers.jsonl

Each prompt is answered greedily by each engine; the text that came out is then decoded once more
sequentially, forced, by llama.cpp's own API with the file of `--against`: the same text in both, so an
answer that is only shorter gains nothing. `cost` is time / (sequential time / theoretical speedup),
length-matched: 1.0 where threads are free and a step costs what it costs there. Resumable; figures are
geometric means over prompts with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from forkjoin import LlamaCpp

from pastalm import LLM, SamplingParams, prompts
from pastalm.eval.means import mean


@dataclass(frozen=True)
class Answer:
    """One prompt on one system. sequential: seconds for the same text on the system compared with."""

    id: str
    system: str
    tokens: int
    text_tokens: int
    critical_path: int
    seconds: float
    sequential: float

    @property
    def figures(self) -> dict[str, float]:
        theoretical = self.text_tokens / self.critical_path
        speedup = self.sequential / self.seconds
        return {
            "theoretical": theoretical,
            "realized": speedup,
            "cost": theoretical / speedup,
            "seconds": self.seconds,
            "sequential seconds": self.sequential,
        }


def answer(name: str, llm: LLM, against: LlamaCpp, identity: str, prompt: str) -> Answer:
    llm.driver.engine.forget()  # type: ignore[attr-defined]
    stream = llm.stream(
        [{"role": "user", "content": prompt}], SamplingParams(temperature=0, max_tokens=1024)
    )
    for _ in stream:
        pass
    found = stream.transcript
    vocabulary = llm.loaded.vocabulary
    text = [*vocabulary.encode(found.text), min(vocabulary.eos)]
    return Answer(
        id=identity,
        system=name,
        tokens=found.tokens,
        text_tokens=len(text),
        critical_path=found.critical_path,
        seconds=found.seconds,
        sequential=against.force(list(stream.prompt_token_ids), text),
    )


def table(answers: list[Answer]) -> str:
    lines = ["| system | prompts | theoretical | realized | cost | seconds | sequential seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    named: dict[str, list[dict[str, float]]] = {}
    for a in answers:
        named.setdefault(a.system, []).append(a.figures)
    for a in answers:
        if a.critical_path < a.tokens:
            named.setdefault(f"{a.system}, those that fork", []).append(a.figures)
    for name, own in named.items():
        cells = [str(mean([figures[key] for figures in own], "geometric")) for key in own[0]]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL with `instruction`")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="for our llama.cpp engine")
    parser.add_argument("--against", type=Path, required=True, help="for llama.cpp, sequential")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    named = [(p.id, p.text) for p in prompts.read(chosen.prompts)]
    random.Random(chosen.seed).shuffle(named)
    done = []
    if chosen.out.is_file():
        done = [Answer(**json.loads(line)) for line in chosen.out.read_text().splitlines()]
    there = {(a.id, a.system) for a in done}
    systems = {
        f"ours, llama.cpp, {path.stem}": LLM(str(path), engine="llama.cpp", max_num_seqs=1) for path in chosen.gguf
    }
    if not chosen.no_transformers:
        systems["ours, transformers"] = LLM(engine="transformers", max_num_seqs=1)
    against = LlamaCpp(chosen.against, 4096)
    for turn, (identity, prompt) in enumerate(named[: chosen.limit]):
        order = list(systems.items())
        for name, llm in order[turn % len(order) :] + order[: turn % len(order)]:
            if (identity, name) in there:
                continue
            done.append(answer(name, llm, against, identity, prompt))
            with chosen.out.open("a") as file:
                file.write(json.dumps(asdict(done[-1])) + "\n")
            f = done[-1].figures
            print(f"{turn + 1} {identity} {name}: realized {f['realized']:.2f}, cost {f['cost']:.2f}", flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
