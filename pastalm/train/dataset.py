"""Turns annotated answers (annotate.py) into batches of packed examples.

It uses complete answers up to `max_tokens`. A share has no chunks, so that the model learns when not to fork. A share
of the structured ones is used without tags, with the sequential marker. Answers with a list that the annotator did not
mark are left out, since they would teach the model to write lists sequentially, unless the list is one for a single
thread, such as the steps of a recipe: those teach when not to fork. One seed determines everything.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch

from pastalm.core.events import Event
from pastalm.core.events import Path as ThreadPath
from pastalm.core.language import Promise, Sync, Text, round_length
from pastalm.core.layout import Policy
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import DataError, LanguageError, RequestError
from pastalm.models.chat_template import SEQUENTIAL_MARKER, encode_chat
from pastalm.records import answers, jsonl
from pastalm.records.documents import Async, Document, Node, normalize, parse, strip
from pastalm.records.scores import Scored
from pastalm.train.packing import IGNORED, MIXED, Packed, pack, pack_events, pack_serial, retell, with_true_lengths
from pastalm.train.structure import CountTokens, for_one_thread

Lengths = Literal["tens", "fixed", "oracle"]
"""The length in a promise. tens: its chunk's, rounded to tens. fixed: always the same. oracle: as tens, but positions
use the true length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How a training set is drawn. Shares are of rows.

    token_budget: packed tokens in all, prompts too. plain: rows without chunks. sequential: rows
    under the marker. positions: weight of each policy for rows with chunks. untagged: the same rows, all
    without tags and marker (Baseline-SFT). lengths, topics, syncs: the paper's ablations (section 6): what a
    promise says of its chunk's length, whether it says what the chunk is about, whether chunks are ever read.
    cut: share of chunks of several sentences that end at one of these, drawn at random, so that nothing but the promise
    tells where a chunk ends. The numbers of their promises are not in the loss.
    """

    token_budget: int = 800_000
    max_tokens: int = 512
    max_prompt_tokens: int = 256
    plain: float = 0.33
    sequential: float = 0.12
    positions: Mapping[Policy, float] = field(default_factory=lambda: dict(MIXED))
    untagged: bool = False
    lengths: Lengths = "tens"
    topics: bool = True
    syncs: bool = True
    cut: float = 0.0
    seed: int = 0


def check_lengths(name: str) -> Lengths:
    """Returns the name as a Lengths. Raises RequestError if it is unknown."""
    names: dict[str, Lengths] = {one: one for one in get_args(Lengths)}
    if name not in names:
        raise RequestError(f"unknown lengths {name!r}: use {', '.join(names)}")
    return names[name]


FIXED = 100
"""The length in every promise with "fixed"."""


def ablated(document: Document, mix: Mix) -> Document:
    """The document without what the mix leaves out. Topics are replaced by numbers, since siblings must differ."""
    nodes: list[Node] = []
    for number, node in enumerate(document):
        if isinstance(node, Promise):
            topic = node.topic if mix.topics else f"part {number}"
            node = Promise(topic, FIXED if mix.lengths == "fixed" else node.tokens)
        elif isinstance(node, Async):
            node = Async(ablated(node.body, mix))
        if mix.syncs or not isinstance(node, Sync):
            nodes.append(node)
    return normalize(nodes)


SHORTEST_CUT = 20
"""Characters that are left of a chunk at least: more than the marker of its item."""
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"(*])")


def cut(
    document: Document, share: float, rng: random.Random, count_tokens: CountTokens
) -> tuple[Document, frozenset[int]]:
    """The document with some chunks cut at the end of a sentence, and the indices of these among its promises.

    A chunk that was cut keeps the white space at its end, and its promise says its new length. Chunks with chunks of
    their own are left as they are.

    share: of the chunks that have more than one sentence.
    count_tokens: counts the tokens of a text.
    """
    nodes: list[Node] = []
    cut_ones: set[int] = set()
    index = -1
    for node in document:
        index += isinstance(node, Promise)
        if isinstance(node, Async) and isinstance(promise := nodes[-1], Promise):
            text = _cut_text(node, rng) if rng.random() < share else None
            if text is not None:
                nodes[-1] = Promise(promise.topic, round_length(count_tokens(text)))
                node = Async((Text(text),))
                cut_ones.add(index)
        nodes.append(node)
    return tuple(nodes), frozenset(cut_ones)


def _cut_text(chunk: Async, rng: random.Random) -> str | None:
    """The text of a chunk up to one of its sentences; None if it has one only, or chunks of its own."""
    if len(chunk.body) != 1 or not isinstance(body := chunk.body[0], Text):
        return None
    text = body.text.rstrip()
    ends = [m.start() for m in _BETWEEN_SENTENCES.finditer(text) if m.start() >= SHORTEST_CUT]
    return text[: rng.choice(ends)] + body.text[len(text) :] if ends else None


@dataclass(frozen=True, slots=True)
class Source:
    """An annotated answer as read."""

    id: str
    prompt: str
    document: Document
    tokens: int
    chunks: int
    source: str
    licence: str


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on, and where it comes from. kind: tagged, plain or sequential, whose labels
    the model is to say; or repeat, whose labels it said once too often."""

    packed: Packed
    id: str
    prompt: str
    kind: str
    source: str
    licence: str


def read_annotated(path: Path) -> list[Source]:
    """The rows of an annotated file. Raises DataError with the line that cannot be read."""
    rows = []
    for where, row in jsonl.read(path):
        try:
            rows.append(
                Source(
                    id=jsonl.string(row, "id", where),
                    prompt=jsonl.string(row, "prompt", where),
                    document=parse(jsonl.string(row, "annotated", where)),
                    tokens=int(row["tokens"]),
                    chunks=int(row["chunks"]),
                    source=jsonl.string(row, "source", where, needed=False),
                    licence=jsonl.string(row, "licence", where, needed=False),
                )
            )
        except (ValueError, KeyError, TypeError, LanguageError) as error:
            raise DataError(f"{where}: not an annotated answer ({error}); annotate it again") from None
    if not rows:
        raise DataError(f"{path} is empty: annotate some answers first (pasta annotate)")
    return rows


SHORT_ITEM = 90
"""Lists of items with fewer characters than this are not worth forking, and teach to abstain; one of
longer items that was left alone may be independent all the same, and teaches nothing, unless it is known not to be."""
_ITEM = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*•])\s+\S", re.MULTILINE)


def _usable(row: Source, mix: Mix, count_tokens: CountTokens) -> bool:
    if not 8 <= row.tokens <= mix.max_tokens or not row.prompt.strip():
        return False
    text = strip(row.document)
    if "<|im_" in text or "<|endoftext|>" in text:
        return False
    if row.chunks:
        return row.chunks >= 2
    items = len(_ITEM.findall(text))
    listed = items >= 3 and len(text) >= SHORT_ITEM * items
    return not listed or for_one_thread(text, count_tokens, prompt=row.prompt)


def examples(
    rows: Sequence[Source], tokenizer: Any, vocabulary: Vocabulary, mix: Mix, *, eos: int
) -> Iterator[Example]:
    """Examples in training order until the token budget is spent or the rows are."""
    rng = random.Random(mix.seed)
    usable = [row for row in rows if _usable(row, mix, lambda text: len(vocabulary.encode(text)))]
    tagged = [row for row in usable if row.chunks]
    plain = [row for row in usable if not row.chunks]
    rng.shuffle(tagged)
    rng.shuffle(plain)
    repeated = tagged.copy()
    rng.shuffle(repeated)
    budget = mix.token_budget
    while tagged or plain:
        draw = rng.random()
        if draw < mix.sequential:
            pool = repeated if repeated and rng.random() < 0.8 else plain
            kind = "sequential"
        else:
            kind = "plain" if draw < mix.sequential + mix.plain else "tagged"
            pool = plain if kind == "plain" else tagged
        if not pool:
            return
        row = pool.pop()
        row_examples = list(_example(row, kind, tokenizer, vocabulary, mix, rng, eos))
        for example in row_examples:
            budget -= len(example.packed)
            if budget < 0:
                return
            if not mix.untagged:
                yield example
        if mix.untagged and row_examples and kind != "sequential":  # those stand among the others but for the marker
            yield _untagged(row, tokenizer, vocabulary, eos)


def _example(
    row: Source,
    kind: str,
    tokenizer: Any,
    vocabulary: Vocabulary,
    mix: Mix,
    rng: random.Random,
    eos: int,
) -> Iterator[Example]:
    marker = SEQUENTIAL_MARKER if kind == "sequential" else None
    messages = [{"role": "user", "content": row.prompt}]
    prompt = encode_chat(tokenizer, vocabulary, messages, marker=marker)
    if len(prompt) > mix.max_prompt_tokens:
        return
    document: Document = (Text(strip(row.document)),) if kind == "sequential" else ablated(row.document, mix)
    policy: Policy = "promised"  # without chunks all policies are the same
    if kind == "tagged":
        policy = rng.choices(list(mix.positions), list(mix.positions.values()))[0]
    cut_chunks: frozenset[int] = frozenset()
    if kind == "tagged" and mix.cut and mix.lengths == "tens" and policy != "serial":
        document, cut_chunks = cut(document, mix.cut, rng, lambda text: len(vocabulary.encode(text)))
    if policy == "serial":
        packed = pack_serial(prompt, document, vocabulary, eos=eos)
    else:
        packed = [pack(prompt, document, vocabulary, policy, eos=eos, oracle=mix.lengths == "oracle")]
    for one in packed:
        _forget_numbers(one, cut_chunks, vocabulary)
        yield Example(one, row.id, row.prompt, kind, row.source, row.licence)


def _forget_numbers(packed: Packed, promises: frozenset[int], vocabulary: Vocabulary) -> None:
    """Takes the numbers of some of the main thread's promises out of the loss. promises: their indices."""
    if not promises or vocabulary.tags is None:
        return
    index, inside = -1, False
    for i, token in enumerate(packed.input_ids.tolist()):
        if packed.paths[i]:
            continue
        index += token == vocabulary.tags.promise
        inside = inside and token != vocabulary.tags.promise_end
        if inside and index in promises:
            packed.labels[i] = IGNORED
        inside = inside or token == vocabulary.tags.tokens


def _untagged(row: Source, tokenizer: Any, vocabulary: Vocabulary, eos: int) -> Example:
    prompt = encode_chat(tokenizer, vocabulary, [{"role": "user", "content": row.prompt}])
    packed = pack(prompt, (Text(strip(row.document)),), vocabulary, "promised", eos=eos)
    return Example(packed, row.id, row.prompt, "plain", row.source, row.licence)


# ------------------------------------------------------------------------------ what to unlearn

REPEAT = 8
"""Length in tokens of an n-gram that counts as a repetition when its thread produced it before."""
REPEATS = 96
"""Maximum repeated tokens of an answer to unlearn: enough for the start of a loop."""


def read_repeats(path: Path, tokenizer: Any, vocabulary: Vocabulary, mix: Mix, *, eos: int) -> Iterator[Example]:
    """Examples for unlikelihood training: a model's own answers (`pasta sample`) that were cut off, where the labels
    are the tokens that repeat earlier ones of their thread (Welleck et al., "Neural text generation with unlikelihood
    training", ICLR 2020, section 5.2).

    path: the file of answers.
    tokenizer: of transformers.
    vocabulary: its Vocabulary.
    mix: bounds on lengths; untagged.
    eos: id that ends an answer.

    Raises DataError.
    """
    for answer in answers.read(path):
        marker = SEQUENTIAL_MARKER if answer.sequential and not mix.untagged else None
        ids = encode_chat(tokenizer, vocabulary, [{"role": "user", "content": answer.prompt}], marker=marker)
        if answer.finish_reason != "length" or len(ids) > mix.max_prompt_tokens:
            continue
        whole, _ = pack_sampled(ids, answer, vocabulary, "promised", eos=eos)
        packed = repeated(whole, vocabulary)
        if packed is not None and len(packed) <= mix.max_prompt_tokens + 2 * mix.max_tokens:
            yield Example(packed, answer.id, answer.prompt, "repeat", "own answers", "the model's own")


SampledAnswer: TypeAlias = answers.Answer | Scored


def pack_sampled(
    prompt: Sequence[int], answer: SampledAnswer, vocabulary: Vocabulary, policy: Policy, *, eos: int
) -> tuple[Packed, bool]:
    """Packs a sampled answer. Returns it, and whether its stored tokens were used.

    If the stored tokens spell the answer in this vocabulary, they are used, and the sampled ones are labelled.
    Otherwise the text is encoded, with `eos` at the end unless the answer was cut off.

    prompt: token ids.
    answer: the answer.
    vocabulary: of the model.
    policy: position policy.
    eos: id that ends an answer.

    Raises DataError if the text is not PASTA-LANG.
    """
    if events := _resampled(answer, vocabulary):
        return pack_events(prompt, events, vocabulary, policy), True
    try:
        document = parse(answer.annotated)
    except LanguageError as error:
        raise DataError(f"{error}; sample it again") from None
    end = eos if answer.finish_reason == "stop" else None
    return pack(prompt, document, vocabulary, policy, eos=end), False


Sampled = TypeVar("Sampled", answers.Answer, Scored)


def truly_promised(answer: Sampled, vocabulary: Vocabulary) -> Sampled:
    """The answer with its chunks' lengths in its promises; as it is if its tokens are no response of this model."""
    token_ids, forced = with_true_lengths(answer.token_ids, vocabulary, forced=answer.forced)
    try:
        annotated = Transcript(retell(token_ids, vocabulary, forced=forced)).annotated
    except DataError:
        return answer
    return replace(answer, token_ids=token_ids, forced=forced, annotated=annotated)


def _resampled(answer: SampledAnswer, vocabulary: Vocabulary) -> list[Event]:
    """The events that decoded an answer; [] if its stored tokens do not spell it."""
    if not answer.token_ids or not all(0 <= token < vocabulary.size for token in answer.token_ids):
        return []
    try:
        events = list(retell(answer.token_ids, vocabulary, forced=answer.forced))
    except DataError:
        return []
    return events if Transcript(events).annotated == answer.annotated else []


def repeated(packed: Packed, vocabulary: Vocabulary) -> Packed | None:
    """The sequence where only repeated tokens are labelled: those that complete a REPEAT-gram that their thread
    produced before. None if there are none. A sequential answer is cut after the last of them."""
    tags = set(vocabulary.tags or ()) | vocabulary.eos
    labels = np.full_like(packed.labels, IGNORED)
    tokens: dict[ThreadPath, list[int]] = {}
    runs: dict[ThreadPath, set[tuple[int, ...]]] = {}
    remaining = REPEATS
    for i, (token, label, path) in enumerate(
        zip(packed.input_ids.tolist(), packed.labels.tolist(), packed.paths, strict=True)
    ):
        if label == IGNORED:
            continue
        tokens.setdefault(path, []).append(token)
        run = tuple(tokens[path][-REPEAT:])
        if len(run) < REPEAT or tags.intersection(run):
            continue
        if run in runs.setdefault(path, set()) and remaining:
            labels[i] = token
            remaining -= 1
        runs[path].add(run)
    marked = np.flatnonzero(labels != IGNORED)
    if not len(marked):
        return None
    end = int(marked[-1]) + 1 if len(set(packed.paths)) == 1 else len(packed)
    return Packed(
        input_ids=packed.input_ids[:end],
        position_ids=packed.position_ids[:end],
        labels=labels[:end],
        paths=packed.paths[:end],
        order=packed.order[:end],
        joins=packed.joins,
    )


# ------------------------------------------------------------------------------ batches


def held_out(examples: Sequence[Example], prompts: int) -> tuple[list[Example], list[Example]]:
    """Splits examples into validation and training sets that share no prompt. prompts: size of the validation set."""
    prompts_held = set(list(dict.fromkeys(example.prompt.strip() for example in examples))[:prompts])
    validation = [example for example in examples if example.prompt.strip() in prompts_held]
    return validation, [example for example in examples if example.prompt.strip() not in prompts_held]


def batches(examples: Sequence[Example], tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Batches of indices of examples, shuffled, with similar lengths together.

    examples: the examples.
    tokens: padded tokens in a batch, at most.
    seed: of the shuffle.
    """
    rng = random.Random(seed)
    out: list[list[int]] = []
    for start in range(0, len(examples), 256):
        window = sorted(range(start, min(start + 256, len(examples))), key=lambda i: len(examples[i].packed))
        batch: list[int] = []
        for index in window:
            if batch and (len(batch) + 1) * len(examples[index].packed) > tokens:
                out.append(batch)
                batch = []
            batch.append(index)
        out.append(batch)
    rng.shuffle(out)
    return out


def collate(
    packed: Sequence[Packed], *, unlikely: Sequence[bool] | None = None, pad: int = 0
) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, position_ids, labels [B, n], attention_mask [B, 1, n, n] bool, and
    unlikely [B] bool: whose labels are to be unlearned.

    A padding token sees itself, so that every row of the softmax is defined.
    """
    n = max(map(len, packed))
    shape = (len(packed), n)
    ids = np.full(shape, pad, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    mask = np.zeros((len(packed), 1, n, n), dtype=np.bool_)
    mask[:, 0, range(n), range(n)] = True
    for i, one in enumerate(packed):
        k = len(one)
        ids[i, :k], positions[i, :k], labels[i, :k] = one.input_ids, one.position_ids, one.labels
        mask[i, 0, :k, :k] = one.visible
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
        "unlikely": torch.tensor(unlikely or [False] * len(packed)),
    }


def provenance(packed: Iterable[Packed], rows: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Numbers of tokens, and of rows by kind, source and licence, for the model card.

    packed: the sequences.
    rows: (kind, source, licence) of each.
    """
    lengths = [(len(one), int((one.labels != IGNORED).sum())) for one in packed]
    kinds, sources, licences = (dict(Counter(names)) for names in zip(*rows, strict=True))
    return {
        "rows": len(rows),
        "tokens": sum(length for length, _ in lengths),
        "labelled_tokens": sum(labelled for _, labelled in lengths),
        "kinds": kinds,
        "sources": sources,
        "licences": licences,
    }
