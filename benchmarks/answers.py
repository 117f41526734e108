"""Seconds per answer, asynchronous on our engines, against the fastest sequential decoding there is here.

    pasta export q4_0.gguf --gguf Q4_0 --adapter adapters/lambda2
    python benchmarks/answers.py PROMPTS.jsonl --native adapters/lambda2 --against q4_0.gguf --out answers.jsonl

Each prompt is answered greedily by each engine; the text that came out is then decoded once more
sequentially, forced, by llama.cpp's own API with the file of `--against`, and by the engine itself: the same
text in all, so an answer that is only shorter gains nothing. The native engine has weights of that file's type
unless `--dtype` says otherwise; `--drafts off auto` has it answer once without drafts and once with, each with a memory
of earlier answers of its own. `cost` is time / (sequential time / theoretical
speedup), length-matched: 1.0 where threads are free and a step costs what it costs there. `own` is the engine's
own sequential time over its time, `own of theory` that over the theoretical speedup: 1.0 where threads are free.
Resumable; figures are geometric means over prompts with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from forkjoin import LlamaCpp, processor

from pastalm import LLM, SamplingParams
from pastalm.core.events import Decoded, Forked
from pastalm.core.params import Request
from pastalm.eval.intervals import Mean, mean
from pastalm.records import prompts


@dataclass(frozen=True)
class Answer:
    """One prompt on one system. passes: forward passes of the answer. sequential: seconds for the same text on the
    system compared with; own: on the same engine, one token after the other."""

    id: str
    system: str
    tokens: int
    text_tokens: int
    critical_path: int
    passes: int
    seconds: float
    sequential: float
    own: float

    @property
    def figures(self) -> dict[str, float]:
        theoretical = self.text_tokens / self.critical_path
        speedup = self.sequential / self.seconds
        return {
            "theoretical": theoretical,
            "tokens a pass": self.text_tokens / self.passes,
            "realized": speedup,
            "cost": theoretical / speedup,
            "own": self.own / self.seconds,
            "own of theory": self.own / self.seconds / theoretical,
            "seconds": self.seconds,
            "sequential seconds": self.sequential,
        }


@dataclass(frozen=True)
class System:
    """An engine, and how it drafts."""

    llm: LLM
    drafts: str = "auto"


def answer(name: str, system: System, against: LlamaCpp, identity: str, prompt: str) -> Answer:
    llm = system.llm
    llm.driver.engine.forget()  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=1024, drafts=system.drafts)
    stream = llm.stream([{"role": "user", "content": prompt}], params)
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
        passes=found.passes,
        seconds=found.seconds,
        sequential=against.force(list(stream.prompt_token_ids), text),
        own=force(llm, stream.prompt_token_ids, text),
    )


def force(llm: LLM, prompt: tuple[int, ...], tokens: list[int]) -> float:
    """Seconds to decode given tokens one by one after a prompt on the engine alone, prefill included."""
    engine, name = llm.driver.engine, "forced"
    engine.forget()  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=len(tokens) + 8, drafts="off")
    begun = time.perf_counter()
    engine.add(Request(id=name, prompt_token_ids=prompt, params=params, positions=llm.positions))
    engine.apply(name, Forked(path=()))
    for token in tokens:
        engine.step()
        engine.apply(name, Decoded(path=(), token=token))
    seconds = time.perf_counter() - begun
    engine.cancel(name)
    return seconds


def weight_type(file: Path) -> str:
    """What the matrices of a GGUF file are, as `dtype` says it."""
    import gguf

    named = gguf.GGMLQuantizationType
    names = {named.Q4_0: "q4_0", named.Q8_0: "q8_0", named.BF16: "bfloat16", named.F16: "float16", named.F32: "float32"}
    tensors = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    return names.get(tensors["blk.0.attn_q.weight"], "auto")


def means(answers: list[Answer]) -> dict[str, dict[str, Mean]]:
    """All figures of each system, and of its answers that fork, by name."""
    named: dict[str, list[dict[str, float]]] = {}
    for a in answers:
        named.setdefault(a.system, []).append(a.figures)
    for a in answers:
        if a.critical_path < a.tokens:
            named.setdefault(f"{a.system}, those that fork", []).append(a.figures)
    return {
        name: {key: mean([figures[key] for figures in own], "geometric") for key in own[0]}
        for name, own in named.items()
    }


def table(answers: list[Answer]) -> str:
    columns = list(answers[0].figures) if answers else []
    lines = [f"| system | prompts | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
    for name, own in means(answers).items():
        lines.append(f"| {name} | {own[columns[0]].n} | {' | '.join(map(str, own.values()))} |")
    return "\n".join(lines)


def summary(answers: list[Answer], against: str) -> str:
    """The same as JSON, in the form of `figures.json` of `pasta eval`. against: what it is compared with."""
    systems = {
        name: {"figures": {key: value.to_dict() for key, value in own.items()}} for name, own in means(answers).items()
    }
    head = {"processor": processor(), "against": f"llama.cpp, sequential, {against}"}
    return json.dumps({**head, "systems": systems}, indent=1) + "\n"


def against_without(answers: list[Answer]) -> str:
    """Answers with drafts against those without, prompt by prompt: how many times as fast, that of the slowest
    twentieth of the prompts, and how many are the same answer by their number of tokens."""
    lines = []
    for name in sorted({a.system for a in answers if not a.system.endswith("drafts off")}):
        without = {a.id: a for a in answers if a.system == f"{name.partition(', drafts')[0]}, drafts off"}
        pairs = [(without[a.id], a) for a in answers if a.system == name and a.id in without]
        if not pairs:
            continue
        ratios = sorted(off.seconds / on.seconds for off, on in pairs)
        passes = mean([off.passes / on.passes for off, on in pairs], "geometric")
        same = sum(off.tokens == on.tokens for off, on in pairs)
        lines.append(
            f"{name}: {mean(ratios, 'geometric')} times as fast as without, {passes} in passes; at the 5th percentile "
            f"{ratios[len(ratios) // 20]:.2f}; {same} of {len(pairs)} have as many tokens"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL with `instruction`")
    parser.add_argument("--native", action="append", default=[], metavar="ADAPTER", help="on our native engine")
    parser.add_argument("--dtype", help="weights of the native engine (those of --against, so that both read as much)")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="for our llama.cpp engine")
    parser.add_argument("--against", type=Path, required=True, help="for llama.cpp, sequential")
    parser.add_argument("--transformers", action="store_true", help="and on transformers, the adapter that ships")
    parser.add_argument("--drafts", nargs="+", default=["auto"], help="of the native engine, a system each")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, help="where the figures go, as JSON (see runs/figures.py)")
    chosen = parser.parse_args()
    named = [(p.id, p.text) for p in prompts.read(chosen.prompts)]
    random.Random(chosen.seed).shuffle(named)
    done = []
    if chosen.out.is_file():
        done = [Answer(**json.loads(line)) for line in chosen.out.read_text().splitlines()]
    there = {(a.id, a.system) for a in done}
    systems = {
        f"ours, llama.cpp, {path.stem}": System(LLM(str(path), engine="llama.cpp", max_num_seqs=1))
        for path in chosen.gguf
    }
    dtype = chosen.dtype or weight_type(chosen.against)
    for adapter in chosen.native:
        for drafts in chosen.drafts:
            name = f"ours, native, {Path(adapter).name}, {dtype}, drafts {drafts}"
            systems[name] = System(LLM(engine="native", adapter=adapter, dtype=dtype, max_num_seqs=1), drafts)
    if chosen.transformers:
        systems["ours, transformers"] = System(LLM(engine="transformers", max_num_seqs=1))
    if not systems:
        parser.error("give a system: --native, --gguf or --transformers")
    against = LlamaCpp(chosen.against, 4096)
    for turn, (identity, prompt) in enumerate(named[: chosen.limit]):
        order = list(systems.items())
        for name, system in order[turn % len(order) :] + order[: turn % len(order)]:
            if (identity, name) in there:
                continue
            done.append(answer(name, system, against, identity, prompt))
            with chosen.out.open("a") as file:
                file.write(json.dumps(asdict(done[-1])) + "\n")
            f = done[-1].figures
            print(f"{turn + 1} {identity} {name}: realized {f['realized']:.2f}, cost {f['cost']:.2f}", flush=True)
    if chosen.summary is not None:
        chosen.summary.write_text(summary(done, chosen.against.name))
    print(f"{table(done)}\n\n{against_without(done)}\n{processor()}; against {chosen.against.name}")


if __name__ == "__main__":
    main()
