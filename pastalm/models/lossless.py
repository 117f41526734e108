"""Encodes text without loss: decoding the ids gives the same text. Uses a tokenizer of `tokenizers`.

Some tokenizers change a text before they split it. SentencePiece puts a space before it (Llama 2, Mistral, TinyLlama);
others compose characters or strip white space. That is right at the start of a prompt, but not in an answer, whose
chunks stand between tags: there nothing may be added or lost. Text never becomes a special token here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from pastalm.core.vocabulary import TAG_TOKENS, Tags, Vocabulary
from pastalm.errors import ModelError
from pastalm.records.xml import Scanner

SPACE = "\u2581"
"""How SentencePiece writes a space."""
_ASCII = "".join(map(chr, range(32, 127))) + "\n  Two  spaces,\n\n- a list. 1. Eat"
"""A text that every tokenizer must reproduce."""
NOTHING = "(?!)"
"""A pattern that never matches."""


def vocabulary_of(tokenizer: Any, *, eos: Iterable[int], size: int | None = None) -> Vocabulary:
    """The Vocabulary of a tokenizer. Decoding an encoded text gives the same text.

    tokenizer: of transformers, or a ChatTokenizer.
    eos: ids that end an answer.
    size: vocabulary size of the model, if larger than the tokenizer's.

    `tags` is None if the tokenizer lacks the six tag tokens. Raises ModelError if encoding is not lossless.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"a {type(tokenizer).__name__} has no tokenizer.json: save one beside the model")
    ids = {name: backend.token_to_id(t) for name, t in TAG_TOKENS.items()}
    tags = None if None in ids.values() else Tags(**ids)
    special = set(tokenizer.all_special_ids) | set(tags or ())
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    to_bytes = byte_reader(tokenizer)
    cache: dict[int, bytes] = {}

    def piece(token: int) -> bytes:
        if token not in cache:
            cache[token] = b"" if token in special else to_bytes(token)
        return cache[token]

    eos = frozenset(eos)
    ends = frozenset(text for text in map(tokenizer.convert_ids_to_tokens, eos) if text)
    encode = encoder(backend, piece)
    size = size or len(tokenizer)
    return Vocabulary(size=size, eos=eos, encode=encode, piece=piece, scanner=Scanner, tags=tags, ends=ends)


def encoder(backend: Any, piece: Callable[[int], bytes]) -> Callable[[str], list[int]]:
    """A function that encodes a text to ids whose pieces are that text. Characters without a token are left out.

    backend: a `tokenizers.Tokenizer`.
    piece: gives the bytes of a token.

    Raises ModelError if the tokenizer does not reproduce plain ASCII.
    """
    unchanged = without_changes(backend)
    sign = [backend.token_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
    apart = _apart(backend, sign_has_bytes=not is_byte_level(backend) and None not in sign)

    def ids_of(text: str) -> list[int]:
        ids: list[int] = unchanged.encode(text, add_special_tokens=False).ids
        return ids

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for part in _cut(text, apart):
            ids += sign if part == SPACE and apart.match(SPACE) else ids_of(part)
        return ids

    if b"".join(map(piece, encode(_ASCII))) != _ASCII.encode():
        raise ModelError("this model's tokenizer does not reproduce a text: choose another model")
    return encode


def _apart(backend: Any, *, sign_has_bytes: bool) -> re.Pattern[str]:
    """Matches text that must be split before it is encoded: SentencePiece's sign for a space; for Unigram, which has no
    merges, also spellings of special tokens and bytes."""
    spellings = [re.escape(SPACE)] if sign_has_bytes else []
    if type(backend.model).__name__ == "Unigram":
        special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special and len(t.content) > 1]
        spellings += [*map(re.escape, sorted(special, key=len, reverse=True)), "<0x[0-9A-F]{2}>"]
    return re.compile("|".join(spellings) or NOTHING)


def _cut(text: str, apart: re.Pattern[str]) -> Iterator[str]:
    """The text in parts: the sign for a space alone; other matches are split after their first character."""
    at = 0
    for match in apart.finditer(text):
        alone = match[0] == SPACE
        cut = match.start() + (0 if alone else 1)
        yield text[at:cut]
        at = match.end() if alone else cut
        if alone:
            yield SPACE
    yield text[at:]


def is_byte_level(backend: Any) -> bool:
    """Whether a tokenizer writes tokens in GPT-2's alphabet of bytes."""
    return "ByteLevel" in str(backend.decoder)


# ------------------------------------------------------------------------------ encoding


def text_only(backend: Any) -> Any:
    """The same tokenizer without special tokens. It shares the merges, since copying them takes a fifth of a second."""
    return _combined(backend, backend, backend.get_added_tokens_decoder())


def without_changes(backend: Any) -> Any:
    """`text_only` without steps that change a text before it is split. Spaces are still written as in SentencePiece."""
    from tokenizers import AddedToken, Tokenizer

    steps = {
        "normalizer": _steps(backend.normalizer, _only_spaces),
        "pre_tokenizer": _steps(backend.pre_tokenizer, _without_prefix),
    }
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    cutting = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": empty, **steps}))
    added = {
        i: AddedToken(t.content, single_word=t.single_word, normalized=t.normalized, special=t.special)
        for i, t in backend.get_added_tokens_decoder().items()
    }
    return _combined(backend, cutting, added)


def _combined(backend: Any, cutting: Any, added: Mapping[int, Any]) -> Any:
    """A tokenizer with the model of one tokenizer, and the normalizer and pre-tokenizer of another.

    backend: has the model.
    cutting: has the normalizer and the pre-tokenizer.
    added: added tokens by id.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if (component := getattr(cutting, part)) is not None:
            setattr(tokenizer, part, component)
    tokens = (token for _, token in sorted(added.items()))
    for special, some in groupby(tokens, key=lambda token: token.special):
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(some))
    tokenizer.encode_special_tokens = True
    return tokenizer


Step = dict[str, Any]


def _steps(part: Any, change: Callable[[Step], Step | None]) -> Step | None:
    """A normalizer or pre-tokenizer in the form of tokenizer.json, after `change` of each step (None: left out)."""
    return None if part is None else _changed(json.loads(part.__getstate__()), change)


def _changed(step: Step, change: Callable[[Step], Step | None]) -> Step | None:
    if step["type"] != "Sequence":
        return change(step)
    key = "normalizers" if "normalizers" in step else "pretokenizers"
    return {**step, key: [changed for inner in step[key] if (changed := _changed(inner, change)) is not None]}


def _only_spaces(step: Step) -> Step | None:
    spaces = step["type"] == "Replace" and step["content"] == SPACE and step["pattern"] == {"String": " "}
    return step if spaces or step["type"] == "ByteLevel" else None


def _without_prefix(step: Step) -> Step:
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if step["type"] == "ByteLevel" else step


# ------------------------------------------------------------------------------ reading


def byte_reader(tokenizer: Any) -> Callable[[int], bytes]:
    """A function that gives the bytes of a token, for byte-level BPE (GPT-2's alphabet) and for SentencePiece."""
    backend = tokenizer.backend_tokenizer
    byte_level = is_byte_level(backend)
    alphabet: dict[str, bytes] = {char: bytes([byte]) for byte, char in _gpt2_alphabet().items()}
    added: dict[int, bytes] = {
        i: t.content.encode()
        for i, t in tokenizer.added_tokens_decoder.items()
        # Gemma has runs of spaces as added tokens, written as in SentencePiece
        if byte_level or t.special or backend.model.token_to_id(t.content) is None
    }

    def read(token: int) -> bytes:
        if token in added:
            return added[token]
        piece: str | None = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if byte_level:
            return b"".join(alphabet.get(char) or char.encode() for char in piece)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
        return piece.replace(SPACE, " ").encode()

    return read


def _gpt2_alphabet() -> dict[int, str]:
    """The characters that stand for the 256 bytes: printable bytes for themselves, the others for 256 and up."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in prints)
    return {b: chr(b) for b in prints} | {b: chr(256 + i) for i, b in enumerate(others)}


# ------------------------------------------------------------------------------ prompts


def special_spellings(tokenizer: Any) -> set[str]:
    """The spellings of a tokenizer's special tokens."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def any_of(spellings: set[str]) -> re.Pattern[str]:
    """A pattern that matches the longest of some spellings; none: it never matches."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or NOTHING)


def encode_parts(tokenizer: Any, encode: Callable[[str], Any], parts: list[str]) -> list[int]:
    """Token ids of one prompt in parts. In every second part, special tokens are encoded as plain text.

    tokenizer: encodes the other parts. If it puts a space before a text, only the first part gets one.
    encode: encodes plain text.
    parts: their concatenation is the prompt.
    """
    prefixes = list(tokenizer("a", add_special_tokens=False)["input_ids"]) != list(encode("a"))
    special = any_of(special_spellings(tokenizer))
    ids: list[int] = []
    for i, part in enumerate(parts):
        rest = part
        if i % 2 or (i and prefixes):
            match = None if i % 2 else special.search(part)
            at = match.start() if match else len(part)
            ids += encode(part[:at])
            rest = part[at:]
        if rest:
            ids += tokenizer(rest, add_special_tokens=False)["input_ids"]
    return ids


def begins_with(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before every text, such as BOS."""
    added = list(tokenizer("")["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    alone = added == [end] and end != getattr(tokenizer, "bos_token_id", None)
    return added[:-1] if added[-1:] == [end] and (len(added) > 1 or alone) else added
