"""Spec-Bench's tasks with threads, with drafts and with both, against the same engine one token after the other.

    python benchmarks/spec_bench.py question.jsonl --adapter adapters/lambda2 --limit 10 --out spec_bench.jsonl
    python benchmarks/spec_bench.py question.jsonl --grounded --adapter adapters/lambda2 --limit 10 --out grounded.jsonl

question.jsonl is Spec-Bench's (Xia et al., arXiv 2401.07851; hemingkx/Spec-Bench, data/spec_bench), of which the first
turns are asked, `--limit` of each task at equal distances. `--grounded` takes the tasks whose answer stands in a text
that is given along: summarisation, retrieval, and the edits of `benchmarks/edits.jsonl`; that text is the drafts'
reference. `--tasks` names some of the tasks.

One request at a time, greedy, prompts read anew each time, all systems on one native engine in rotating order. Each
text that came out is decoded once more, forced, one token after the other: `realized` is the seconds of that over the
answer's, `decoding` the same without the time to the first token, `theoretical` the text's tokens over the critical
path, `tokens a pass` over forward passes. `cut off`: share of answers that ended at `--max-tokens`; models that small
often repeat themselves until then, which drafts guess well, so `ended` gives `realized` without those. Geometric means
over prompts with 95 % bootstrap intervals. Resumable.

`--transformers` measures transformers' own prompt lookup too (`prompt_lookup_num_tokens`), and `--gguf FILE` that of
llama.cpp (llama-cpp-python's `LlamaPromptLookupDecoding`), each held against the same without.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from forkjoin import processor

from pastalm import LLM, SamplingParams
from pastalm.core.events import Decoded, Forked
from pastalm.core.params import Request
from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.native.model import processors
from pastalm.eval.intervals import mean
from pastalm.eval.measure import evenly_spaced
from pastalm.models import loading
from pastalm.records import prompts
from pastalm.records.prompts import Prompt

TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
CONVERSATION = "conversation"
"""Spec-Bench's sixth task, MT-bench's prompts, whose rows have MT-bench's categories."""
GROUNDED = ("summarization", "rag", "edits")
EDITS = Path(__file__).with_name("edits.jsonl")
DRAFTED = 10
"""Tokens that transformers drafts at once, as in its documentation."""
DRAFTED_LLAMA_CPP = 2
"""Those that llama-cpp-python does, as it recommends for CPUs."""


@dataclass(frozen=True)
class Setting:
    """How a system decodes. References are given where `drafts` may take them."""

    parallelism: float
    drafts: str


SETTINGS = {
    "sequential": Setting(0.0, "off"),
    "lookup": Setting(0.0, "lookup"),
    "threads": Setting(1.0, "off"),
    "threads, drafts": Setting(1.0, "auto"),  # the only one that remembers its answers
}
WITH_REFERENCES = {"references": Setting(0.0, "lookup,references")}


@dataclass(frozen=True)
class Timed:
    """One answer. first: seconds to its first token. forced, forced_first: of the same text, one token after the other.

    text: that it said, tags removed. text_tokens: of that, with the end token if it came.
    """

    id: str
    task: str
    system: str
    text: str
    tokens: int
    text_tokens: int
    critical_path: int
    passes: int
    finish_reason: str
    seconds: float
    first: float
    forced: float = 0.0
    forced_first: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        table = {
            "theoretical": self.text_tokens / self.critical_path,
            "tokens a pass": self.text_tokens / self.passes,
            "realized": self.forced / self.seconds,
        }
        if self.text_tokens > 2:
            table["decoding"] = (self.forced - self.forced_first) / (self.seconds - self.first)
        if self.finish_reason == "stop":
            table["ended"] = table["realized"]
        return table


COLUMNS = ("theoretical", "tokens a pass", "realized", "decoding", "ended")

# ------------------------------------------------------------------------------ prompts


def task(prompt: Prompt) -> str:
    return prompt.category if prompt.category in (*TASKS, "edits") else CONVERSATION


def reference(prompt: Prompt) -> str:
    """What the answer is drawn from: the article, the passages, the text to edit."""
    if task(prompt) == "edits":
        return prompt.text.partition("\n\n")[2]
    return prompt.text.removeprefix("Summarize: ")


def chosen_prompts(file: Path, tasks: Sequence[str], limit: int) -> list[Prompt]:
    """Some of each task, the tasks in turn."""
    every = [*prompts.read(file), *prompts.read(EDITS)]
    by_task = [evenly_spaced([p for p in every if task(p) == name], limit) for name in tasks]
    return [own[i] for i in range(limit) for own in by_task if i < len(own)]


# ------------------------------------------------------------------------------ our engine


def answer(llm: LLM, name: str, setting: Setting, prompt: Prompt, max_tokens: int, *, grounded: bool) -> Timed:
    llm.driver.engine.forget()  # type: ignore[attr-defined]
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        parallelism=setting.parallelism,
        drafts=setting.drafts,
        references=[reference(prompt)] if grounded else None,
    )
    stream = llm.stream([{"role": "user", "content": prompt.text}], params)
    first = 0.0
    for event in stream:
        if not first and isinstance(event, Decoded):
            first = stream.transcript.seconds
    found = stream.transcript
    vocabulary = llm.loaded.vocabulary
    ending = [min(vocabulary.eos)] if found.finish_reason == "stop" else []
    said = [*vocabulary.encode(found.text), *ending]
    timed = Timed(
        id=prompt.id,
        task=task(prompt),
        system=name,
        text=found.text,
        tokens=found.tokens,
        text_tokens=len(said),
        critical_path=found.critical_path,
        passes=found.passes,
        finish_reason=str(found.finish_reason),
        seconds=found.seconds,
        first=first,
    )
    forced, forced_first = force(llm, stream.prompt_token_ids, said)
    return replace(timed, forced=forced, forced_first=forced_first)


def force(llm: LLM, prompt: tuple[int, ...], tokens: list[int]) -> tuple[float, float]:
    """Seconds to decode given tokens one after the other, prompt included, and to the first of them."""
    engine, name = llm.driver.engine, "forced"
    engine.forget()  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=len(tokens) + 8, drafts="off")
    begun, first = time.perf_counter(), 0.0
    engine.add(Request(id=name, prompt_token_ids=prompt, params=params, positions=llm.positions))
    engine.apply(name, Forked(path=()))
    for token in tokens:
        engine.step()
        first = first or time.perf_counter() - begun
        engine.apply(name, Decoded(path=(), token=token))
    seconds = time.perf_counter() - begun
    engine.cancel(name)
    return seconds, first


# ------------------------------------------------------------------------------ transformers


class Transformers:
    """transformers' `generate`, greedy, without tags: with its prompt lookup or without."""

    def __init__(self, adapter: str, dtype: str) -> None:
        loaded = loading.load(adapter=adapter, dtype=dtype)
        self.model, self.vocabulary = loaded.model.eval(), loaded.vocabulary
        self._passes = 0
        self.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._passes += 1

    @torch.inference_mode()
    def answer(self, prompt: Prompt, ids: list[int], max_tokens: int) -> Timed:
        """Its answer with prompt lookup; without is what it is held against."""
        plain, _, sequential = self._generate(ids, max_tokens)
        drafted, passes, seconds = self._generate(ids, max_tokens, prompt_lookup_num_tokens=DRAFTED)
        return by_token(
            prompt, "transformers, prompt lookup", self.vocabulary, drafted, passes, seconds, sequential / len(plain)
        )

    def _generate(self, ids: list[int], max_tokens: int, **options: Any) -> tuple[list[int], int, float]:
        tags = self.vocabulary.tags
        self._passes, begun = 0, time.perf_counter()
        out = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=sorted(self.vocabulary.eos),
            pad_token_id=min(self.vocabulary.eos),
            suppress_tokens=list(tags) if tags else None,
            **options,
        )
        return out[0, len(ids) :].tolist(), self._passes, time.perf_counter() - begun


def by_token(
    prompt: Prompt, system: str, vocabulary: Vocabulary, ids: list[int], passes: int, seconds: float, forced: float
) -> Timed:
    """The answer of another library, timed by token: a draft may turn a token where roundings tie. forced: seconds that
    a token takes it without drafts."""
    ended = ids[-1] in vocabulary.eos
    return Timed(
        id=prompt.id,
        task=task(prompt),
        system=system,
        text=vocabulary.text(ids[:-1] if ended else ids),
        tokens=len(ids),
        text_tokens=len(ids),
        critical_path=len(ids),
        passes=passes,
        finish_reason="stop" if ended else "length",
        seconds=seconds / len(ids),
        first=0.0,
        forced=forced,
    )


# ------------------------------------------------------------------------------ llama.cpp


class LlamaCpp:
    """llama.cpp, greedy, without tags: with llama-cpp-python's prompt lookup or without."""

    def __init__(self, gguf: Path, vocabulary: Vocabulary) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        options: dict[str, Any] = {"n_ctx": 2048, "n_threads": processors(), "verbose": False}
        drafter = LlamaPromptLookupDecoding(num_pred_tokens=DRAFTED_LLAMA_CPP)
        self._plain = Llama(str(gguf), **options)
        self._drafting = Llama(str(gguf), **options, draft_model=drafter, logits_all=True)
        self._vocabulary = vocabulary

    def answer(self, prompt: Prompt, ids: list[int], max_tokens: int) -> Timed:
        plain, _, sequential = self._generate(self._plain, ids, max_tokens)
        drafted, passes, seconds = self._generate(self._drafting, ids, max_tokens)
        forced = sequential / len(plain)
        return by_token(prompt, "llama.cpp, prompt lookup", self._vocabulary, drafted, passes, seconds, forced)

    def _generate(self, llama: Any, ids: list[int], max_tokens: int) -> tuple[list[int], int, float]:
        from llama_cpp import LogitsProcessorList

        tags = list(self._vocabulary.tags or ())

        def without_tags(_: Any, logits: Any) -> Any:
            logits[tags] = -float("inf")
            return logits

        llama.reset()
        evaluate, passes = llama.eval, 0

        def counted(tokens: Any) -> None:
            nonlocal passes
            passes += 1
            evaluate(tokens)

        llama.eval = counted
        begun, tokens = time.perf_counter(), list[int]()
        for token in llama.generate(ids, temp=0.0, logits_processor=LogitsProcessorList([without_tags])):
            tokens.append(token)
            if token in self._vocabulary.eos or len(tokens) == max_tokens:
                break
        llama.eval = evaluate
        return tokens, passes, time.perf_counter() - begun


# ------------------------------------------------------------------------------ tables


def table(answers: Sequence[Timed]) -> str:
    lines = [f"| task | system | prompts | {' | '.join(COLUMNS)} | cut off |", "| --- " * (len(COLUMNS) + 4) + "|"]
    for name in [*dict.fromkeys(a.task for a in answers), "all"]:
        for system in dict.fromkeys(a.system for a in answers):
            own = [a for a in answers if a.system == system and name in (a.task, "all")]
            if own:
                cut = sum(a.finish_reason == "length" for a in own) / len(own)
                cells = [_cell([a.figures[key] for a in own if key in a.figures]) for key in COLUMNS]
                lines.append(f"| {name} | {system} | {len(own)} | {' | '.join(cells)} | {cut:.2f} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return str(mean(values, "geometric")) if values else ""


def changed(answers: Sequence[Timed]) -> str:
    """How many texts drafts have changed: none, if all is well."""
    said = {(a.id, a.system): a.text for a in answers}
    twins = (("lookup", "sequential"), ("references", "sequential"), ("threads, drafts", "threads"))
    pairs = [
        (text, said[i, off]) for (i, on), text in said.items() for to, off in twins if on == to and (i, off) in said
    ]
    return f"{sum(a != b for a, b in pairs)} of {len(pairs)} answers differ from those without drafts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path, help="Spec-Bench's question.jsonl")
    parser.add_argument("--grounded", action="store_true", help="tasks with a text to draw from, given as reference")
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, CONVERSATION, "edits"))
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--dtype", default="auto", help="weights of the native engine")
    parser.add_argument("--limit", type=int, default=10, help="prompts a task")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--transformers", nargs="?", const="bfloat16", metavar="DTYPE", help="its prompt lookup too")
    parser.add_argument("--gguf", type=Path, help="llama.cpp's prompt lookup too, on this file")
    parser.add_argument("--systems", nargs="+", help="some of the systems only")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    tasks = chosen.tasks or (GROUNDED if chosen.grounded else (*TASKS, CONVERSATION))
    settings = {**SETTINGS, **WITH_REFERENCES} if chosen.grounded else SETTINGS
    done = [Timed(**json.loads(line)) for line in chosen.out.read_text().splitlines()] if chosen.out.is_file() else []
    there = {(a.id, a.system) for a in done}
    llm = LLM(engine="native", adapter=chosen.adapter, dtype=chosen.dtype, max_num_seqs=1)
    warm = SamplingParams(temperature=0, max_tokens=128, drafts="lookup,siblings")
    llm.chat([{"role": "user", "content": "List the days of the week, twice."}], warm)  # what passes cost is learnt

    def ours(name: str, setting: Setting) -> Callable[[Prompt], Timed]:
        return lambda prompt: answer(llm, name, setting, prompt, chosen.max_tokens, grounded=chosen.grounded)

    systems = {name: ours(name, setting) for name, setting in settings.items()}
    if chosen.transformers:
        theirs = Transformers(chosen.adapter, chosen.transformers)
        plain = SamplingParams(parallelism=0)
        systems["transformers, prompt lookup"] = lambda prompt: theirs.answer(
            prompt, llm.encode([{"role": "user", "content": prompt.text}], plain), chosen.max_tokens
        )
    if chosen.gguf:
        other = LlamaCpp(chosen.gguf, llm.loaded.vocabulary)
        untagged = SamplingParams(parallelism=0)
        systems["llama.cpp, prompt lookup"] = lambda prompt: other.answer(
            prompt, llm.encode([{"role": "user", "content": prompt.text}], untagged), chosen.max_tokens
        )
    systems = {name: system for name, system in systems.items() if name in (chosen.systems or systems)}
    for turn, prompt in enumerate(chosen_prompts(chosen.questions, tasks, chosen.limit)):
        order = list(systems)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if (prompt.id, name) in there:
                continue
            done.append(systems[name](prompt))
            with chosen.out.open("a") as file:
                file.write(json.dumps(asdict(done[-1])) + "\n")
            f = done[-1].figures
            print(
                f"{turn + 1} {prompt.id} {task(prompt)}, {name}: realized {f['realized']:.2f}, "
                f"{f['tokens a pass']:.2f} a pass",
                flush=True,
            )
    done.sort(key=lambda a: list(systems).index(a.system) if a.system in systems else len(systems))
    print(f"{table(done)}\n\n{changed(done)}; {processor()}")


if __name__ == "__main__":
    main()
