"""Random values of a grammar: any token that its mask has may come next, so every kind of value comes up in time."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from pastalm.structured.grammar import COMMA, Grammars
from pastalm.structured.plan import Leaf, Node, plan
from tests.laws.tiny import tiny_vocabulary


@cache
def grammars() -> Grammars:
    return Grammars(tiny_vocabulary())


def leaf(schema: Any) -> Leaf:
    node: Node = plan(schema, parallel=False)
    assert isinstance(node, Leaf)
    grammars().fewest(node)
    return node


def walk(node: Leaf, seed: int, likely: bytes = b"", behind_quotes: Sequence[bytes] = ()) -> str:
    """A random value. likely: bytes that come up more often than others where they may. behind_quotes: texts that come
    up more often where a text or key begins."""
    chance = random.Random(seed)
    value = grammars().value(node, COMMA)
    value.begin()
    share, longest = chance.choice([0.0, 0.5, 0.9]), chance.choice([8, 40, 120])
    while not value.ended:
        if len(value.text) > longest:
            assert all(map(value.write, value.ending()))
            break
        if behind_quotes and value.text.endswith(b'"') and chance.random() < 0.7:
            ahead = value.fork()
            if all(map(ahead.write, chance.choice(behind_quotes))):
                value = ahead
        allowed = [int(token) for token in np.flatnonzero(value.mask())]
        wanted = [token for token in allowed if token in set(likely)]
        assert value.write(chance.choice(wanted if wanted and chance.random() < share else allowed))
    assert value.ended
    return value.text.decode()


def values(schema: Any, count: int, likely: bytes = b"") -> list[Any]:
    """Some random values of a schema."""
    node = leaf(schema)
    return [json.loads(walk(node, seed, likely)) for seed in range(count)]
