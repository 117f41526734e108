"""Encoded text is read back as it was, whatever kind of tokenizer a model has; what cannot do that is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from pastalm.core.vocabulary import TAG_TOKENS, Vocabulary
from pastalm.errors import ModelError
from pastalm.models import chat_template, lossless
from pastalm.models.chat_tokenizer import ChatTokenizer, described
from pastalm.records.documents import encode, parse
from pastalm.train.packing import unroll
from tests.test_models import byte_level

SPECIALS = ["<unk>", "<s>", "</s>"]
LETTERS = "abcdefghijklmnopqrstuvwxyzE1."
TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def _named(core: Any, added: tuple[AddedToken, ...] = ()) -> PreTrainedTokenizerFast:
    """With special tokens of its own, of which one begins every text."""
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    core.add_tokens(list(added))
    first = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def _pieces(*, fallback: bool = True) -> dict[str, int]:
    rest = [f"<0x{i:02X}>" for i in range(256)] if fallback else [chr(i) for i in range(32, 127)] + ["\n"]
    return {t: i for i, t in enumerate(dict.fromkeys([*SPECIALS, *rest, "▁", *LETTERS, "▁t", "▁th", "ti", "▁▁"]))}


def sentence_pieces(normalizer: Any = None, cutting: Any = None, *added: AddedToken) -> PreTrainedTokenizerFast:
    """Merges, and bytes for what has none."""
    merges = [("▁", "t"), ("▁t", "h"), ("t", "i"), ("▁", "▁")]
    core = Tokenizer(models.BPE(_pieces(), merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        core.normalizer = normalizer
    if cutting is not None:
        core.pre_tokenizer = cutting
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _named(core, added)


def unigram(*, fallback: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's other kind, behind the normalizers that it often has."""
    scores = [(piece, -float(i % 7) - 1) for piece, i in _pieces(fallback=fallback).items()]
    core = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=fallback))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return _named(core)


def byte_level_with(normalizer: Any = None, *, prefix: bool = False, words: str | None = None) -> Any:
    core = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    if normalizer is not None:
        core.normalizer = normalizer
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=words is None)]
    if words is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(words), "isolated"))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return _named(core, (AddedToken("tips", lstrip=True, rstrip=True), AddedToken("   ", normalized=False)))


_PREPEND = normalizers.Prepend("▁")
_SPACES = normalizers.Replace(" ", "▁")
_RUNS = AddedToken("▁▁", normalized=False)
KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, a space before (RoBERTa, Phi)": lambda: byte_level_with(prefix=True),
    "byte-level, composed (Qwen)": lambda: byte_level_with(normalizers.NFC(), words=r"\s+|\p{L}+|[^\s\p{L}]+"),
    "prepended (Llama 2, TinyLlama)": lambda: sentence_pieces(normalizers.Sequence([_PREPEND, _SPACES])),
    "spaces replaced (Gemma)": lambda: sentence_pieces(
        _SPACES, pre_tokenizers.Split(" ", "merged_with_previous"), _RUNS
    ),
    "metaspace first (Mistral)": lambda: sentence_pieces(
        None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "metaspace always": lambda: sentence_pieces(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace never": lambda: sentence_pieces(None, pre_tokenizers.Metaspace(prepend_scheme="never")),
    "unigram with bytes": unigram,
}
MORE = [" ", "  ", "\n", "1. Eat", "▁", "é", "e\u0301", "ﬁ", "tips", "the", "<0x41>"]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from([*SPECIALS, *TAG_TOKENS.values(), *MORE])).map("".join),
)


@cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


@cache
def vocabulary(kind: str) -> Vocabulary:
    made = copy.deepcopy(tokenizer(kind))
    made.add_special_tokens({"extra_special_tokens": list(TAG_TOKENS.values())})
    return lossless.vocabulary_of(made, eos=[2])


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
def test_a_text_is_read_back_as_it_was(kind: str, text: str) -> None:
    known = vocabulary(kind)
    assert known.text(known.encode(text)) == text
    assert b"".join(known.piece(token) for token in known.encode(text)) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
def test_so_it_is_without_transformers(kind: str, text: str) -> None:
    alone = lossless.vocabulary_of(_alone(kind), eos=[2])
    assert alone.encode(text) == vocabulary(kind).encode(text)
    assert alone.text(alone.encode(text)) == text


@cache
def _alone(kind: str) -> ChatTokenizer:
    return ChatTokenizer(described(tokenizer(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_chunks_hold_no_space_that_nobody_wrote(kind: str) -> None:
    known = vocabulary(kind)
    document = parse(
        'Two.\n<promise topic="the one" tokens="10"/><async>1. Eat\n</async>'
        '<promise topic="other" tokens="20"/><async>- a\n</async><sync/>End'
    )
    assert known.tags is not None
    ids = encode(document, known)
    assert known.text(ids) == "Two.\nthe one101. Eat\nother20- a\nEnd"
    assert known.text(e.token for e in unroll(document, known) if hasattr(e, "token") and not e.tag) == (
        "Two.\n1. Eat\n- a\nEnd"
    )
    assert set(known.numbers.values()) == set(range(10, 501, 10))


# ------------------------------------------------------------------------------ prompts

PROMPTED = [kind for kind in KINDS if kind not in ("byte-level", "unigram with bytes")]
"""Kinds that begin a text with a token, and cut nothing off prompts."""


@pytest.mark.parametrize("kind", PROMPTED)
@given(parts=st.lists(st.sampled_from([*TAG_TOKENS.values(), "the ", " ti", "E", "</s>"]), max_size=5))
def test_a_raw_prompt_begins_once_whatever_it_spells(kind: str, parts: list[str]) -> None:
    known, made = vocabulary(kind), tokenizer(kind)
    (begin,) = made("")["input_ids"]
    ids = chat_template.raw_prompt(made, known, "".join(parts))
    assert ids[0] == begin and ids.count(begin) == 1
    assert ids.count(made.eos_token_id) == parts.count("</s>")
    if "</s>" not in parts:  # behind it the tokenizer may put a space
        assert known.text(ids) in ("".join(parts), " " + "".join(parts))


@pytest.mark.parametrize("kind", PROMPTED)
def test_a_tag_in_a_message_puts_no_space_into_it(kind: str) -> None:
    known, made = vocabulary(kind), tokenizer(kind)
    for said in ("a<|sync|>the E", "<|sync|>the", "the <s>E<|sync|>"):
        message = {"role": "user", "content": said}
        plain = made.apply_chat_template([message], tokenize=False).removeprefix("<s>")
        assert known.text(chat_template.encode_chat(made, known, [message])).removeprefix(" ") == plain


# ------------------------------------------------------------------------------ what cannot


def word_pieces() -> Any:
    core = Tokenizer(models.WordPiece({t: i for i, t in enumerate([*SPECIALS, *LETTERS, "##a"])}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _named(core)


def word_ends() -> Any:
    vocab = {t: i for i, t in enumerate([*SPECIALS, *LETTERS, *(f"{c}</w>" for c in LETTERS)])}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.decoder = decoders.BPEDecoder()
    return _named(core)


@pytest.mark.parametrize("made", [word_pieces, word_ends])
def test_a_tokenizer_that_loses_text_is_refused(made: Callable[[], Any]) -> None:
    with pytest.raises(ModelError, match="does not reproduce a text") as caught:
        lossless.vocabulary_of(made(), eos=[2])
    assert "\n" not in str(caught.value)


def test_one_without_a_description_is_refused() -> None:
    with pytest.raises(ModelError, match="no tokenizer.json"):
        lossless.vocabulary_of(object(), eos=[2])


@given(text=TEXT)
def test_a_character_without_a_token_is_left_out_and_nothing_else(text: str) -> None:
    known = lossless.vocabulary_of(_without_bytes(), eos=[2])
    spaced = text.replace("▁", " ")  # without bytes the sign can only be the space that it stands for
    has = "".join(char for char in spaced if char == "\n" or " " <= char <= "~")
    assert known.text(known.encode(text)) == has


@cache
def _without_bytes() -> Any:
    return unigram(fallback=False)
