"""Seconds per answer over a completions server, asynchronous against sequential on the same server.

    vllm serve MODEL --max-model-len 4096          # prefix caching is on by default
    python benchmarks/remote.py PROMPTS.jsonl --url http://127.0.0.1:8000/v1 --model MODEL

One request at a time, greedy. For each prompt both kinds alternate, over several rounds; its prompt is in the server's
cache before it is timed. `realized` is seconds sequential / asynchronous; `a character` is the same for each character
of the reader's text, so that a shorter answer is not a speedup; `theoretical` is tokens sequential / critical path.
vLLM and llama.cpp's server (with --metrics) report how many prompt tokens were in the prefix cache. `dropped` is the
share of received tokens that were not used, since a completion runs ahead of the interpreter.

    python benchmarks/remote.py PROMPTS.jsonl --url … --model … --tokenizer FOLDER --check

measures no times. It replays both kinds of answers through plain transformers with the weights in FOLDER, in float32,
with a forward pass for each completion, and prints how far the logit of each token is below the largest one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from pastalm import LLM, SamplingParams
from pastalm.core.events import Decoded, Event, Path, TokenSet
from pastalm.core.transcript import Transcript
from pastalm.engines.completions.engine import OpenAIEngine
from pastalm.engines.completions.wire import Ids
from pastalm.eval.replay import Chosen, ForwardPass, gaps, summary
from pastalm.models import loading
from pastalm.records import prompts

KINDS = {"asynchronous": 1.0, "sequential": 0.0}
HITS = ("vllm:prefix_cache_hits_total", "llamacpp:prompt_tokens_cached_total")
QUERIES = ("vllm:prefix_cache_queries_total", *HITS[1:], "llamacpp:prompt_tokens_total")
"""Metrics of servers: prompt tokens that were in the prefix cache, and all that were looked up."""


@dataclass(frozen=True)
class Timed:
    """One answer.

    hits, queries: prompt tokens in the prefix cache, and all of them (0 if the server does not report them).
    """

    id: str
    kind: str
    turn: int
    seconds: float
    tokens: int
    critical_path: int
    characters: int
    threads: int
    finish_reason: str
    completions: int
    dropped: int
    hits: float
    queries: float


def counters(url: str) -> list[float]:
    """The server's counts of prompt tokens in its prefix cache, and of all looked up; zeros without metrics."""
    try:
        with urlopen(url, timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    except (URLError, ValueError):
        return [0.0, 0.0]
    return [sum(s.value for f in families for s in f.samples if s.name in names) for names in (HITS, QUERIES)]


def answer(llm: LLM, prompt: str, kind: str, max_tokens: int) -> Transcript:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, parallelism=KINDS[kind])
    stream = llm.stream([{"role": "user", "content": prompt}], params)
    for _ in stream:
        pass
    return stream.transcript


def timed(llm: LLM, identity: str, prompt: str, kind: str, turn: int, args: argparse.Namespace) -> Timed:
    answer(llm, prompt, kind, 1)
    traffic = llm.driver.engine.traffic  # type: ignore[attr-defined]
    before, completions, dropped = counters(args.metrics), traffic.completions, traffic.dropped
    transcript = answer(llm, prompt, kind, args.max_tokens)
    hits, queries = np.subtract(counters(args.metrics), before)
    return Timed(
        id=identity,
        kind=kind,
        turn=turn,
        seconds=round(transcript.seconds, 4),
        tokens=transcript.tokens,
        critical_path=transcript.critical_path,
        characters=len(transcript.text),
        threads=len(transcript.threads),
        finish_reason=str(transcript.finish_reason),
        completions=traffic.completions - completions,
        dropped=traffic.dropped - dropped,
        hits=float(hits),
        queries=float(queries),
    )


def check(llm: LLM, folder: str, questions: Sequence[prompts.Prompt], max_tokens: int) -> Iterator[str]:
    """Replays every token of every answer after the prompt of its completion, for each kind."""
    loaded = loading.load(folder, adapter=None, dtype="float32")
    tags = loaded.vocabulary.tags if llm.loaded.prepared else None
    untagged = TokenSet(frozenset(tags), inverted=True) if tags else None
    for kind, admitted in zip(KINDS, (None, untagged), strict=True):
        with used(llm, loaded, admitted) as rows:
            answers = [answer(llm, prompt.text, kind, max_tokens) for prompt in questions]
        all_gaps = [gap for row in rows for gap in gaps(loaded.model, row)]
        threads = sum(len(transcript.threads) for transcript in answers)
        why = [f"; {transcript.why}" for transcript in answers if transcript.why]
        counts = f"{len(questions)} answers, {threads} threads, {len(rows)} completions"
        yield f"{kind}: {counts}: {summary(all_gaps)}{''.join(why)}"


@contextmanager
def used(llm: LLM, loaded: loading.Loaded, admitted: TokenSet | None) -> Iterator[list[ForwardPass]]:
    """Records the prompt of each completion and the tokens that were used of it, in ids of the model's tokenizer.

    Prompts sent as text are tokenized anew for each completion, so their ids may differ from those received before.

    llm: over the server.
    loaded: the tokenizer.
    admitted: ids that were allowed (None: all).
    """
    engine = llm.driver.engine
    assert isinstance(engine, OpenAIEngine)
    body, apply, wire, tokenizer = engine._body, engine.apply, engine.wire, loaded.tokenizer
    rows: list[ForwardPass] = []
    now: dict[tuple[str, Path], ForwardPass] = {}

    def ids(token: int) -> list[int]:
        if isinstance(wire, Ids):
            return [token]
        if token in wire.vocabulary.eos:
            return [tokenizer.eos_token_id]
        return list(tokenizer(wire.prompt([token]), add_special_tokens=False)["input_ids"])

    def recorded_body(response: Any, thread: Any) -> dict[str, Any]:
        fields = body(response, thread)
        row = list(fields["prompt"] if isinstance(wire, Ids) else tokenizer(fields["prompt"])["input_ids"])
        rows.append(ForwardPass(row, []))
        now[response.request.id, thread.path] = rows[-1]
        return fields

    def recorded_apply(request_id: str, event: Event) -> None:
        apply(request_id, event)
        row = now.get((request_id, event.path))
        if row is None:
            return
        if isinstance(event, Decoded):
            for token in ids(event.token):
                if not event.replaced:
                    row.chosen.append(Chosen(len(row.ids) - 1, token, admitted))
                row.ids.append(token)
        row.ids.extend(token for piece in event.forced for token in ids(piece))

    engine._body, engine.apply = recorded_body, recorded_apply  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        engine._body, engine.apply = body, apply  # type: ignore[method-assign]


def ratios(rows: Sequence[Timed]) -> dict[str, list[float]]:
    """Speedups of each prompt, from medians over rounds."""
    speedups: dict[str, list[float]] = {"theoretical": [], "realized": [], "a character": []}
    for identity in dict.fromkeys(row.id for row in rows):
        own = {kind: [r for r in rows if r.id == identity and r.kind == kind] for kind in KINDS}
        fast, slow = own["asynchronous"], own["sequential"]
        seconds = [float(np.median([r.seconds for r in each])) for each in (fast, slow)]
        characters = [float(np.median([max(1, r.characters) for r in each])) for each in (fast, slow)]
        speedups["theoretical"].append(slow[0].tokens / fast[0].critical_path)
        speedups["realized"].append(seconds[1] / seconds[0])
        speedups["a character"].append(seconds[1] / characters[1] / (seconds[0] / characters[0]))
    return speedups


def report(rows: Sequence[Timed]) -> str:
    forking = {r.id for r in rows if r.threads > 1}
    lines = ["| prompts | number | theoretical | realized | a character |", "| --- | --- | --- | --- | --- |"]
    for name, some in (("all", list(rows)), ("those that fork", [r for r in rows if r.id in forking])):
        if some:
            cells = [f"{np.exp(np.mean(np.log(values))):.2f}" for values in ratios(some).values()]
            lines.append(f"| {name} | {len({r.id for r in some})} | {' | '.join(cells)} |")
    lines += ["", "| decoding | completions an answer | prefix cache | dropped |", "| --- | --- | --- | --- |"]
    for kind in KINDS:
        own = [r for r in rows if r.kind == kind]
        queries, tokens = sum(r.queries for r in own), sum(r.tokens for r in own)
        rate = f"{sum(r.hits for r in own) / queries:.0%}" if queries else "not reported"
        dropped = sum(r.dropped for r in own) / max(1, tokens)
        lines.append(f"| {kind} | {np.mean([r.completions for r in own]):.1f} | {rate} | {dropped:.0%} |")
    ended = {reason: sum(r.finish_reason == reason for r in rows) for reason in ("stop", "length", "abort")}
    return "\n".join([*lines, "", f"ended: {ended}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=File, help="JSONL with `instruction`")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--metrics", help="vLLM's; else /metrics beside --url")
    parser.add_argument("--model")
    parser.add_argument("--tokenizer")
    parser.add_argument("--prompted", action="store_true", help="a model that was not finetuned")
    parser.add_argument("--shares", choices=["running", "finished"])
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=File, help="one answer a line, JSONL")
    parser.add_argument("--check", action="store_true", help="replay the answers through transformers")
    args = parser.parse_args()
    args.metrics = args.metrics or args.url.rstrip("/").removesuffix("/v1") + "/metrics"
    llm = LLM.remote(args.url, args.model, tokenizer=args.tokenizer, prompted=args.prompted, shares=args.shares)
    print(llm.driver.engine.capabilities, flush=True)
    questions = prompts.read(args.prompts, args.limit)
    if args.check:
        for line in check(llm, args.tokenizer, questions, args.max_tokens):
            print(line, flush=True)
        return
    rows: list[Timed] = []
    for number, prompt in enumerate(questions):
        for turn in range(args.rounds):
            for kind in list(KINDS)[:: 1 if (number + turn) % 2 == 0 else -1]:
                rows.append(timed(llm, prompt.id, prompt.text, kind, turn, args))
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(asdict(rows[-1])) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
