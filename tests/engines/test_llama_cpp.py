"""The llama.cpp engine: exact by replay on tiny random models, its cache, and files that it writes and reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pastalm.core.events import Blocked, Decoded, Finished, Forked, Joined
from pastalm.core.params import Request, SamplingParams
from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.errors import CapabilityError, EngineError, ModelError, RequestError
from pastalm.models.loading import Loaded
from pastalm.models.lossless import vocabulary_of
from tests.laws.replayed import error
from tests.laws.script import play, random_scripts
from tests.laws.test_exactness import SCHEDULES
from tests.laws.tiny import EOS, SIZE, tiny_model

llama_cpp = pytest.importorskip("llama_cpp")
gguf_files = pytest.importorskip("pastalm.models.gguf_files")
engines = pytest.importorskip("pastalm.engines.llama_cpp")

CLOSE = 1e-4
"""In standard deviations of the logits; everything is in float32."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes in GPT-2's alphabet are tokens 0..255, then the end, the six tags and one pair."""
    specials = ["<|end|>", *TAG_TOKENS.values()]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *specials, "ab"]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in specials])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return made


def loaded(model: PreTrainedModel) -> Loaded:
    words = tokenizer()
    return Loaded(
        name="tiny",
        model=model,
        tokenizer=words,
        vocabulary=vocabulary_of(words, eos={EOS}, size=SIZE),
        prepared=True,
        sequential_marker="In one piece.",
        context_length=4096,
    )


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def reference(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, dtype=torch.float32, layers=3)


@pytest.fixture(scope="module")
def file(reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return gguf_files.export(loaded(reference), folder / "tiny.gguf", "F32")


@pytest.fixture(scope="module")
def weights(file: Path) -> Iterator[engines.LlamaCppModel]:
    model = engines.LlamaCppModel(file)
    yield model
    model.close()


@pytest.fixture
def engine(weights: engines.LlamaCppModel) -> Iterator[Callable[..., engines.LlamaCppEngine]]:
    made: list[engines.LlamaCppEngine] = []

    def make(**options: object) -> engines.LlamaCppEngine:
        exact = {"cache_type": "F32", "flash_attention": False}
        options = {"max_num_seqs": 2, "max_model_len": 512} | exact | options
        made.append(engines.LlamaCppEngine(weights, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_token_is_as_one_masked_forward_pass_says(
    schedule: str, engine: Callable[..., engines.LlamaCppEngine], reference: PreTrainedModel
) -> None:
    for seed in (1, 2, 3):
        (script,) = random_scripts(seed, "overlap", 1)
        play(engine(schedule=SCHEDULES[schedule]()), [script])
        assert error(reference, script) < CLOSE


def test_the_comparison_sees_threads_that_are_not_hidden(
    engine: Callable[..., engines.LlamaCppEngine], reference: PreTrainedModel
) -> None:
    (script,) = random_scripts(2, "overlap", 1)
    play(engine(), [script])
    assert error(reference, script, hiding=False) > 10 * CLOSE


def test_many_requests_in_few_places(engine: Callable[..., engines.LlamaCppEngine], reference: PreTrainedModel) -> None:
    scripts = random_scripts(5, "overlap", 6)
    running = engine(max_num_seqs=3)
    play(running, scripts)
    assert max(error(reference, script) for script in scripts) < CLOSE
    running.forget()
    assert len(running._cache.free) == engines.MAX_SEQUENCES


def test_children_wait_where_no_sequence_is_free(
    engine: Callable[..., engines.LlamaCppEngine],
    reference: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = engines.LlamaCppEngine._feedable
    waited: list[bool] = []

    def watched(self: engines.LlamaCppEngine, response: Any, due: list[Any]) -> list[Any]:
        fed: list[Any] = real(self, response, due)
        waited.append(len(fed) < len(due))
        return fed

    monkeypatch.setattr(engines.LlamaCppEngine, "_feedable", watched)
    for seed in range(1, 5):
        scarce = 12
        while scarce > 3:  # ever fewer sequences, until the threads could only wait for each other
            scarce -= 1
            (script,) = random_scripts(seed, "overlap", 1)
            running = engine(max_num_seqs=1)
            running._cache.free = running._cache.free[:scarce]
            try:
                play(running, [script])
            except EngineError:
                break
            assert error(reference, script) < CLOSE
    assert any(waited)


def test_threads_that_could_only_wait_for_each_other_are_an_error(
    engine: Callable[..., engines.LlamaCppEngine],
) -> None:
    (script,) = random_scripts(2, "overlap", 1)
    running = engine(max_num_seqs=1)
    running._cache.free = running._cache.free[:3]
    with pytest.raises(EngineError, match="lower max_threads"):
        play(running, [script])
    running.cancel(script.id)
    running.forget()
    assert len(running._cache.free) == 3


def test_flash_attention_in_half_precision_is_near(
    engine: Callable[..., engines.LlamaCppEngine], reference: PreTrainedModel
) -> None:
    (script,) = random_scripts(1, "overlap", 1)
    play(engine(cache_type="F16", flash_attention=True), [script])
    assert CLOSE < error(reference, script) < 0.05


# ------------------------------------------------------------------------------ requests


def request(name: str, prompt: tuple[int, ...] = tuple(range(20)), most: int = 8) -> Request:
    params = SamplingParams(temperature=0, max_tokens=most)
    return Request(id=name, prompt_token_ids=prompt, params=params, positions="overlap")


def decoded(engine: engines.LlamaCppEngine, *requests: Request, steps: int = 4) -> dict[str, list[int]]:
    """Greedy tokens of requests decoded side by side; they are cancelled afterwards."""
    found: dict[str, list[int]] = {r.id: [] for r in requests}
    for r in requests:
        engine.add(r)
        engine.apply(r.id, Forked(path=()))
    while any(len(tokens) < steps for tokens in found.values()):
        for sampled in engine.step():
            found[sampled.request_id].append(sampled.token)
            if len(found[sampled.request_id]) == steps:
                engine.cancel(sampled.request_id)
            else:
                engine.apply(sampled.request_id, Decoded(path=(), token=sampled.token))
    return found


def test_a_remembered_prefix_changes_nothing(engine: Callable[..., engines.LlamaCppEngine]) -> None:
    prompt = tuple(range(40))
    longer = (*prompt[:25], *range(100, 130))
    want = decoded(engine(), request("a", prompt)) | decoded(engine(), request("b", longer))
    running = engine()
    assert decoded(running, request("a", prompt)) | decoded(running, request("b", longer)) == want
    assert decoded(running, request("a", prompt))["a"] == want["a"]
    running.forget()
    assert decoded(running, request("a", prompt))["a"] == want["a"]


def test_requests_wait_for_room_and_none_is_lost(engine: Callable[..., engines.LlamaCppEngine]) -> None:
    prompts = {f"r{i}": tuple(random.Random(i).randrange(256) for _ in range(30)) for i in range(5)}
    want = {n: decoded(engine(), request(n, p))[n] for n, p in prompts.items()}
    running = engine(max_num_seqs=2)
    assert decoded(running, *(request(n, p) for n, p in prompts.items())) == want


def test_a_prompt_longer_than_one_call(engine: Callable[..., engines.LlamaCppEngine]) -> None:
    prompt = tuple(random.Random(1).randrange(256) for _ in range(engines.BATCH + 100))
    running = engine(max_num_seqs=1, max_model_len=1024)
    assert len(decoded(running, request("a", prompt))["a"]) == 4


def test_what_is_refused(engine: Callable[..., engines.LlamaCppEngine]) -> None:
    running = engine()
    with pytest.raises(RequestError, match="max_model_len"):
        running.add(request("a", most=600))
    with pytest.raises(RequestError, match="empty"):
        running.add(request("a", ()))
    with pytest.raises(CapabilityError, match="overlap"):
        running.add(replace(request("a"), positions="promised"))


def test_a_failed_call_is_an_error_and_the_engine_goes_on(
    engine: Callable[..., engines.LlamaCppEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine()
    want = decoded(engine(), request("b"))
    with monkeypatch.context() as patch:
        patch.setattr(engines.llama_cpp, "llama_decode", lambda *_: 1)
        running.add(request("a"))
        running.apply("a", Forked(path=()))
        with pytest.raises(EngineError, match="no room"):
            running.step()
    running.cancel("a")
    assert decoded(running, request("b")) == want


def test_a_response_that_ends_gives_everything_back(engine: Callable[..., engines.LlamaCppEngine]) -> None:
    running = engine()
    running.add(request("a", most=40))
    running.apply("a", Forked(path=()))
    (token,) = running.step()
    running.apply("a", Decoded(path=(), token=token.token))
    running.apply("a", Forked(path=(0,), promised=10, forced=(7,)))
    assert [sampled.path for sampled in running.step()] == [(), (0,)]
    running.apply("a", Blocked(path=()))
    running.apply("a", Decoded(path=(0,), token=3))
    running.apply("a", Finished(path=(0,)))
    running.apply("a", Joined(path=(), children=((0,),), forced=(5,)))
    while not running.step():
        pass
    assert set(running._places["a"].sequences) == {()}
    running.apply("a", Finished(path=()))
    running.forget()
    assert len(running._cache.free) == engines.MAX_SEQUENCES
    assert not running.has_unfinished()


# ------------------------------------------------------------------------------ files


def test_a_file_keeps_vocabulary_template_and_marker(file: Path, reference: PreTrainedModel) -> None:
    here, there = loaded(reference), gguf_files.load(file)
    assert there.prepared
    assert there.vocabulary.tags == here.vocabulary.tags
    assert there.vocabulary.eos == here.vocabulary.eos
    assert there.sequential_marker == "In one piece."
    for text in ("plain words", "é ü 漢字 \U0001f600", "<|promise|> typed", "  two  spaces\n\n"):
        assert there.vocabulary.encode(text) == here.vocabulary.encode(text)
        ids = there.vocabulary.encode(text)
        assert b"".join(map(there.vocabulary.piece, ids)).decode() == text
    from pastalm.models.chat_template import chat_prompt

    messages = [{"role": "user", "content": "Hello <|sync|> there"}]
    assert chat_prompt(there, messages) == chat_prompt(here, messages)
    there.model.close()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_other_weight_types_load_and_answer(kind: str, reference: PreTrainedModel, tmp_path: Path) -> None:
    path = gguf_files.export(loaded(reference), tmp_path / f"{kind}.gguf", kind)
    model = engines.LlamaCppModel(path)
    running = engines.LlamaCppEngine(model, max_num_seqs=1, max_model_len=128)
    assert len(decoded(running, request("a"))["a"]) == 4
    running.close()
    model.close()
    assert [p.name for p in tmp_path.iterdir()] == [f"{kind}.gguf"]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no GGUF file"):
        engines.LlamaCppModel(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot load"):
        engines.LlamaCppModel(tmp_path / "bad.gguf")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="weight type"):
        gguf_files.export(loaded(tiny_model("llama", dtype=torch.float32)), tmp_path / "x.gguf", "Q9")
    with pytest.raises(CapabilityError, match="gemma2"):
        gguf_files.export(loaded(tiny_model("gemma2", dtype=torch.float32)), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
