"""Seconds per answer over a completions server, asynchronous against sequential on the same server.

    vllm serve MODEL --max-model-len 4096          # prefix caching is on by default
    python benchmarks/remote.py PROMPTS.jsonl --url http://127.0.0.1:8000/v1 --model MODEL

One request at a time, greedy, both kinds by turns for each prompt, repeated; the prompt of each is in the server's
cache before it is timed. `realized` is seconds sequential / asynchronous; `a character` is the same per character that
the reader gets, so that a shorter answer is no speedup; `theoretical` is tokens sequential / critical path. Where the
server is vLLM, its /metrics say how many of the tokens of prompts were found in the prefix cache. `dropped` is the
share of tokens that came and were not used, since a completion runs ahead of what follows from its tokens.

    python benchmarks/remote.py PROMPTS.jsonl --url … --model … --tokenizer FOLDER --check

times nothing: it replays each answer through plain transformers with the weights in FOLDER, in float32, one forward
pass a stretch of a thread, and says how far each token that the server chose lies below the largest logit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from pastalm import LLM, SamplingParams, models, prompts
from pastalm.engines.openai import Texts
from pastalm.eval.replay import replay, told
from pastalm.events import Decoded, Event, Joined
from pastalm.transcript import Transcript

KINDS = {"asynchronous": 1.0, "sequential": 0.0}
COUNTERS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")


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
    """The server's own count of tokens found in its prefix cache, and of those looked up."""
    try:
        with urlopen(url, timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    except (URLError, ValueError):
        return [0.0, 0.0]
    return [sum(s.value for f in families for s in f.samples if s.name == name) for name in COUNTERS]


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


def check(llm: LLM, folder: str, asked: Sequence[prompts.Prompt], max_tokens: int) -> str:
    """Every token of every answer, replayed."""
    loaded = models.load(folder, adapter=None, dtype="float32")
    gaps: list[float] = []
    threads = syncs = 0
    for prompt in asked:
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        stream = llm.stream([{"role": "user", "content": prompt.text}], params)
        events = list(stream)
        threads += len(stream.transcript.threads)
        syncs += sum(isinstance(event, Joined) and bool(event.children) for event in events)
        ids: Sequence[int] = stream.prompt_token_ids
        if isinstance(llm.driver.engine.wire, Texts):  # type: ignore[attr-defined]
            ids = models.chat_prompt(loaded, [{"role": "user", "content": prompt.text}])
            events = list(tokens_of(events, llm.driver.engine.wire, loaded))  # type: ignore[attr-defined]
        gaps += replay(loaded.model, ids, events, "serial")
    return f"{len(asked)} answers, {threads} threads, {syncs} joins: {told(gaps)}"


def tokens_of(events: Sequence[Event], wire: Texts, loaded: models.Loaded) -> Iterator[Event]:
    """Events of a server that is asked in text, in the ids of the model's tokenizer; what was allowed is left out."""
    here, there = wire.vocabulary.tags, loaded.vocabulary.tags
    assert here is not None and there is not None
    special = dict(zip(here.ids, there.ids, strict=True)) | {min(wire.vocabulary.eos): loaded.tokenizer.eos_token_id}

    def ids(piece: int) -> list[int]:
        return [special[piece]] if piece in special else list(loaded.vocabulary.encode(wire.prompt([piece])))

    for event in events:
        forced = tuple(token for piece in event.forced for token in ids(piece))
        if isinstance(event, Decoded):
            *before, last = ids(event.token)
            yield from (replace(event, token=token, forced=(), allowed=None) for token in before)
            event = replace(event, token=last)
        yield replace(event, forced=forced, allowed=None)


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
    parser.add_argument("prompts", type=Path, help="JSONL with `instruction`")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--metrics", help="vLLM's; else /metrics beside --url")
    parser.add_argument("--model")
    parser.add_argument("--tokenizer")
    parser.add_argument("--prompted", action="store_true", help="a model that was not finetuned")
    parser.add_argument("--shares", choices=["running", "finished"])
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="one answer a line, JSONL")
    parser.add_argument("--check", action="store_true", help="replay the answers through transformers")
    chosen = parser.parse_args()
    chosen.metrics = chosen.metrics or chosen.url.rstrip("/").removesuffix("/v1") + "/metrics"
    llm = LLM.remote(
        chosen.url, chosen.model, tokenizer=chosen.tokenizer, prompted=chosen.prompted, shares=chosen.shares
    )
    print(llm.driver.engine.capabilities, flush=True)
    asked = prompts.read(chosen.prompts, chosen.limit)
    if chosen.check:
        print(check(llm, chosen.tokenizer, asked, chosen.max_tokens))
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
