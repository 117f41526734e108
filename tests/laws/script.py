"""Random responses played on an engine: what an interpreter would do, without its language.

`play` drives an engine with events alone. What each thread does next is random, not sampled; the
logits that the engine had for every sample are kept for comparison.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path
from pastalm.core.layout import Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.transformers.engine import TransformersEngine
from tests.laws.oracle import Fed, Record
from tests.laws.tiny import TAGS


@dataclass
class _Actor:
    """One thread of a script."""

    path: Path
    budget: int
    state: str = "live"
    forks: int = 0
    unjoined: list[Path] = field(default_factory=list)


@dataclass
class Script:
    """One response whose threads act at random: forks, nested forks, syncs, chunks never joined."""

    id: str
    prompt: tuple[int, ...]
    policy: Policy
    rng: random.Random
    record: Record = field(default_factory=Record)
    logits: dict[tuple[Path, int], Tensor] = field(default_factory=dict)
    actors: dict[Path, _Actor] = field(default_factory=dict)
    tokens_left: int = 70

    def request(self) -> Request:
        params = SamplingParams(temperature=0, max_tokens=220)
        return Request(id=self.id, prompt_token_ids=self.prompt, params=params, positions=self.policy)

    def start(self) -> list[Event]:
        self.actors[()] = _Actor((), self.rng.randint(15, 40))
        forced = (7, 8) if self.rng.random() < 0.3 else ()
        return [Forked(path=(), forced=forced)]

    @property
    def finished(self) -> bool:
        return all(a.state == "finished" for a in self.actors.values())

    def count(self, path: Path) -> int:
        return sum(isinstance(item, Fed) for item in self.record.threads[path])

    def act(self, path: Path) -> list[Event]:
        """What the thread does with its sample."""
        actor, rng = self.actors[path], self.rng
        actor.budget -= 1
        self.tokens_left -= 1
        if actor.budget <= 0 or self.tokens_left <= 0:
            return self._end(actor)
        roll = rng.random()
        if roll < 0.22 and len(path) < 3 and len(self.actors) < 9:
            return self._fork(actor)
        if roll < 0.34 and actor.unjoined:
            return self._sync(actor)
        forced = tuple(rng.randrange(256) for _ in range(rng.choice((0, 0, 0, 0, 2))))
        return [Decoded(path=path, token=rng.randrange(256), forced=forced)]

    def release(self, *, anyway: bool) -> list[Event]:
        """Lets queued threads begin, each by chance or, if nothing else could go on, one."""
        events: list[Event] = []
        for actor in self.actors.values():
            if actor.state == "queued" and (anyway or self.rng.random() < 0.3):
                actor.state, anyway = "live", False
                events.append(Joined(path=actor.path, forced=(TAGS.async_open,)))
        return events

    def _fork(self, actor: _Actor) -> list[Event]:
        child = _Actor((*actor.path, actor.forks), self.rng.randint(2, 10))
        actor.forks += 1
        actor.unjoined.append(child.path)
        self.actors[child.path] = child
        promised = self.rng.choice((10, 20, 30))
        promise = Decoded(path=actor.path, token=TAGS.promise_end, tag=True)
        if self.rng.random() < 0.3:
            child.state = "queued"
            waits = Blocked(path=child.path, on="thread")
            return [promise, Forked(path=child.path, promised=promised), waits]
        forced = (TAGS.async_open,)
        return [promise, Forked(path=child.path, promised=promised, forced=forced)]

    def _sync(self, actor: _Actor) -> list[Event]:
        if all(self.actors[c].state == "finished" for c in actor.unjoined):
            children, actor.unjoined = tuple(actor.unjoined), []
            actor.state = "live"
            return [Joined(path=actor.path, children=children, forced=(TAGS.sync,))]
        actor.state = "blocked"
        return [Blocked(path=actor.path)]

    def _end(self, actor: _Actor) -> list[Event]:
        actor.state = "finished"
        events: list[Event] = [
            Decoded(path=actor.path, token=TAGS.async_close if actor.path else 256, tag=True),
            Finished(path=actor.path),
        ]
        if actor.path and self.rng.random() < 0.3:
            # cut at a budget: the end comes forced, with the end event
            cut = Finished(path=actor.path, reason="length", forced=(TAGS.async_close,))
            events = [Decoded(path=actor.path, token=9), cut]
        parent = self.actors.get(actor.path[:-1]) if actor.path else None
        if parent is not None and parent.state == "blocked":
            events += self._unblocked(parent)
        return events

    def _unblocked(self, parent: _Actor) -> list[Event]:
        """The parent's join, if its last child has just ended."""
        if all(self.actors[c].state == "finished" for c in parent.unjoined):
            return self._sync(parent)
        return []


@dataclass
class Played:
    """steps: taken. dropped: the ids of the scripts that were cancelled."""

    steps: int = 0
    dropped: set[str] = field(default_factory=set)


def play(
    engine: TransformersEngine,
    scripts: Sequence[Script],
    *,
    limit: int = 5000,
    drop: Callable[[Script], bool] = lambda script: False,
) -> Played:
    """Plays scripts to their ends, side by side as far as the engine admits them. drop: whether to cancel one before a
    step."""
    by_id = {script.id: script for script in scripts}

    def keep(request_id: str, path: Path, logits: Tensor | np.ndarray) -> None:
        script = by_id[request_id]
        script.logits[path, script.count(path) - 1] = torch.as_tensor(logits).clone()

    def take(script: Script, events: list[Event]) -> None:
        for event in events:
            script.record.add(event)
            engine.apply(script.id, event)

    engine.on_logits = keep
    for script in scripts:
        engine.add(script.request())
        take(script, script.start())
    played = Played()
    while engine.has_unfinished():
        played.steps += 1
        assert played.steps < limit, "the engine hangs"
        for script in scripts:
            if script.id not in played.dropped and not script.finished and drop(script):
                played.dropped.add(script.id)
                engine.cancel(script.id)
        for sampled in engine.step():
            script = by_id[sampled.request_id]
            take(script, script.act(sampled.path))
        for script in scripts:
            if script.id in played.dropped:
                continue
            stuck = not any(a.state == "live" for a in script.actors.values())
            take(script, script.release(anyway=stuck))
    assert all(script.finished for script in scripts if script.id not in played.dropped)
    return played


def random_scripts(seed: int, policy: Policy, count: int) -> list[Script]:
    """`count` scripts with prompts of different lengths, the same for the same arguments."""
    rng = random.Random(seed)
    return [
        Script(
            id=f"r{i}",
            prompt=tuple(rng.randrange(256) for _ in range(rng.randint(1, 30))),
            policy=policy,
            rng=random.Random(rng.getrandbits(32)),
        )
        for i in range(count)
    ]
