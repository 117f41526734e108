"""Laws 2, 3 and 6 on the transformers engine: the text does not depend on schedule, thread limit or
company; tags off it is what transformers' own `generate` gives; a seed gives the same text anywhere.

float64, tiny random models, the real interpreter and driver. Tag tokens are favoured by a bias, or a
random model would hardly ever write a promise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from pastalm import Limits, SamplingParams
from pastalm.core.driver import Driver
from pastalm.core.events import Path
from pastalm.engines.base import Schedule
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.records.transcripts import linear_tokens
from tests.laws.tiny import ARCHITECTURES, EOS, TAGS, tiny_model, tiny_vocabulary

PROMPTS = [[40, 41, 42, 43], [70, 80, 90], [33, 120, 99, 98, 97, 45]]
BIAS = {TAGS.promise: 6.0, TAGS.tokens: 4.0, TAGS.sync: 5.0, TAGS.async_close: 3.0, EOS: 1.0}
GREEDY = SamplingParams(temperature=0, max_tokens=220, logit_bias=BIAS)


def uneven(seed: int) -> Schedule:
    """Any non-empty part of the live threads, another in each step."""
    rng = random.Random(seed)

    def schedule(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
        return rng.sample(list(live), rng.randint(1, len(live))) if live else []

    return schedule


def last_only(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
    """One thread at a time, the youngest first."""
    return list(live)[-1:]


def answers(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    schedule: Schedule | None = None,
    max_threads: int = 16,
    seeds: Sequence[int] | None = None,
) -> list[tuple[str, tuple[tuple[Path, int], ...]]]:
    """Linear form and linear tokens of each prompt's answer, all decoded in one engine."""
    engine = TransformersEngine(model, max_num_seqs=2, max_model_len=512, schedule=schedule)
    driver = Driver(engine, tiny_vocabulary(), limits=Limits(max_threads=max_threads))
    running = [driver.submit(prompt, params, seed=seeds[i] if seeds else 0) for i, prompt in enumerate(prompts)]
    for _ in range(20_000):
        if not driver.running:
            break
        driver.step()
    assert not driver.running, "the decoding hangs"
    assert not engine.has_unfinished()
    return [(r.transcript.annotated, tuple(linear_tokens(r.transcript))) for r in running]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_is_the_same_under_every_schedule(name: str) -> None:
    model = tiny_model(name)
    alone = [answers(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert sum(len({one.path for one in tokens}) for _, tokens in alone) > len(PROMPTS), "no forks"
    assert answers(model, PROMPTS, GREEDY) == alone, "batched"
    assert answers(model, PROMPTS, GREEDY, schedule=uneven(1)) == alone, "uneven"
    assert answers(model, PROMPTS, GREEDY, schedule=last_only) == alone, "one at a time"
    for limit in (1, 2, 3):
        limited = answers(model, PROMPTS, GREEDY, schedule=uneven(limit), max_threads=limit)
        assert limited == alone, f"{limit} threads"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tags_off_equals_generate(name: str) -> None:
    model = tiny_model(name)
    params = SamplingParams(temperature=0, max_tokens=60, parallelism=0)
    ours = answers(model, PROMPTS, params)
    for prompt, (_, tokens) in zip(PROMPTS, ours, strict=True):
        with torch.inference_mode():
            theirs = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=60,
                do_sample=False,
                suppress_tokens=list(TAGS),
                eos_token_id=EOS,
                pad_token_id=0,
            )
        assert [one.token for one in tokens] == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(name: str) -> None:
    model = tiny_model(name)
    params = SamplingParams(temperature=1.3, top_p=0.95, top_k=80, max_tokens=150, logit_bias=BIAS)
    seeds = [11, 12, 13]
    alone = [answers(model, [prompt], params, seeds=[seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert answers(model, PROMPTS, params, seeds=seeds, schedule=uneven(5)) == alone
    other = answers(model, PROMPTS, params, seeds=[21, 22, 23])
    assert all(a != b for a, b in zip(alone, other, strict=True)), "the seed must matter"
