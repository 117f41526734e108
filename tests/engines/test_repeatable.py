"""A lone client's request gives the same tokens and log-probabilities again, whatever was asked before: what the engine
remembers of prompts changes no rounding (bfloat16, quantised weights)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pastalm import LLM, SamplingParams
from pastalm.engines.batching import BatchingEngine
from pastalm.engines.native import library
from pastalm.models import lossless
from tests.server.serving import tiny_parts
from tests.test_models import byte_level

WORDS = "Tell me of the sea, the wind, a ship and those who sail it; then of the land they leave behind. "
ENGINES = [
    pytest.param(
        "native", marks=pytest.mark.skipif(bool(library.unavailable()), reason="the native library is not there")
    ),
    "transformers",
]


def told(llm: LLM, prompt: str, **params: Any) -> list[Any]:
    """Tokens and log-probabilities of every choice, bit by bit."""
    chosen = SamplingParams(**{"temperature": 1, "seed": 1, "n": 2, "max_tokens": 12, "logprobs": 2, **params})
    return [
        (output.token_ids, [sorted(each.items()) for each in output.logprobs or []], output.text)
        for output in llm.generate(prompt, chosen)[0].outputs
    ]


def engine_of(llm: LLM) -> BatchingEngine:
    engine = llm.driver.engine
    assert isinstance(engine, BatchingEngine)
    return engine


@pytest.fixture(scope="module", params=ENGINES)
def small(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """A small random model in bfloat16, on transformers as on the native engine."""
    from pastalm.engines.native.engine import NativeEngine
    from pastalm.engines.native.model import NativeModel
    from pastalm.engines.transformers.engine import TransformersEngine
    from pastalm.models.loading import Loaded
    from pastalm.models.packed_models import from_model

    model, tokenizer = tiny_parts()
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1], size=model.get_input_embeddings().weight.shape[0])
    loaded = Loaded("small", model, tokenizer, vocabulary, True, None, 2048)
    sizes = {"max_num_seqs": 3, "max_model_len": 1024}
    if request.param == "native":
        yield LLM.over(NativeEngine(NativeModel(*from_model(model.float(), "Q8_0")), **sizes), loaded)
    else:
        yield LLM.over(TransformersEngine(model.bfloat16(), **sizes), loaded)


PROMPTS = [WORDS[:k] for k in (1, 5, 63, 64, 65)] + [WORDS * 2, WORDS * 3 + "And?", WORDS * 4, "Else. " * 30]


@pytest.mark.parametrize("seed", range(3))
def test_what_was_asked_before_changes_nothing(small: LLM, seed: int) -> None:
    fresh = {}
    for prompt in PROMPTS:
        engine_of(small).forget()
        fresh[prompt] = told(small, prompt)
    chance = np.random.default_rng(seed)
    for i in [*chance.integers(0, len(PROMPTS), 12), 5, 5, 6]:
        n = int(chance.integers(1, 4))
        told(small, PROMPTS[chance.integers(0, len(PROMPTS))], n=n, seed=int(chance.integers(9)))
        assert told(small, PROMPTS[i]) == fresh[PROMPTS[i]]


@pytest.mark.parametrize("chunk", [1, 3, 16, 100, 512])
def test_prompts_are_read_in_the_same_blocks(small: LLM, chunk: int) -> None:
    """Where passes begin and end hangs on the prompt alone, whatever is remembered and whoever decodes beside it."""
    engine: Any = engine_of(small)
    if engine._rows_alike:
        pytest.skip("where passes begin and end rounds nothing (test_native.py)")
    passes: list[tuple[int, int]] = []
    real, before = engine._prefill, (engine._chunk, engine._budget)

    def noted(response: Any, stop: int, logits: bool) -> Any:
        passes.append((response.cached, stop))
        return real(response, stop, logits)

    engine._prefill = noted
    engine._budget = chunk
    try:
        for prompt in [*PROMPTS, *PROMPTS[::-1], *PROMPTS[::2]]:
            told(small, prompt, max_tokens=1, n=2)
    finally:
        engine._prefill = real
        engine._chunk, engine._budget = before
    block = engine._block
    assert passes and all(start % block == 0 and stop <= start + block for start, stop in passes)
    ends = {len(byte_level()(prompt)["input_ids"]) for prompt in PROMPTS}
    assert all(stop % block == 0 or stop in ends for _, stop in passes)


def test_a_prompt_that_is_known_whole_is_not_read_again(small: LLM) -> None:
    engine: Any = engine_of(small)
    told(small, PROMPTS[5])
    real, engine._prefill = engine._prefill, None
    try:
        assert told(small, PROMPTS[5])
    finally:
        engine._prefill = real


@pytest.mark.parametrize("engine", ENGINES)
def test_the_real_model_says_the_same_again(engine: str) -> None:
    prompts = ("Give me three tips for sleeping well.", "Give me three tips for sleeping.")
    with LLM(engine=engine, max_num_seqs=3, max_model_len=512) as llm:

        def asked(prompt: str, n: int = 2) -> list[Any]:
            params = SamplingParams(temperature=1, seed=1, n=n, max_tokens=6, logprobs=1)
            outputs = llm.chat([{"role": "user", "content": prompt}], params)[0].outputs
            return [(o.token_ids, [sorted(each.items()) for each in o.logprobs or []]) for o in outputs]

        fresh = {}
        for prompt in prompts:
            engine_of(llm).forget()
            fresh[prompt] = asked(prompt)
        for prompt in (prompts[1], prompts[0], prompts[0], prompts[1]):
            assert asked(prompt) == fresh[prompt]
        asked(prompts[1], n=3)
        assert asked(prompts[0]) == fresh[prompts[0]]
