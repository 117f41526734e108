"""The embedded model with the shipped adapter, for real: it forks, and what it decodes is exact.

Exactness by replay (SPEC "What equal means"): the emitted tokens go through plain transformers in one
masked forward; each sampled one must lie within 1e-3 of the largest logit that its mask admitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

from pastalm import LLM, SamplingParams
from pastalm.core.events import Event, Path, TokenSet
from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.engines.batching import BatchingEngine
from pastalm.engines.drafts.budget import StepCosts
from pastalm.eval.replay import ForwardPass, gaps, replay
from pastalm.models import adapters, chat_template, downloads, loading
from pastalm.records.transcripts import linear_tokens

pytestmark = pytest.mark.skipif(
    not (adapters.SHIPPED / downloads.EMBEDDED / "adapter_config.json").is_file(),
    reason="no adapter ships in this tree",
)

FIVE_TIPS = "Give me five tips for staying healthy, each with a short explanation."
GREEDY = SamplingParams(temperature=0, max_tokens=1024)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", max_num_seqs=2, max_model_len=2048)


@pytest.fixture(scope="module")
def decoded(llm: LLM) -> tuple[list[Event], tuple[int, ...]]:
    stream = llm.stream([{"role": "user", "content": FIVE_TIPS}], GREEDY)
    return list(stream), stream.prompt_token_ids


def test_the_five_tips_prompt_forks(decoded: tuple[list[Event], tuple[int, ...]]) -> None:
    events, _ = decoded
    live: set[Path] = set()
    most = 0
    for event in events:
        if event.kind == "forked":
            live.add(event.path)
        elif event.kind in ("finished", "blocked"):
            live.discard(event.path)
        elif event.kind == "joined":
            live.add(event.path)
        most = max(most, len(live))
    assert most >= 2, "no two threads were alive at once"


@pytest.fixture(scope="module")
def on_transformers() -> LLM:
    return LLM(engine="transformers", dtype="float32", max_num_seqs=1)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """The model as transformers has it, nothing laid out for decoding."""
    return loading.load(dtype="float32").model


def test_every_token_is_the_reference_models_choice(
    reference: torch.nn.Module, decoded: tuple[list[Event], tuple[int, ...]]
) -> None:
    events, prompt = decoded
    assert max(replay(reference, prompt, events, "promised")) < 1e-3
    # a control: with other positions the same tokens are not what the model would have chosen
    assert max(replay(reference, prompt, events, "overlap")) > 1e-3


def test_overlapping_positions_are_exact_too(llm: LLM, reference: torch.nn.Module) -> None:
    llm.positions = "overlap"
    try:
        stream = llm.stream(
            [{"role": "user", "content": "List three benefits of reading books."}],
            SamplingParams(temperature=0, max_tokens=300),
        )
        events = list(stream)
    finally:
        llm.positions = "promised"
    assert max(replay(reference, stream.prompt_token_ids, events, "overlap")) < 1e-3


def words() -> Iterator[str]:
    yield from TAG_TOKENS.values()
    yield from ("<promise", "<async>", "<sync/>", "promise topic")


def test_tags_off_leaves_no_trace_of_tags(llm: LLM) -> None:
    stream = llm.stream(
        [{"role": "user", "content": FIVE_TIPS}],
        SamplingParams(temperature=0, max_tokens=200, parallelism=0),
    )
    assert all(event.path == () for event in stream)
    assert not [word for word in words() if word in stream.transcript.text]
    assert stream.transcript.text.strip()


def test_tags_typed_by_a_user_are_text(llm: LLM) -> None:
    typed = chat_template.chat_prompt(llm.loaded, [{"role": "user", "content": "say <|sync|> <|im_end|> <|promise|>"}])
    tags = llm.loaded.vocabulary.tags
    assert tags is not None
    assert not set(tags) & set(typed)
    plain = chat_template.chat_prompt(llm.loaded, [{"role": "user", "content": "say nothing"}])
    ends = llm.loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert typed.count(ends) == plain.count(ends)
    assert "say <|sync|> <|im_end|> <|promise|>" in llm.loaded.tokenizer.backend_tokenizer.decode(typed)


def test_the_server_streams_what_it_answers(llm: LLM) -> None:
    from tests.server.serving import curl, events_of, joined, serving

    asked: dict[str, Any] = {
        "model": downloads.EMBEDDED,
        "messages": [{"role": "user", "content": FIVE_TIPS}],
        "temperature": 0,
        "max_tokens": 200,
        "stop": ["4."],
    }
    with serving(llm, name=downloads.EMBEDDED) as served:
        whole = served.client.chat.completions.create(**asked)
        _, _, streamed = curl(f"{served.url}/v1/chat/completions", {**asked, "stream": True})
        assert served.becomes_idle()
    assert joined(events_of(streamed)) == whole.choices[0].message.content != ""
    assert whole.usage.pasta["choices"][0]["threads"] >= 2
    alone = llm.chat(asked["messages"], SamplingParams(temperature=0, max_tokens=200, stop="4."))
    assert whole.choices[0].message.content == alone[0].outputs[0].text


def test_llama_cpp_decodes_what_the_reference_would(reference: torch.nn.Module, tmp_path: FilePath) -> None:
    engines = pytest.importorskip("pastalm.engines.llama_cpp")
    from pastalm.core.driver import Driver
    from pastalm.models import gguf_files

    here = loading.load(dtype="float32")
    file = gguf_files.export(here, tmp_path / "model.gguf", "F32")
    there = gguf_files.load(file)
    messages = [{"role": "user", "content": FIVE_TIPS}]
    prompt = chat_template.chat_prompt(there, messages)
    assert prompt == chat_template.chat_prompt(here, messages)
    engine = engines.LlamaCppEngine(
        there.model, max_num_seqs=1, max_model_len=1024, cache_type="F32", flash_attention=False
    )
    driver = Driver(engine, there.vocabulary)
    params = SamplingParams(temperature=0, max_tokens=400)
    stream = driver.submit(prompt, params, positions="overlap")
    events = list(stream)
    assert len(stream.transcript.threads) > 2
    assert max(replay(reference, stream.prompt_token_ids, events, "overlap")) < 5e-3
    engine.close()
    there.model.close()


@pytest.mark.parametrize("drafts", ["lookup", "references"])
def test_copied_spans_change_no_token(on_transformers: LLM, drafts: str) -> None:
    """Prompt lookup and LLMA, by replay: each token is the reference's likeliest, within SPEC's tolerance."""
    said = "the quick brown fox jumps over the lazy dog, and then it sleeps."
    text = f"Repeat this twice, word for word: {said}"
    params = SamplingParams(temperature=0, max_tokens=40, parallelism=0, drafts=drafts, references=(said,))
    llm = on_transformers
    assert isinstance(llm.driver.engine, BatchingEngine)
    llm.driver.engine._drafting.costs = StepCosts(lambda rows: 1 + rows * 1e-6)  # rows are free: every guess is fed
    stream = llm.stream([{"role": "user", "content": text}], params)
    for _ in stream:
        pass
    tokens = [one.token for one in linear_tokens(stream.transcript)]
    assert stream.transcript.passes < len(tokens), "nothing was copied: the test sees nothing"
    assert llm.loaded.vocabulary.tags is not None
    allowed = TokenSet(frozenset(llm.loaded.vocabulary.tags), inverted=True)
    assert max(gaps(llm.loaded.model, ForwardPass.plain(stream.prompt_token_ids, tokens, allowed))) < 1e-3
