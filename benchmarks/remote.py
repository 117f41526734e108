"""Seconds per answer over a completions server, asynchronous against sequential on the same server.

    vllm serve MODEL --max-model-len 4096          # prefix caching is on by default
    python benchmarks/remote.py PROMPTS.jsonl --url http://127.0.0.1:8000/v1 --model MODEL

One request at a time, greedy, both kinds by turns for each prompt, repeated; the prompt of each is in the server's
cache before it is timed. `realized` is seconds sequential / asynchronous; `a character` is the same per character that
the reader gets, so that a shorter answer is no speedup; `theoretical` is tokens sequential / critical path. vLLM and
llama.cpp's server (--metrics there) say how many of the tokens of prompts were found in the prefix cache. `dropped` is
the share of tokens that came and were not used, since a completion runs ahead of what follows from its tokens.

    python benchmarks/remote.py PROMPTS.jsonl --url … --model … --tokenizer FOLDER --check

times nothing: it replays both kinds of answers through plain transformers with the weights in FOLDER, in float32, one
forward pass a completion, and says how far each token that the server chose lies below the largest logit.
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
"""What is summed of a server's /metrics: tokens of prompts found in its prefix cache, and those looked up."""


@dataclass(frozen=True)
class Timed:
    """One answer. hits, queries: tokens of its prompts that were in the prefix cache, of all (0 where not told)."""

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
    """The server's own count of tokens found in its prefix cache, and of those looked up; zeros where it tells none."""
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


def timed(llm: LLM, identity: str, prompt: str, kind: str, turn: int, chosen: argparse.Namespace) -> Timed:
    answer(llm, prompt, kind, 1)
    traffic = llm.driver.engine.traffic  # type: ignore[attr-defined]
    before, completions, dropped = counters(chosen.metrics), traffic.completions, traffic.dropped
    transcript = answer(llm, prompt, kind, chosen.max_tokens)
    hits, queries = np.subtract(counters(chosen.metrics), before)
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


def check(llm: LLM, folder: str, asked: Sequence[prompts.Prompt], max_tokens: int) -> Iterator[str]:
    """Of each kind, every token of every answer, replayed after what its completion was asked."""
    loaded = loading.load(folder, adapter=None, dtype="float32")
    tags = loaded.vocabulary.tags if llm.loaded.prepared else None
    untagged = TokenSet.all_but(*tags.ids) if tags else None
    for kind, admitted in zip(KINDS, (None, untagged), strict=True):
        with used(llm, loaded, admitted) as rows:
            answers = [answer(llm, prompt.text, kind, max_tokens) for prompt in asked]
        found = [gap for row in rows for gap in gaps(loaded.model, row)]
        threads = sum(len(transcript.threads) for transcript in answers)
        why = [f"; {transcript.why}" for transcript in answers if transcript.why]
        counts = f"{len(asked)} answers, {threads} threads, {len(rows)} completions"
        yield f"{kind}: {counts}: {summary(found)}{''.join(why)}"


@contextmanager
def used(llm: LLM, loaded: loading.Loaded, admitted: TokenSet | None) -> Iterator[list[ForwardPass]]:
    """What each completion was asked, and what was used of it, in ids of the model's tokenizer: what is asked in text
    is read anew each time, and need not be the tokens that were once said. admitted: the ids that were not forbidden.
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

    def asking(response: Any, thread: Any) -> dict[str, Any]:
        asked = body(response, thread)
        row = list(asked["prompt"] if isinstance(wire, Ids) else tokenizer(asked["prompt"])["input_ids"])
        rows.append(ForwardPass(row, []))
        now[response.request.id, thread.path] = rows[-1]
        return asked

    def applied(request_id: str, event: Event) -> None:
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

    engine._body, engine.apply = asking, applied  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        engine._body, engine.apply = body, apply  # type: ignore[method-assign]


def ratios(rows: Sequence[Timed]) -> dict[str, list[float]]:
    """Of each prompt, the medians over its rounds against each other."""
    found: dict[str, list[float]] = {"theoretical": [], "realized": [], "a character": []}
    for identity in dict.fromkeys(row.id for row in rows):
        own = {kind: [r for r in rows if r.id == identity and r.kind == kind] for kind in KINDS}
        fast, slow = own["asynchronous"], own["sequential"]
        seconds = [float(np.median([r.seconds for r in each])) for each in (fast, slow)]
        characters = [float(np.median([max(1, r.characters) for r in each])) for each in (fast, slow)]
        found["theoretical"].append(slow[0].tokens / fast[0].critical_path)
        found["realized"].append(seconds[1] / seconds[0])
        found["a character"].append(seconds[1] / characters[1] / (seconds[0] / characters[0]))
    return found


def report(rows: Sequence[Timed]) -> str:
    forking = {r.id for r in rows if r.threads > 1}
    lines = ["| prompts | number | theoretical | realized | a character |", "| --- | --- | --- | --- | --- |"]
    for name, some in (("all", list(rows)), ("those that fork", [r for r in rows if r.id in forking])):
        if some:
            means = [f"{np.exp(np.mean(np.log(values))):.2f}" for values in ratios(some).values()]
            lines.append(f"| {name} | {len({r.id for r in some})} | {' | '.join(means)} |")
    lines += ["", "| decoding | completions an answer | prefix cache | dropped |", "| --- | --- | --- | --- |"]
    for kind in KINDS:
        own = [r for r in rows if r.kind == kind]
        queries, tokens = sum(r.queries for r in own), sum(r.tokens for r in own)
        rate = f"{sum(r.hits for r in own) / queries:.0%}" if queries else "not told"
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
    chosen = parser.parse_args()
    chosen.metrics = chosen.metrics or chosen.url.rstrip("/").removesuffix("/v1") + "/metrics"
    llm = LLM.remote(
        chosen.url, chosen.model, tokenizer=chosen.tokenizer, prompted=chosen.prompted, shares=chosen.shares
    )
    print(llm.driver.engine.capabilities, flush=True)
    asked = prompts.read(chosen.prompts, chosen.limit)
    if chosen.check:
        for line in check(llm, chosen.tokenizer, asked, chosen.max_tokens):
            print(line, flush=True)
        return
    rows: list[Timed] = []
    for number, prompt in enumerate(asked):
        for turn in range(chosen.rounds):
            for kind in list(KINDS)[:: 1 if (number + turn) % 2 == 0 else -1]:
                rows.append(timed(llm, prompt.id, prompt.text, kind, turn, chosen))
                if chosen.out:
                    with chosen.out.open("a") as file:
                        file.write(json.dumps(asdict(rows[-1])) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
