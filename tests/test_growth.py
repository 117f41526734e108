"""What a token takes does not grow with what was written before it, whatever was extras for."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from pastalm import SamplingParams
from pastalm.core.driver import Driver
from pastalm.core.language import Promise, Sync, Text
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.records.documents import Async, render
from pastalm.server.answers import ServedAnswer

WORDS = "some words, a sentence of them. "
PARTS = [
    part for i in range(40) for part in (Promise(f"part {i}", 10), Async((Text("a chunk"),)), Sync(), Text(WORDS * 3))
]


class Lines:
    """Counts the lines of the package that are run, those of engines left out: work, not time."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Lines:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if "/pastalm/core/" in name or "/pastalm/server/" in name else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.count += event == "line"
        return self._line


@pytest.mark.parametrize(
    ("extras", "allowance"),
    [
        ({}, 0),
        ({"logprobs": 2}, 0),
        ({"stop": "\0"}, 0),
        ({"stop_token_ids": (0,)}, 0),
        ({"stop": "\0", "min_tokens": 2000}, 100),  # the search begins only then
    ],
)
def test_a_token_takes_the_same_work_at_any_length(extras: dict[str, Any], allowance: int) -> None:
    """From interpreter to transcript, and for the deltas of a server. Text after few and after many chunks."""
    vocabulary = byte_vocabulary()
    driver = Driver(ScriptedEngine(vocabulary, [render(PARTS)], max_num_seqs=4, max_model_len=9000), vocabulary)
    params = SamplingParams(temperature=0, max_tokens=8000, **extras)
    response = driver.submit(vocabulary.encode("question"), params)
    answer = ServedAnswer(response.transcript, params.stop_strings)
    work: list[int] = []
    while not response.finished:
        with Lines() as lines:
            driver.step()
            events = response.take()
            answer.take(events)
        if [event.kind for event in events] == ["decoded"] and not events[0].tag:  # type: ignore[union-attr]
            work.append(lines.count)
    assert len(work) > 3000
    assert max(work[-500:]) <= max(work[300:800]) + allowance
