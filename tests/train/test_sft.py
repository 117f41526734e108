"""The loss of a packed response is what its threads' tokens cost one by one; training for real, tiny."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pastalm.core.language import AsyncOpen, Promise, Sync, Text, round_length
from pastalm.errors import DataError, RequestError
from pastalm.models import adapters, chat_template, checkpoints, loading, lossless, preparing
from pastalm.records.documents import Async, Document, Node, linearize, parse, render, strip
from pastalm.train import run, sft
from pastalm.train.dataset import (
    REPEAT,
    REPEATS,
    Example,
    Mix,
    ablated,
    batches,
    check_lengths,
    collate,
    cut,
    examples,
    held_out,
    read_annotated,
    read_repeats,
    repeated,
)
from pastalm.train.loss import sentence_ends, token_log_probs, unlikelihood, weighted_loss
from pastalm.train.packing import IGNORED, pack, pack_serial
from pastalm.train.sft import SftConfig, train
from tests.laws.tiny import EOS, TAGS, tiny_model, tiny_vocabulary
from tests.test_models import BYTE_LEVEL, small_model
from tests.train.resuming import assert_resumes
from tests.train.test_structure import RECIPE

VOCABULARY = tiny_vocabulary()
PROMPT = [40, 41, 42]
DOCUMENT: Document = (
    Text("Two tips.\n"),
    Promise("sleep", 20),
    Async((Text("1. Sleep eight hours.\n"),)),
    Promise("food", 30),
    Async((Text("2. Eat "), Promise("greens", 10), Async((Text("greens"),)), Text("\n"))),
    Sync(),
    Text("Both take practice."),
)


def losses(model: Any, packed: Any) -> tuple[float, int]:
    with torch.no_grad():
        _, each, _ = weighted_loss(model, collate([packed]), TAGS, 1.0)
    return float(each.double().sum()), len(each)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2-sliding"])
def test_serial_rows_cost_what_an_ordinary_causal_model_gives_them(name: str) -> None:
    model = tiny_model(name)
    for row in pack_serial(PROMPT, DOCUMENT, VOCABULARY, eos=EOS):
        with torch.no_grad():
            logits = model(torch.from_numpy(row.input_ids)[None]).logits[0].log_softmax(-1)
        expected = -sum(float(logits[i - 1, label]) for i, label in enumerate(row.labels.tolist()) if label != IGNORED)
        total, _ = losses(model, row)
        assert math.isclose(total, expected, rel_tol=1e-5)


@pytest.mark.parametrize("policy", ["promised", "overlap"])
def test_every_token_but_the_forced_ones_is_labelled_once(policy: Any) -> None:
    packed = pack(PROMPT, DOCUMENT, VOCABULARY, policy, eos=EOS)
    forced = sum(isinstance(mark, AsyncOpen) for mark in linearize(DOCUMENT))
    labelled = int((packed.labels != IGNORED).sum())
    assert labelled == len(packed) - len(PROMPT) - forced
    serial = pack_serial(PROMPT, DOCUMENT, VOCABULARY, eos=EOS)
    assert sum(int((row.labels != IGNORED).sum()) for row in serial) == labelled


def test_a_chunk_costs_the_same_whatever_its_sibling_says() -> None:
    model = tiny_model("qwen3")
    other = list(DOCUMENT)
    other[2] = Async((Text("1. Rest when tired!!\n"),))

    def chunk_loss(document: Document) -> float:
        packed = pack(PROMPT, document, VOCABULARY, "promised", eos=EOS)
        batch = collate([packed])
        own = torch.tensor([path == (1,) for path in packed.paths])
        batch["labels"][0, ~own] = IGNORED
        with torch.no_grad():
            _, each, _ = weighted_loss(model, batch, TAGS, 1.0)
        return float(each.sum())

    assert math.isclose(chunk_loss(DOCUMENT), chunk_loss(tuple(other)), rel_tol=1e-6)


def test_padding_changes_nothing() -> None:
    model = tiny_model("llama")
    one = pack(PROMPT, DOCUMENT, VOCABULARY, "promised", eos=EOS)
    two = pack(PROMPT, (Text("short"),), VOCABULARY, "promised", eos=EOS)
    with torch.no_grad():
        _, together, _ = weighted_loss(model, collate([one, two]), TAGS, 1.0)
    apart = losses(model, one)[0] + losses(model, two)[0]
    assert math.isclose(float(together.double().sum()), apart, rel_tol=1e-5)


def test_flex_attention_sees_what_the_mask_says() -> None:
    """What trains on CUDA: the same losses, padding and hidden threads included. Its backward pass needs a GPU."""
    model = tiny_model("llama", dtype=torch.float32)
    short = pack(PROMPT, (Text("short"),), VOCABULARY, "promised", eos=EOS)
    batch = collate([pack(PROMPT, DOCUMENT, VOCABULARY, "promised", eos=EOS), short])
    with torch.no_grad():
        want, _ = token_log_probs(model, batch)
        model.set_attn_implementation("flex_attention")
        found, _ = token_log_probs(model, batch)
        shown = batch | {"attention_mask": torch.ones_like(batch["attention_mask"]).tril()}
        other, _ = token_log_probs(model, shown)
    assert float((want - found).abs().max()) < 1e-4
    assert float((want - other).abs().max()) > 1e-2


def test_unreadable_annotations_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match="cannot read"):
        read_annotated(path)
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_annotated(path)
    fine = {"id": "1", "prompt": "p", "annotated": "x", "tokens": 9, "chunks": 0}
    broken = {**fine, "annotated": "<async>x"}
    path.write_text(json.dumps(fine) + "\n" + json.dumps(broken) + "\n")
    with pytest.raises(DataError, match=r"line 2.*annotate it again"):
        read_annotated(path)


# ------------------------------------------------------------------------------ what to unlearn


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=80), st.booleans())
def test_what_ends_a_run_its_thread_has_said_before_is_to_be_unlearned(letters: list[str], in_chunk: bool) -> None:
    text = "".join(letters)
    document: Document = (Text(text),)
    if in_chunk:
        document = (Text("ab" * REPEAT), Promise("x", 10), Async((Text(text),)), Sync(), Text("."))
    packed = repeated(pack(PROMPT, document, VOCABULARY, "promised", eos=EOS), VOCABULARY)
    said = {(): "ab" * REPEAT, (0,): text} if in_chunk else {(): text}
    expected = sum(
        thread[max(0, i - REPEAT) : i] in thread[: i - 1]
        for thread in said.values()
        for i in range(REPEAT, len(thread) + 1)
    )
    if not expected:
        assert packed is None
        return
    assert packed is not None
    marked = packed.labels != IGNORED
    assert marked.sum() == min(expected, REPEATS)
    assert (packed.labels[marked] == packed.input_ids[marked]).all()
    if not in_chunk:
        assert marked[-1]


def test_unlearning_costs_what_every_other_token_gets_and_makes_the_token_rarer() -> None:
    model = tiny_model("llama")
    packed = repeated(pack(PROMPT, (Text("abcdefghi" * 3),), VOCABULARY, eos=EOS), VOCABULARY)
    assert packed is not None

    def probabilities() -> Tensor:
        logits = model(torch.from_numpy(packed.input_ids)[None]).logits[0].softmax(-1)
        marked = (packed.labels != IGNORED).nonzero()[0]
        return torch.stack([logits[i - 1, packed.labels[i]] for i in marked.tolist()])

    batch = collate([packed], unlikely=[True])
    before = probabilities().detach()
    loss, each, _ = weighted_loss(model, batch, TAGS, 1.0)
    assert torch.allclose(each.double(), -torch.log1p(-before), rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss.backward()
    optimizer.step()
    assert float(probabilities().sum()) < float(before.sum())


def test_certain_repetitions_have_a_gradient_too() -> None:
    losses = torch.tensor([0.0, 1e-9, 1e-4, 5.0], requires_grad=True)
    out = unlikelihood(losses)
    out.sum().backward()
    assert losses.grad is not None and out.isfinite().all() and losses.grad.isfinite().all()
    assert (losses.grad[2:] < 0).all()


# ------------------------------------------------------------------------------ training, tiny


def tied_model() -> Any:
    model = tiny_model("llama", dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def test_six_rows_learn_and_the_merged_model_is_the_trained_one(tmp_path: Path) -> None:
    config = SftConfig(data=tmp_path / "none", out=tmp_path)
    batch = collate([pack(PROMPT, DOCUMENT, VOCABULARY, "promised", eos=EOS)])
    base = tied_model().get_input_embeddings().weight

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(weighted_loss(model.eval(), batch, TAGS, 2.0)[0])

    adapted = run.adapted(config, tied_model(), TAGS)
    for _ in range(2):  # the second time going on from what was saved
        optimizer = run.optimizer(config, adapted)
        before = loss(adapted)
        for _ in range(5):
            optimizer.zero_grad()
            weighted_loss(adapted.train(), batch, TAGS, 2.0)[0].backward()
            optimizer.step()
        trained = loss(adapted)
        assert trained < before
        folder = tmp_path / "adapter"
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        adapters.write_card(folder, {"shape": adapters.shape_of(tied_model())})
        adapted = run.adapted(replace(config, start=folder), tied_model(), TAGS)
        assert math.isclose(loss(adapted), trained, abs_tol=1e-5)
    merged = adapters.merge(tied_model(), tmp_path / "adapter")
    assert math.isclose(loss(merged), trained, abs_tol=1e-5)
    into, out = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert into.data_ptr() == out.data_ptr()
    changed = (into != base).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(TAGS)


@pytest.fixture
def config(tmp_path: Path) -> SftConfig:
    """A run on some short answers with a tiny base: a dozen steps or so."""
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, tmp_path / "base")
    rows = []
    for i in range(60):
        document: Document = (
            Text(f"Number {i}.\n"),
            Promise("sleep", 10),
            Async((Text("1. Sleep well.\n"),)),
            Promise("food", 10),
            Async((Text("2. Eat greens.\n"),)),
        )
        if i % 3 == 0:
            document = (Text(f"Only one thing to say to {i}."),)
        rows.append(
            {
                "id": str(i),
                "prompt": f"What of {i}?",
                "annotated": render(document),
                "tokens": 20,
                "chunks": 2 if i % 3 else 0,
                "source": "made up",
                "licence": "CC0",
            }
        )
    data = tmp_path / "annotated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SftConfig(
        data=data,
        out=tmp_path / "out",
        model=str(tmp_path / "base"),
        mix=Mix(token_budget=4000, positions={"promised": 0.4, "overlap": 0.3, "serial": 0.3}),
        batch_tokens=300,
        lora_rank=2,
        validation_rows=3,
        save_steps=4,
    )


def test_a_run_leaves_an_adapter_that_loads_and_says_how_it_was_made(config: SftConfig) -> None:
    said: list[str] = []
    folder = train(config, said.append)
    loaded = loading.load(config.model, adapter=str(folder), dtype="float32")
    assert loaded.prepared
    assert loaded.sequential_marker == chat_template.SEQUENTIAL_MARKER
    record = json.loads((folder / "train.json").read_text())
    assert record["data"]["sources"] == {"made up": record["data"]["rows"]}
    assert set(record["final"]) >= {"validation_tags", "validation_text"}
    for name in ("train.json", "README.md", "adapter_config.json", "pasta.json"):
        assert str(config.data.parent) not in (folder / name).read_text(), name
    card = (folder / "README.md").read_text()
    assert f"| made up | {record['data']['rows']} |" in card and "CC0" in card
    logged = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in logged if "validation_text" in e]
    assert (config.out / "loss.png").stat().st_size > 1000
    assert len(list(config.out.glob("checkpoint-*"))) <= 2
    assert any("step" in line for line in said)


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again"
    assert_resumes(train, config, out, monkeypatch, places=8)
    with pytest.raises(DataError, match="other settings"):
        train(replace(config, out=out, learning_rate=1e-3), str)


def test_the_same_seed_draws_the_same_examples_within_the_budget(config: SftConfig) -> None:
    rows = read_annotated(config.data)
    _, tokenizer = checkpoints.read(Path(config.model))
    model = small_model(len(tokenizer))
    preparing.prepare(model, tokenizer)
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1])

    def drawn(seed: int) -> list[tuple[str, str, bytes]]:
        mix = replace(config.mix, seed=seed)
        chosen = list(examples(rows, tokenizer, vocabulary, mix, eos=1))
        assert 0 < sum(len(e.packed) for e in chosen) <= mix.token_budget
        indices = [i for batch in batches(chosen, config.batch_tokens) for i in batch]
        assert sorted(indices) == list(range(len(chosen)))
        for example in chosen:
            tagged = bool(set(example.packed.input_ids) & set(vocabulary.tags))  # type: ignore[union-attr]
            assert tagged == (example.kind == "tagged")
        return [(e.id, e.kind, e.packed.input_ids.tobytes()) for e in chosen]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_list_for_one_thread_teaches_when_not_to_fork(config: SftConfig) -> None:
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    preparing.prepare(small_model(len(tokenizer)), tokenizer)
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1])
    plain = next(row for row in read_annotated(config.data) if not row.chunks)
    missed = "".join(f"{n}. Finally, it is number {n} of many. {40 * 'word '}\n" for n in range(1, 4))
    rows = [
        replace(plain, id="recipe", prompt="Give me a recipe", document=(Text(RECIPE + 60 * "."),)),
        replace(plain, id="missed", prompt="Why?", document=(Text(missed),)),
    ]
    mix = Mix(token_budget=4000, max_tokens=2000, plain=1.0, sequential=0.0)
    assert {e.id for e in examples(rows, tokenizer, vocabulary, mix, eos=1)} == {"recipe"}


sentences = st.lists(
    st.lists(st.sampled_from(["walk", "Eats", "3.57", "well"]), min_size=5, max_size=9).map(" ".join), min_size=1
).map(lambda found: ". ".join(f"It {one}" for one in found) + ".")
chunk_texts = st.builds(
    lambda number, text, end: f"{number}. {text}{end}", st.integers(1, 9), sentences, st.sampled_from("\n ")
)


@given(st.lists(chunk_texts, min_size=2, max_size=5), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9))
def test_a_cut_chunk_ends_at_one_of_its_sentences_and_its_promise_says_so(
    texts: list[str], share: float, seed: int
) -> None:
    document: list[Node] = [Text("Some tips.\n")]
    for number, text in enumerate(texts):
        document += [Promise(f"t{number}", round_length(len(text))), Async((Text(text),))]
    document += [Sync(), Text("That is all. Good luck.")]
    done, chunks_cut = cut(tuple(document), share, random.Random(seed), len)
    assert [type(node) for node in done] == [type(node) for node in document]
    for number, text in enumerate(texts):
        promise, chunk = done[1 + 2 * number : 3 + 2 * number]
        assert isinstance(promise, Promise) and isinstance(chunk, Async)
        found = strip(chunk.body)
        assert promise == Promise(f"t{number}", round_length(len(found)))
        assert (found != text) == (number in chunks_cut)
        assert text.startswith(found[:-1]) and found[-1] == text[-1] and found[:-1].endswith(".")
        assert share < 1 or text.count(". It") < 2 or number in chunks_cut, "whatever can be cut is"
    assert done[0] == document[0] and done[-2:] == tuple(document[-2:])
    assert share or not chunks_cut


def test_numbers_of_cut_chunks_are_not_learnt(config: SftConfig) -> None:
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    preparing.prepare(small_model(len(tokenizer)), tokenizer)
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1])
    document = (
        *(Promise("sleep", 60), Async((Text("1. Sleep eight hours at least. Keep the room dark and cool.\n"),))),
        *(Promise("food", 20), Async((Text("2. Eat what grows.\n"),))),
    )
    row = replace(next(row for row in read_annotated(config.data) if row.chunks), document=document, tokens=80)
    mix = Mix(token_budget=2000, plain=0.0, sequential=0.0, positions={"promised": 1.0}, cut=1.0)
    (example,) = examples([row], tokenizer, vocabulary, mix, eos=1)
    ids, labels = example.packed.input_ids.tolist(), example.packed.labels.tolist()
    tags = vocabulary.tags
    assert tags is not None
    prompt = len(chat_template.encode_chat(tokenizer, vocabulary, [{"role": "user", "content": row.prompt}]))
    numbers = [
        (vocabulary.text(ids[start + 1 : end]), {label != IGNORED for label in labels[start + 1 : end]})
        for start, end in zip(
            [i for i, token in enumerate(ids) if token == tags.tokens],
            [i for i, token in enumerate(ids) if token == tags.promise_end],
            strict=True,
        )
    ]
    assert numbers == [("30", {False}), ("20", {True})]
    assert sum(label == IGNORED for label in labels) == prompt + 2 + 2, "the forced tokens and one number"


@pytest.mark.parametrize("end_weight", [1.0, 3.0])
def test_what_follows_the_end_of_a_sentence_weighs_as_much_as_it_is_told(end_weight: float) -> None:
    packed = pack(PROMPT, DOCUMENT, VOCABULARY, eos=EOS)
    ends = sentence_ends(VOCABULARY)
    assert ends.tolist() == sorted(i for i in range(VOCABULARY.size) if VOCABULARY.piece(i)[-1:] in (b".", b"!", b"?"))
    model = tiny_model("llama")
    loss, each, decision = weighted_loss(model, collate([packed]), TAGS, 2.0, ends=ends, end_weight=end_weight)
    labelled = packed.labels[1:] != IGNORED
    after = [VOCABULARY.piece(int(i))[-1:] in (b".", b"!", b"?") for i in packed.input_ids[:-1][labelled]]
    assert any(after)
    weights = [max(2.0 if d else 1.0, end_weight if a else 1.0) for d, a in zip(decision.tolist(), after, strict=True)]
    wanted = sum(w * float(one) for w, one in zip(weights, each, strict=True)) / sum(weights)
    assert float(loss) == pytest.approx(wanted)


@given(
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from(["", " ", "\n"]), st.integers(0, 9)), max_size=40),
    st.integers(0, 5),
)
def test_what_is_held_out_shares_no_prompt_with_what_is_trained_on(
    drawn: list[tuple[str, str, int]], prompts: int
) -> None:
    """However often a prompt was drawn: as several rows, as another answer under another id, with another end."""
    packed = pack(PROMPT, (Text("x"),), VOCABULARY, eos=EOS)
    rows = [Example(packed, str(i), prompt + space, "tagged", "", "") for prompt, space, i in drawn]
    held, trained = held_out(rows, prompts)
    assert sorted([*held, *trained], key=rows.index) == sorted(rows, key=rows.index)
    assert not {e.prompt.strip() for e in held} & {e.prompt.strip() for e in trained}
    assert len({e.prompt.strip() for e in held}) == min(prompts, len({e.prompt.strip() for e in rows}))


def test_a_run_trains_on_no_prompt_that_it_validates_with(config: SftConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one answer under `serial`, the same answer under the sequential marker, and what is to be unlearned."""
    own = {"choice": 0, "sequential": True, "annotated": "one two three. " * 9, "tokens": 40, "critical_path": 40}
    repeats = config.data.with_name("own.jsonl")
    rows = [{**own, "id": f"r{i}", "prompt": f"What of {i}?", "finish_reason": "length"} for i in range(60)]
    repeats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: dict[str, set[str]] = {"held": set(), "trained": set()}
    plan, validate = sft._trainer, sft._validate

    def planned(config: Any, base: Any, chosen: list[Example], batches: Any) -> Any:
        seen["trained"] |= {example.prompt for example in chosen}
        return plan(config, base, chosen, batches)

    def validated(trainer: Any, held: list[Example]) -> Any:
        seen["held"] |= {example.prompt for example in held}
        return validate(trainer, held)

    monkeypatch.setattr(sft, "_trainer", planned)
    monkeypatch.setattr(sft, "_validate", validated)
    train(replace(config, mix=replace(config.mix, sequential=0.4), repeats=repeats), str)
    assert len(seen["held"]) == config.validation_rows and len(seen["trained"]) > 10
    assert not seen["held"] & seen["trained"]


def test_a_packed_answer_grows_with_its_tokens_not_with_their_square() -> None:
    """A mask of the paper's 87,000 answers would take 36 GB; it is made for a batch."""

    def size(chunks: int) -> tuple[int, int]:
        document = (
            Text("Two.\n"),
            *(
                node
                for i in range(chunks)
                for node in (Promise(f"part {i}", 20), Async((Text("so many words here\n"),)), Sync())
            ),
        )
        packed = pack(PROMPT, document, VOCABULARY, "promised", eos=EOS)
        rows = pack_serial(PROMPT, (Text("so many words here " * chunks),), VOCABULARY, eos=EOS)
        return len(packed), len(pickle.dumps(packed)) + len(pickle.dumps(rows))

    (few, small), (many, large) = size(4), size(64)
    assert large / small < 1.5 * many / few


def test_only_answers_that_were_cut_off_are_unlearned(config: SftConfig, tmp_path: Path) -> None:
    _, tokenizer = checkpoints.read(Path(config.model))
    preparing.prepare(small_model(len(tokenizer)), tokenizer)
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1])
    path = tmp_path / "own.jsonl"
    said = {"id": "1", "choice": 0, "prompt": "Say it.", "sequential": True, "annotated": "one two three. " * 9}
    said |= {"tokens": 40, "critical_path": 40}
    rows = [{**said, "finish_reason": r} for r in ("length", "stop")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (only,) = read_repeats(path, tokenizer, vocabulary, config.mix, eos=1)
    assert (only.kind, only.id) == ("repeat", "1")
    untagged = replace(config.mix, untagged=True)
    (plain,) = read_repeats(path, tokenizer, vocabulary, untagged, eos=1)
    assert len(plain.packed) < len(only.packed), "the baseline writes sequentially without being told so"
    folder = train(replace(config, repeats=path), str)
    record = json.loads((folder / "train.json").read_text())
    assert record["data"]["kinds"]["repeat"] == 1
    assert record["config"]["repeats"] == "own.jsonl"
    path.write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"line 1: not an answer"):
        list(read_repeats(path, tokenizer, vocabulary, config.mix, eos=1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_are_in_bfloat16_where_that_is_faster(
    config: SftConfig, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def spying(*arguments: Any, **more: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return weighted_loss(*arguments, **more)

    monkeypatch.setattr("pastalm.models.dtypes.training_dtype", lambda _: dtype)
    monkeypatch.setattr("pastalm.train.sft.weighted_loss", spying)
    train(config, str)
    assert len(seen) > 2 and set(seen) == {dtype == "bfloat16"}


def test_the_baseline_is_the_same_answers_without_tags(config: SftConfig) -> None:
    tokenizer = copy.deepcopy(BYTE_LEVEL)

    def drawn(untagged: bool) -> list[Example]:
        eos, model = 1, small_model(len(tokenizer))
        preparing.prepare(model, tokenizer)
        vocabulary = lossless.vocabulary_of(tokenizer, eos=[eos])
        mix = replace(config.mix, positions={"promised": 1.0}, untagged=untagged)
        return list(examples(read_annotated(config.data), tokenizer, vocabulary, mix, eos=eos))

    tagged, plain = drawn(False), drawn(True)
    assert [e.id for e in plain] == [e.id for e in tagged if e.kind != "sequential"]
    assert {e.kind for e in plain} == {"plain"}
    tags = set(lossless.vocabulary_of(tokenizer, eos=[1]).tags)  # type: ignore[union-attr]
    assert not any(tags & set(e.packed.input_ids.tolist()) for e in plain)
    assert any(tags & set(e.packed.input_ids.tolist()) for e in tagged)


def test_all_weights_can_be_trained_and_the_model_is_gone_on_from(config: SftConfig, tmp_path: Path) -> None:
    """Full finetuning, with gradient checkpointing: a whole model comes out, which loads and speaks the tags."""
    small = replace(config, full=True, gradient_checkpointing=True, mix=replace(config.mix, token_budget=2000))
    folder = train(small, str)
    assert folder.name == "model"
    loaded = loading.load(str(folder), adapter=None, dtype="float32")
    assert loaded.prepared and loaded.sequential_marker == chat_template.SEQUENTIAL_MARKER
    base = loading.load(config.model, adapter=None, dtype="float32")
    for (name, a), b in zip(loaded.model.named_parameters(), base.model.parameters(), strict=True):
        if a.dim() == 2:  # of the norms' ones, bfloat16 keeps no small step
            assert not torch.equal(a[: len(b)], b.to(torch.bfloat16).float()), name
    assert "All weights were trained" in (folder / "README.md").read_text()


ABLATED = "Look: " + "".join(
    f'<promise topic="{t}" tokens="40"/><async>{t}. <promise topic="in" tokens="20"/><async>x</async><sync/>y</async>'
    for t in ("one", "two")
)
ABLATED += "<sync/>Done."


def test_ablations_leave_out_what_they_name_and_keep_the_text() -> None:
    document = parse(ABLATED)
    assert ablated(document, Mix()) == document
    fixed = render(ablated(document, Mix(lengths="fixed")))
    assert fixed.count('tokens="100"') == 4 and 'topic="one"' in fixed and fixed.count("<sync/>") == 3
    bare = render(ablated(document, Mix(topics=False)))
    assert 'topic="one"' not in bare and 'tokens="40"' in bare
    topics = [node.topic for node in ablated(document, Mix(topics=False)) if isinstance(node, Promise)]
    assert len(set(topics)) == 2
    assert "<sync/>" not in render(ablated(document, Mix(syncs=False)))
    for mix in (Mix(lengths="fixed"), Mix(topics=False), Mix(syncs=False), Mix(lengths="oracle")):
        assert strip(ablated(document, mix)) == strip(document)
    with pytest.raises(RequestError, match="unknown lengths 'none'"):
        check_lengths("none")
