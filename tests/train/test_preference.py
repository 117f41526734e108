"""Stage 2: pairs are the best and the worst, the loss is the paper's and over what the engine would have said."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.core.events import Decoded, Event, Forked
from pastalm.core.events import Path as ThreadPath
from pastalm.core.language import Promise, Sync, Text, round_length
from pastalm.core.layout import Policy
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import DataError, ModelError, RequestError
from pastalm.eval.quality import Candidate, Verdict
from pastalm.eval.score import score
from pastalm.models import chat_template, checkpoints, loading
from pastalm.records import answers, scores
from pastalm.records.answers import Answer
from pastalm.records.documents import Async, Document
from pastalm.records.scores import Length, Scored
from pastalm.train.dataset import collate, pack_sampled
from pastalm.train.loss import bonbon, log_probs, token_log_probs
from pastalm.train.packing import pack, retell, unroll, with_true_lengths
from pastalm.train.preference import BEST_OF_TEN, PreferenceConfig, choose, pairs, train
from tests.laws.losses import forced
from tests.laws.tiny import EOS, TAGS, tiny_model, tiny_vocabulary
from tests.play import Player
from tests.strategies import documents
from tests.test_models import BYTE_LEVEL, small_model
from tests.train.documents import DOCUMENTS
from tests.train.resuming import assert_resumes

VOCABULARY = tiny_vocabulary()
PROMPT = [40, 41, 42]

# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("policy", ["promised", "overlap"])
@settings(max_examples=12)
@given(document=documents(2, st.sampled_from(["a b", "c\n", "x"]), size=3))
def test_the_loss_is_over_what_the_engine_says_when_it_is_forced(policy: Policy, document: Document) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    batch = collate([pack(PROMPT, document, VOCABULARY, policy, eos=EOS)])
    with torch.no_grad():
        total = float(log_probs(model, batch)[0])
        each, _ = token_log_probs(model, batch)
    said = forced(model, PROMPT, unroll(document, VOCABULARY, eos=EOS), policy, max_model_len=1024)
    assert len(said) == len(each)
    assert math.isclose(total, sum(said), abs_tol=1e-9)
    # the collator goes thread by thread and the engine by linear order: the same tokens all the same
    assert max(abs(a - b) for a, b in zip(sorted(each.tolist()), sorted(said), strict=True)) < 1e-9


PIECES = ("ab", "b ", " a", "a b", "aa", "12", "20", "\n\n", "é", " \n")


def pieced_vocabulary() -> Vocabulary:
    """`tiny_vocabulary` with longer pieces beside the bytes, so that a text has many encodings."""
    raw = {TAGS[-1] + 1 + i: piece.encode() for i, piece in enumerate(PIECES)}

    def encode(text: str) -> list[int]:
        rest, ids = text.encode(), list[int]()
        while rest:
            ids.append(next((i for i, piece in raw.items() if rest.startswith(piece)), rest[0]))
            rest = rest[len(raw.get(ids[-1], b"x")) :]
        return ids

    def piece(token: int) -> bytes:
        return bytes([token]) if token < 256 else raw.get(token, b"")

    return replace(VOCABULARY, encode=encode, piece=piece)


PIECED = pieced_vocabulary()


def sampled_response(rng: random.Random) -> list[Event]:
    """The events of a response whose threads sample at random, in any order, until budgets end them."""
    player = Player(PIECED, max_tokens=rng.choice((60, 150)), prompt_length=len(PROMPT))
    texts = [*map(ord, "ab 12\n"), *range(TAGS[-1] + 1, TAGS[-1] + 1 + len(PIECES)), 0xC3, 0xA9]

    def choose(player: Player) -> tuple[ThreadPath, int]:
        path = rng.choice(player.live)
        allowed = player.allowed[path]
        wanted = [t for t in (*texts, *(TAGS * 2), EOS) if allowed is None or t in allowed]
        return path, rng.choice(wanted or [next(iter(allowed.ids))])  # type: ignore[union-attr]

    player.run(choose)
    return player.events


def said_by(events: Sequence[Event], **more: Any) -> Answer:
    transcript = Transcript(events)
    known = {"id": "x", "prompt": "Say.", **answers.figures(transcript), **answers.sampled(transcript)}
    return Answer(**(known | more))


@pytest.mark.parametrize("policy", ["promised", "overlap"])
def test_the_loss_is_over_the_tokens_that_were_sampled(policy: Policy) -> None:
    """Whatever their text would encode to. What was forced on a thread it did not say."""
    model = tiny_model("llama")
    rng, told, encoded_otherwise, forks = random.Random(5), 0, 0, 0
    for _ in range(20):
        events = sampled_response(rng)
        one = said_by(events)
        packed, kept = pack_sampled(PROMPT, one, PIECED, policy, eos=EOS)
        told += kept
        if not kept:  # half a character before a sync: see `retell`
            continue
        with torch.no_grad():
            each, _ = token_log_probs(model, collate([packed]))
        said = forced(model, PROMPT, events, policy, max_model_len=1024)
        assert sorted(packed.input_ids.tolist()) == sorted([*PROMPT, *one.token_ids])
        assert len(said) == len(each) == len(one.token_ids) - len(one.forced)
        assert max(abs(a - b) for a, b in zip(sorted(each.tolist()), sorted(said), strict=True)) < 1e-9
        anew, _ = pack_sampled(PROMPT, replace(one, token_ids=()), PIECED, policy, eos=EOS)
        encoded_otherwise += sorted(anew.input_ids.tolist()) != sorted(packed.input_ids.tolist())
        forks += len(one.chunks)
    assert told > 16 and encoded_otherwise > 12 and forks > 10


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_true_lengths_change_nothing_but_what_is_promised(rng: random.Random) -> None:
    one = said_by(sampled_response(rng))
    token_ids, forced_places = with_true_lengths(one.token_ids, PIECED, forced=one.forced)
    try:
        before, after = (list(retell(ids, PIECED)) for ids in (one.token_ids, token_ids))
    except DataError:
        return
    lengths = {e.path: 0 for e in after if isinstance(e, Forked)}
    for event in after:
        for depth in range(len(event.path) + 1):
            lengths[event.path[:depth]] += isinstance(event, Decoded) + len(getattr(event, "forced", ()))
    for fork in (e for e in after if isinstance(e, Forked) and e.path):
        closed = any(isinstance(e, Decoded) and e.path == fork.path and e.token == TAGS.async_close for e in after)
        assert fork.promised == round_length(lengths[fork.path] - 1 - closed)
    assert [e.text for e in after if isinstance(e, Decoded) and e.text] == [
        e.text for e in before if isinstance(e, Decoded) and e.text
    ]
    told = [one.token_ids[i] for i in one.forced if chr(one.token_ids[i]) not in "0123456789"]
    assert [token_ids[i] for i in forced_places if chr(token_ids[i]) not in "0123456789"] == told


@given(st.randoms(use_true_random=False))
def test_tokens_that_are_not_this_models_are_told_from_the_text(rng: random.Random) -> None:
    """Tokens of another tokenizer, or torn ones, are no response of this model: its text is encoded, nothing raises."""
    one = said_by(sampled_response(rng))
    parsed, _ = pack_sampled(PROMPT, replace(one, token_ids=()), PIECED, "promised", eos=EOS)
    for ids in (
        tuple(token + 1 for token in one.token_ids),
        tuple(token + 300 for token in one.token_ids),
        tuple(-token - 1 for token in one.token_ids),
        one.token_ids[:-1] + (TAGS.async_open,),
        (TAGS.async_open, *one.token_ids),
        (TAGS.promise, TAGS.promise_end, *one.token_ids),
    ):
        packed, kept = pack_sampled(PROMPT, replace(one, token_ids=ids), PIECED, "promised", eos=EOS)
        if not kept:
            assert packed.input_ids.tolist() == parsed.input_ids.tolist()
        assert not kept or ids != one.token_ids


def test_sampled_tokens_reach_the_pairs_through_files_and_scores(tmp_path: Path) -> None:
    """As `pasta sample`, `pasta score` and `pasta train prefer` hand them on."""

    class Shorter:
        name = "shorter"

        def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
            return [Verdict(difference=-float(len(c.text))) for c in candidates]

    rng = random.Random(3)
    kept = [
        said_by(sampled_response(rng), id=str(i), choice=c, finish_reason="stop") for i in range(4) for c in range(3)
    ]
    files = [tmp_path / name for name in ("samples.jsonl", "baselines.jsonl", "scored.jsonl")]
    files[0].write_text("".join(json.dumps(row.to_dict()) + "\n" for row in kept))
    files[1].write_text("".join(json.dumps(row.to_dict()) + "\n" for row in kept if not row.choice))
    score(*files, Shorter(), lambda text: len(text.encode()))
    rows = [replace(row, asked=None) for row in scores.read(files[2])]  # whether forks were asked for is not the matter
    assert {(r.id, r.choice): (r.token_ids, r.forced) for r in rows} == {
        (r.id, r.choice): (r.token_ids, r.forced) for r in kept
    }
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    config = PreferenceConfig(data=files[2], out=tmp_path, lambda_=math.inf)
    made = list(pairs(rows, tokenizer, PIECED, config, eos=EOS))
    assert len(made) == 4 and all(pair.sampled for pair in made)
    prompt = chat_template.encode_chat(tokenizer, PIECED, [{"role": "user", "content": "Say."}])
    ids = {tuple(sorted((*prompt, *r.token_ids))) for r in kept}
    assert all(tuple(sorted(one.input_ids.tolist())) in ids for pair in made for one in (pair.better, pair.worse))
    told = list(pairs(rows, tokenizer, PIECED, replace(config, true_lengths=True), eos=EOS))
    assert all(pair.sampled for pair in told) and [p.worse.paths for p in told] == [p.worse.paths for p in made]
    older = [replace(row, token_ids=(), forced=()) for row in rows]
    assert not any(pair.sampled for pair in pairs(older, tokenizer, PIECED, config, eos=EOS))


def test_the_real_models_loss_is_over_what_its_engine_says() -> None:
    loaded = loading.load(dtype="float32")
    vocabulary, eos = loaded.vocabulary, min(loaded.vocabulary.eos)
    document: Document = (
        Text("Two tips:\n\n"),
        Promise("1. sleep", 20),
        Async((Text("1. Sleep: go to bed at the same time every evening.\n"),)),
        Promise("2. food", 20),
        Async((Text("2. Food: eat vegetables that you like, every day.\n\n"),)),
        Sync(),
        Text("Both take some weeks to show."),
    )
    prompt = chat_template.chat_prompt(loaded, [{"role": "user", "content": "Two tips for a healthy life?"}])
    for policy in ("promised", "overlap"):
        with torch.no_grad():
            batch = collate([pack(prompt, document, vocabulary, policy, eos=eos)])
            each, _ = token_log_probs(loaded.model, batch)
        said = forced(loaded.model, prompt, unroll(document, vocabulary, eos=eos), policy)
        apart = [abs(a - b) for a, b in zip(sorted(each.tolist()), sorted(said), strict=True)]
        assert max(apart) < 1e-4


@given(st.floats(-400, -1), st.floats(-400, -1), st.floats(-400, -1), st.floats(-400, -1), st.floats(0, 1))
def test_bonbon_is_the_equation(good: float, bad: float, good0: float, bad0: float, alpha: float) -> None:
    beta = 1 / BEST_OF_TEN
    loss, margin = bonbon(
        torch.tensor([[good, bad]], dtype=torch.float64),
        torch.tensor([[good0, bad0]], dtype=torch.float64),
        alpha,
        beta,
    )
    assert float(margin) == pytest.approx(good - bad - good0 + bad0)
    assert float(loss) == pytest.approx(-alpha * good + (1 - alpha) * (float(margin) - 1 / beta) ** 2)
    assert pytest.approx(25.46, abs=0.01) == 1 / beta


# ------------------------------------------------------------------------------ pairs


def answer(identity: str = "p", choice: int = 0, **more: Any) -> Scored:
    plain: dict[str, Any] = {
        "id": identity,
        "choice": choice,
        "prompt": f"What of {identity}?",
        "annotated": DOCUMENTS[choice % 3] + "x" * choice,
        "finish_reason": "stop",
        "tokens": 40,
        "text_tokens": 30,
        "critical_path": 20,
        "baseline_tokens": 40,
        "scorer": "pmi",
        "difference": 0.0,
    }
    return Scored(**(plain | more))


scored_answers = st.lists(
    st.builds(
        answer,
        st.sampled_from("abc"),
        st.integers(0, 9),
        critical_path=st.integers(1, 60),
        difference=st.none() | st.floats(-50, 50),
        finish_reason=st.sampled_from(["stop", "stop", "length"]),
        asked=st.sampled_from([None, True, False]),
    ),
    max_size=20,
    unique_by=lambda r: (r.id, r.choice),
)


@given(st.integers(1, 60), st.sampled_from(get_args(Length)), st.sampled_from([0.0, 1.0, 8.0]))
def test_forks_that_nothing_asked_for_are_no_speed(critical_path: int, length: Any, lambda_: float) -> None:
    """Whatever lambda is: then the same text without its tags scores as much, and a fork asked for scores its speed."""
    forked = answer(choice=1, critical_path=critical_path)
    one_thread = replace(forked, annotated="plain", critical_path=max(critical_path, forked.text_tokens))
    scores = {asked: replace(forked, asked=asked).score(lambda_, 1.0, length) for asked in (None, True, False)}
    assert scores[False] == one_thread.score(lambda_, 1.0, length)
    assert scores[None] == scores[True] == forked.speedup(length) + lambda_ / 2
    plain = replace(one_thread, critical_path=critical_path)
    assert replace(plain, asked=False).score(lambda_, 1.0, length) == plain.score(lambda_, 1.0, length)


@given(scored_answers, st.sampled_from([0.0, 1.0, 8.0, math.inf]), st.sampled_from(["theoretical", "smaller"]))
def test_the_best_that_ended_and_the_worst_make_a_pair(rows: list[Scored], lambda_: float, length: Any) -> None:
    found = list(choose(rows, lambda_, 10.0, length))
    assert len({best.id for best, _, _ in found}) == len(found)
    for best, worst, gap in found:
        assert best.id == worst.id
        assert best.finish_reason == "stop"
        assert not best.unasked, "a fork that nothing asked for is never what to prefer"
        high, low = (one.score(lambda_, 10.0, length) for one in (best, worst))
        assert high is not None and low is not None
        assert high - low == pytest.approx(gap) and gap > 0
        others = {r: r.score(lambda_, 10.0, length) for r in rows if r.id == best.id}
        below = [s for r, s in others.items() if s is not None and r.unasked and s < high]
        assert worst.unasked == bool(below), "a fork that nothing asked for is what to prefer others to"
        assert low == min(below or [s for s in others.values() if s is not None])
    for identity in {r.id for r in rows} - {best.id for best, _, _ in found}:
        ended = [r for r in rows if r.id == identity and r.finish_reason == "stop" and not r.unasked]
        scores = {r.score(lambda_, 10.0, length) for r in rows if r.id == identity} - {None}
        assert (
            not ended
            or len(scores) < 2
            or all((r.score(lambda_, 10.0, length) or 0) <= min(s for s in scores if s is not None) for r in ended)
        )


@given(st.floats(-100, 100), st.floats(1, 50))
def test_scores_add_speed_and_quality(difference: float, sigma: float) -> None:
    one = answer(difference=difference)
    quality = one.quality(sigma)
    assert quality == pytest.approx(1 / (1 + math.exp(-difference / sigma)))
    assert one.speedup() == 2.0
    assert (one.speedup("matched"), one.speedup("smaller")) == (1.5, 1.5)
    assert one.score(4, sigma) == pytest.approx(2 + 4 * (quality or 0))
    assert one.score(math.inf, sigma) == quality
    judged = answer(win=0.9, difference=None)
    assert judged.quality(sigma) == 0.9
    assert answer(difference=None).score(1, sigma) is None


# ------------------------------------------------------------------------------ a round


@pytest.fixture
def config(start: Path, tmp_path: Path) -> PreferenceConfig:
    rows = [
        answer(str(i), c, critical_path=10 if c % 3 == 1 else 30, source="made up", licence="CC0").to_dict()
        for i in range(24)
        for c in range(3)
    ]
    data = tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreferenceConfig(
        data=data,
        out=tmp_path / "out",
        model=str(start / "base"),
        start=start / "out" / "adapter",
        learning_rate=3e-3,
        row_learning_rate=3e-3,
        batch_tokens=600,
        save_steps=2,
        epochs=3,
    )


def test_a_round_learns_to_prefer_and_says_how(config: PreferenceConfig) -> None:
    said: list[str] = []
    folder = train(config, said.append)
    record = json.loads((folder / "train.json").read_text())
    assert record["stage"] == "stage 2, lambda = 1"
    assert record["final"]["margin"] > 1
    assert record["final"]["pairs_in_order"] > 0.9
    assert record["data"]["rows"] == 24
    assert record["data"]["samples"]["speedup, theoretical"] == pytest.approx((4 * 4 / 3 * 4 / 3) ** (1 / 3))
    loaded = loading.load(config.model, adapter=str(folder), dtype="float32")
    assert loaded.prepared
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == []
    card = (folder / "README.md").read_text()
    assert "lambda = 1" in card and "| made up | 24 |" in card and "Goes on from stage 1: " in card
    logged = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert any("margin" in entry for entry in logged)
    assert any("0 log-prob" in line or "log-probabilities" in line for line in said)
    assert "24 of 24 pairs keep no sampled tokens of this model: their text is encoded anew" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_are_in_bfloat16_where_that_is_faster(
    config: PreferenceConfig, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []

    def spying(model: Any, inputs: Any) -> Any:
        seen.append((model.training, torch.is_autocast_enabled("cpu")))
        return log_probs(model, inputs)

    monkeypatch.setattr("pastalm.models.dtypes.training_dtype", lambda _: dtype)
    monkeypatch.setattr("pastalm.train.preference.log_probs", spying)
    train(replace(config, epochs=1), str)
    assert {half for _, half in seen} == {dtype == "bfloat16"}
    assert {training for training, _ in seen} == {True, False}


def test_a_round_that_was_broken_off_ends_as_one_that_was_not(
    config: PreferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes(train, config, tmp_path / "again", monkeypatch)


def test_what_cannot_be_trained_on_is_one_clear_line(config: PreferenceConfig, tmp_path: Path) -> None:
    def refused(error: type[Exception], said: str, **changes: Any) -> None:
        with pytest.raises(error, match=said) as caught:
            train(replace(config, **changes), str)
        assert "\n" not in str(caught.value)

    empty, odd, equal, torn = (tmp_path / f"{n}.jsonl" for n in ("empty", "odd", "equal", "torn"))
    empty.write_text("")
    odd.write_text('{"id": "x"}\n')
    equal.write_text("".join(json.dumps(answer("p", c).to_dict()) + "\n" for c in range(3)))
    rows = [answer("p", 0, critical_path=5, annotated="a</async>"), answer("p", 1)]
    torn.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    refused(DataError, "no scored answers", data=tmp_path / "none.jsonl")
    refused(DataError, "is empty", data=empty)
    refused(DataError, r"odd\.jsonl, line 1: not a scored answer", data=odd)
    refused(DataError, "no two answers", data=equal, out=tmp_path / "o1")
    refused(DataError, "sample it again", data=torn, out=tmp_path / "o2")
    refused(RequestError, "give --start", start=None)
    refused(RequestError, "lambda must be", lambda_=-1.0)
    other = tmp_path / "other"
    checkpoints.save(small_model(len(BYTE_LEVEL), layers=1), BYTE_LEVEL, other)
    refused(ModelError, "was made for", model=str(other), out=tmp_path / "o3")


def test_the_spread_is_that_of_the_differences() -> None:
    rows = [answer(choice=i, difference=d) for i, d in enumerate((1.0, 3.0, None))]
    assert scores.spread(rows) == 1.0
