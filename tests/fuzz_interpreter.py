"""Random token streams through the interpreter: none raises, hangs, or exceeds its budget.

    python tests/fuzz_interpreter.py --streams 1000000 --processes 2

Prints what it saw as JSON, or the first stream that broke a rule, whose seed plays it again (--first SEED --streams 1).
The suite plays a few of the same streams (tests/laws/test_budgets.py), and hypothesis looks for others.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from pastalm.core.interpreter import Limits
from pastalm.core.language import AsyncClose, Text
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary
from pastalm.records.documents import linearize, nest, parse, strip
from tests.play import PREPARED, XML_BYTES, XML_PIECES, Player

VOCABULARIES = {"prepared": PREPARED, "xml, bytes": XML_BYTES, "xml, pieces": XML_PIECES}
XML = b'<promise topic="a" tokens="10"/><async></async><sync/>\\<&lt;'


def likely(vocabulary: Vocabulary) -> list[int]:
    """Tokens that mean something: tags, digits, ends, parts of characters."""
    common = [*b"ab 12590.\n", 0xC3, 0xA9, 0xFF]
    if vocabulary.tags is None:
        return [*common, *XML, *vocabulary.eos, *range(257, vocabulary.size)]
    return [*common, *3 * vocabulary.tags, *vocabulary.eos]


def phrases(vocabulary: Vocabulary) -> list[list[int]]:
    """Runs of tokens that belong together, as a model would say them."""
    tags = vocabulary.tags
    if tags is None:
        said = ('<promise topic="a b" tokens="20"/>', "<sync/>", "</async>", "<async>", '<promise topic="', '"/>')
        return [list(vocabulary.encode(text)) for text in said]
    numbers = [[tags.tokens, *vocabulary.encode(n), tags.promise_end] for n in ("10", "20", "100", "500", "7", "999")]
    promises = [[tags.promise, topic, *number] for topic in b"abc" for number in numbers]
    return [*promises, [tags.sync], [tags.async_close], [*b"1. It.\n", tags.async_close], [*b"a\n"]]


KNOWN = {name: (v, likely(v), phrases(v)) for name, v in VOCABULARIES.items()}


def player_of(chance: random.Random, vocabulary: Vocabulary) -> Player:
    """A response with bounds of its own, most of them narrow."""
    limits = Limits(
        max_threads=chance.choice([1, 2, 3, 16]),
        max_depth=chance.choice([0, 1, 2, 2, 3]),
        max_promises=chance.choice([0, 1, 2, 5, 16, 16]),
        max_chunk_tokens=chance.choice([8, 9, 17, 36, 200, 1024]),
        max_position=chance.choice([None, None, chance.randrange(10, 300)]),
    )
    most = chance.choice([chance.randrange(1, 12), chance.randrange(1, 70), chance.randrange(60, 160)])
    parallelism = 0.0 if chance.random() < 0.1 else 1.0
    return Player(vocabulary, most, limits, parallelism=parallelism, ignore_eos=chance.random() < 0.2)


def play(seed: int) -> Counter[str]:
    """One stream: every token is sampled, then the whole is checked. Raises what went wrong."""
    chance = random.Random(seed)
    name = chance.choice([*KNOWN])
    vocabulary, tokens, runs = KNOWN[name]
    player = player_of(chance, vocabulary)
    honour, wild = chance.random() < 0.5, chance.random() ** 2  # whether masks are kept to; how much is noise
    aborted = chance.random() < 0.05 and chance.randrange(1, 40)
    queued: dict[tuple[int, ...], list[int]] = {}
    steps, cut_short = 0, False
    while player.live:
        if aborted and steps >= aborted:
            cut_short = True
            player.finish(chance.choice(["abort", "stop"]))
            break
        path = chance.choice(player.live)
        queue = queued.setdefault(path, [])
        if not queue:
            noise = chance.random() < wild
            token = chance.randrange(vocabulary.size) if chance.random() < 0.2 else chance.choice(tokens)
            queue += [token] if noise else chance.choice(runs)
        token = queue.pop(0)
        allowed = player.allowed[path]
        if honour and allowed is not None and token not in allowed:
            token = next(i for i in (*tokens, *range(vocabulary.size)) if i in allowed)
        player.sample(token, path)
        steps += 1
        assert steps <= player.max_tokens, "a sampled token cost nothing"
    check(player, cut_short=cut_short)
    forks = len(player.state) - 1
    return Counter(streams=1, tokens=player.tokens, sampled=steps, chunks=forks, forked=bool(forks))


def check(player: Player, *, cut_short: bool) -> None:
    """What holds of every response that has ended. cut_short: by the driver, in the middle."""
    assert player.interpreter.finished
    assert player.tokens <= player.max_tokens
    limit = player.limits.max_position
    if limit is not None:
        assert all(max(player.positions(p), default=0) < limit for p in ("promised", "overlap"))
    transcript = Transcript(player.events)
    document = nest(transcript.marks())
    assert transcript.finished and transcript.tokens == player.tokens
    assert strip(document) == transcript.text == transcript.settled
    assert parse(transcript.annotated) == document
    if not cut_short:
        last = " "
        for mark in linearize(document):
            last = mark.text[-1] if isinstance(mark, Text) else last
            assert not isinstance(mark, AsyncClose) or last.isspace(), "something runs into a chunk"


def batch(first: int, count: int) -> tuple[Counter[str], str]:
    seen: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            seen += play(seed)
        except Exception as error:
            return seen, f"seed {seed}: {type(error).__name__}: {error}"
    return seen, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    began, size = time.perf_counter(), 2000
    starts = range(given.first, given.first + given.streams, size)
    sizes = [min(size, given.first + given.streams - start) for start in starts]
    seen: Counter[str] = Counter()
    with ProcessPoolExecutor(given.processes) as pool:
        for counts, broken in pool.map(batch, starts, sizes):
            seen += counts
            if broken:
                pool.shutdown(cancel_futures=True)
                sys.exit(broken)
    print(json.dumps({**seen, "seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
