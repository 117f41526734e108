"""Speed, prompt by prompt: asynchronous against the same model with its tags off, and length-matched.

Three decodings of each prompt, greedy, one request at a time, in one process and in rotating order:
asynchronous; `parallelism` 0 ("own tags off"); and the asynchronous answer's text decoded again
sequentially, forced ("length-matched": an answer that is only shorter is no speedup). Figures as in
SPEC "Figures"; each prompt's record is written as soon as it is there, so a run can be resumed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pastalm import jsonl
from pastalm.engine import Engine, Request, SamplingParams
from pastalm.errors import DataError
from pastalm.events import Decoded, Finished, Forked
from pastalm.interpreter import Limits
from pastalm.lang import Async, Document, Promise, Sync, topic_key
from pastalm.llm import LLM
from pastalm.transcript import Transcript
from pastalm.vocabulary import TAG_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRecord:
    """One prompt. tokens, steps, critical_path, seconds: of the asynchronous answer; text_tokens: of
    its reader's text and end; off_*: tags off; matched_seconds: its text decoded sequentially.
    repeats: promises whose topic their group already had. finish_reason: of the main thread. cut:
    chunks ended at their budget. tag_traces: tag spellings in the off text.
    """

    id: str
    chunks: int
    largest_group: int
    repeats: int
    cut: int
    malformed: bool
    tokens: int
    steps: int
    critical_path: int
    seconds: float
    text_tokens: int
    finish_reason: str
    off_tokens: int
    off_seconds: float
    off_finish_reason: str
    tag_traces: int
    matched_seconds: float
    annotated: str
    off_text: str

    @property
    def speedups(self) -> dict[str, float]:
        """theoretical and realized against tags off, and both length-matched; of these, realized over
        theoretical: 1 where threads are free."""
        return {
            "theoretical": self.off_tokens / self.critical_path,
            "realized": self.off_seconds / self.seconds,
            "text_ratio": self.text_tokens / self.off_tokens,
            "theoretical_matched": self.text_tokens / self.critical_path,
            "realized_matched": self.matched_seconds / self.seconds,
            "realized_over_theoretical_matched": (
                self.matched_seconds / self.seconds * self.critical_path / self.text_tokens
            ),
        }


def measure(llm: LLM, identity: str, prompt: str, *, max_tokens: int, turn: int = 0) -> SpeedRecord:
    """Decodes one prompt in all three ways; `turn` rotates which of the first two goes first."""
    on = SamplingParams(temperature=0, max_tokens=max_tokens)
    off = SamplingParams(temperature=0, max_tokens=max_tokens, parallelism=0)
    answers: dict[bool, Transcript] = {}
    for sequential in (False, True) if turn % 2 == 0 else (True, False):
        _cold(llm)
        stream = llm.stream([{"role": "user", "content": prompt}], off if sequential else on)
        for _ in stream:
            pass
        answers[sequential] = stream.transcript
        if sequential:
            prompt_ids = stream.prompt_token_ids
    fast, slow = answers[False], answers[True]
    text_ids = [*llm.loaded.vocabulary.encode(fast.text), min(llm.loaded.vocabulary.eos)]
    _cold(llm)
    matched = force(llm.driver.engine, prompt_ids, text_ids)
    groups = list(_groups(fast.document))
    return SpeedRecord(
        id=identity,
        chunks=len(fast.threads) - 1,
        largest_group=max(map(len, groups), default=0),
        repeats=sum(len(g) - len(set(map(topic_key, g))) for g in groups),
        malformed=any(spelling in fast.text for spelling in TAG_TOKENS.values()),
        tokens=fast.tokens,
        steps=fast.steps,
        critical_path=fast.critical_path,
        seconds=round(fast.seconds, 4),
        text_tokens=len(text_ids),
        cut=sum(t.reason == "length" for path, t in fast.threads.items() if path),
        finish_reason=str(fast.threads[()].reason),
        off_tokens=slow.tokens,
        off_seconds=round(slow.seconds, 4),
        off_finish_reason=str(slow.finish_reason),
        tag_traces=sum(slow.text.count(s) for s in TAG_TOKENS.values()) + len(slow.threads) - 1,
        matched_seconds=round(matched, 4),
        annotated=fast.annotated,
        off_text=slow.text,
    )


def _cold(llm: LLM) -> None:
    """No decoding is to find another's prompt in the pool."""
    forget = getattr(llm.driver.engine, "forget", None)
    if forget is not None:
        forget()


def force(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Seconds to decode given tokens one by one after a prompt, prefill included."""
    params = SamplingParams(temperature=0, max_tokens=len(tokens))
    positions = engine.capabilities.positions[0]
    request = Request(
        id="forced", prompt_token_ids=tuple(prompt), params=params, positions=positions
    )
    started = time.perf_counter()
    engine.add(request)
    engine.apply(request.id, Forked(path=()))
    for token in tokens:
        engine.step()
        engine.apply(request.id, Decoded(path=(), token=token))
    seconds = time.perf_counter() - started
    engine.apply(request.id, Finished(path=()))
    return seconds


def _groups(document: Document) -> Iterator[list[str]]:
    """Topics of each group of promises: those of one thread between two syncs."""
    group: list[str] = []
    for node in document:
        if isinstance(node, Promise):
            group.append(node.topic)
        elif isinstance(node, Async):
            yield from _groups(node.body)
        elif group and isinstance(node, Sync):
            yield group
            group = []
    if group:
        yield group


def run(
    llm: LLM,
    prompts: Path,
    target: Path,
    *,
    max_tokens: int = 1024,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> list[SpeedRecord]:
    """Measures every prompt of a JSONL file ({id or index, instruction}) not in `target` yet, in a seeded random
    order, so that an unfinished run is a fair sample. Raises DataError for files it cannot read."""
    rows = read_prompts(prompts)
    random.Random(seed).shuffle(rows)
    done = read_records(target)
    finished = {record.id for record in done}
    todo = [row for row in rows if row[0] not in finished][: None if limit is None else limit]
    with jsonl.Appender(target) as file:
        for i, (identity, prompt) in enumerate(todo):
            record = measure(llm, identity, prompt, max_tokens=max_tokens, turn=i)
            file.write(asdict(record))
            done.append(record)
            s = record.speedups
            progress(
                f"{len(done)}/{len(rows)} {identity}: {record.chunks} chunks, theoretical "
                f"{s['theoretical']:.2f} (matched {s['theoretical_matched']:.2f}), realized "
                f"{s['realized']:.2f} (matched {s['realized_matched']:.2f}), {record.seconds:.1f} s"
            )
    return done


def read_prompts(prompts: Path) -> list[tuple[str, str]]:
    """(id, prompt) of each line of a JSONL file ({id or index, instruction}). Raises DataError."""
    return [
        (str(row.get("id", row.get("index", i))), jsonl.string(row, "instruction", where))
        for i, (where, row) in enumerate(jsonl.read(prompts))
    ]


def read_records(target: Path) -> list[SpeedRecord]:
    """The records of an earlier run; a half-written last line is cut off. Raises DataError."""
    try:
        return [SpeedRecord(**row) for _, row in jsonl.resume(target)]
    except TypeError as error:
        raise DataError(f"{target} holds something else than speed records ({error}): use another file") from None


def geometric(values: Sequence[float]) -> dict[str, float]:
    """The geometric mean and, of two values or more, its 95 % bootstrap interval: low, high."""
    mean, low, high = (float(np.exp(x)) for x in interval(np.log(values).tolist()))
    return {"geometric mean": mean} | ({"low": low, "high": high} if len(values) > 1 else {})


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % bootstrap interval: low, high (of one value, itself)."""
    from scipy.stats import bootstrap

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.mean, method="percentile", rng=rng).confidence_interval
    return mean, float(found.low), float(found.high)


def summary(records: Sequence[SpeedRecord]) -> dict[str, Any]:
    """Shares, means, and geometric means with 95 % bootstrap intervals over prompts."""
    table: dict[str, Any] = {
        "prompts": len(records),
        "forking (2 chunks or more)": float(np.mean([r.chunks >= 2 for r in records])),
        "mean chunks": float(np.mean([r.chunks for r in records])),
        "malformed": float(np.mean([r.malformed for r in records])),
        "answers with a repeated topic": sum(r.repeats > 0 for r in records),
        "at a cap of tokens or promises where tags off is not": sum(
            _capped(r) and r.off_finish_reason != "length" for r in records
        ),
        "the other way round": sum(
            r.off_finish_reason == "length" and not _capped(r) for r in records
        ),
        "answers with a chunk cut at its budget": sum(r.cut > 0 for r in records),
        "chunks cut at their budget": sum(r.cut for r in records),
        "tag traces in tags-off text": sum(r.tag_traces > 0 for r in records),
        "mean tokens": float(np.mean([r.tokens for r in records])),
        "mean critical path": float(np.mean([r.critical_path for r in records])),
        "mean tokens, tags off": float(np.mean([r.off_tokens for r in records])),
    }
    for name in records[0].speedups:
        table[name] = geometric([r.speedups[name] for r in records])
    return table


def _capped(record: SpeedRecord) -> bool:
    return record.finish_reason == "length" or record.largest_group >= Limits().max_promises


def markdown(table: dict[str, Any]) -> str:
    """The summary as a table for people."""
    lines = ["| figure | value |", "| --- | --- |"]
    for name, value in table.items():
        if isinstance(value, dict):
            low, high = value.get("low"), value.get("high")
            spread = "" if low is None else f" ({low:.2f} to {high:.2f})"
            lines.append(f"| {name.replace('_', ' ')}, geometric mean | {value['geometric mean']:.2f}{spread} |")
        else:
            lines.append(f"| {name} | {value if isinstance(value, int) else round(value, 3)} |")
    return "\n".join(lines) + "\n"
