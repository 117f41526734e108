"""How far the losses that training computes are from what the engine says of the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pastalm.core.events import Blocked, Decoded, Event, Joined, Path
from pastalm.core.language import Promise, Sync, Text
from pastalm.core.layout import Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.records.documents import Async, Document
from pastalm.train.dataset import collate
from pastalm.train.loss import token_log_probs
from pastalm.train.packing import pack, unroll
from tests.laws.double import AllDouble
from tests.laws.tiny import EOS, WINDOW, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
PROMPT = list(range(40, 40 + WINDOW + 4))
"""Longer than a sliding window."""
DOCUMENT: Document = (
    Text("Two.\n"),
    Promise("a", 20),
    Async((Text("1. So\n"), Promise("b", 10), Async((Text("b\n"),)))),
    Promise("c", 10),
    Async((Text("2.\n"),)),
    Sync(),
    Text("Yes."),
)


def forced(
    model: Any, prompt: Sequence[int], events: Iterable[Event], policy: Policy, *, max_model_len: int = 256
) -> list[float]:
    """log p of every token that the events have their threads sample, as the engine sees it when it is forced
    through them, in order."""
    turn: list[Path] = [()]
    engine = TransformersEngine(
        model,
        max_num_seqs=1,
        max_model_len=max_model_len,
        schedule=lambda live: [(n, p) for n, p in live if p == turn[0]],
    )
    seen: dict[Path, torch.Tensor] = {}
    engine.on_logits = lambda _, path, logits: seen.__setitem__(path, logits.clone())
    params = SamplingParams(temperature=0, max_tokens=max_model_len - len(prompt))
    engine.add(Request(id="x", prompt_token_ids=tuple(prompt), params=params, positions=policy))
    found: list[float] = []
    queued = set[Path]()
    for event in events:
        if isinstance(event, Blocked) and event.on == "thread":
            queued.add(event.path)
        sync = isinstance(event, Joined) and (bool(event.children) or event.path not in queued)
        blocked = isinstance(event, Blocked) and event.on == "sync"
        if isinstance(event, Decoded) or blocked or (sync and event.path not in seen):
            turn[0] = event.path
            engine.step()
        if isinstance(event, Decoded) or sync:
            token = event.token if isinstance(event, Decoded) else event.forced[0]
            logits = seen.pop(event.path)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if not (isinstance(event, Decoded) and event.replaced):
                found.append(float(logits.log_softmax(-1)[token]))
        engine.apply("x", event)
    assert not engine.has_unfinished()
    return found


def difference(model: Any, policy: Policy = "promised") -> tuple[float, float]:
    """The largest difference between the log-probabilities of the loss and the engine's, nats, over one answer, and the
    spread of the log-probabilities."""
    packed = pack(PROMPT, DOCUMENT, VOCABULARY, policy, eos=EOS)
    with AllDouble():
        with torch.no_grad():
            each, _ = token_log_probs(model, collate([packed]))
        said = forced(model, PROMPT, unroll(DOCUMENT, VOCABULARY, eos=EOS), policy)
    pairs = zip(sorted(each.tolist()), sorted(said), strict=True)
    return max(abs(a - b) for a, b in pairs), float(each.std())
