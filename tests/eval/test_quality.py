"""Scores: likelihoods are the model's own, penalties rise with what they are for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pastalm.errors import RemoteError, RequestError
from pastalm.eval.quality import (
    FORM,
    Candidate,
    Judge,
    PmiScorer,
    ReferenceScorer,
    asked_for_parts,
    log_likelihoods,
    penalty,
    preference,
)
from pastalm.models import loading
from pastalm.records.chat_client import ChatClient, Completion
from pastalm.records.parts import MIN_PARTS, PART_CHARACTERS, in_parts, parts
from pastalm.records.repetition import SHARED, repetition, retold, sameness
from tests.laws.architectures import build
from tests.laws.tiny import ARCHITECTURES, tiny_model
from tests.served import Reply, completion, free_port, replaying


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "phi", "minicpm3"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_likelihoods_are_those_of_each_row_alone(name: str, batch_tokens: int) -> None:
    """Whatever a model's head does to its logits."""
    model = tiny_model(name) if name in ARCHITECTURES else build(name)
    generator = torch.Generator().manual_seed(0)
    rows = [
        tuple(torch.randint(3, 250, (n,), generator=generator).tolist() for n in sizes)
        for sizes in ((5, 9), (3, 1), (8, 0), (2, 17), (5, 9))
    ]
    sums = log_likelihoods(model, rows, batch_tokens=batch_tokens)
    for (prompt, answer), total in zip(rows, sums, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        own = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        # Gemma 2's own attention computes its softmax in float32
        assert math.isclose(total, own, rel_tol=1e-6 if name == "gemma2" else 1e-9, abs_tol=1e-9)


def test_a_difference_is_from_the_baselines_own_answer() -> None:
    """Each baseline is scored as a candidate of its own, once for all answers to its prompt."""
    seen: list[list[Candidate]] = []

    class Lengths(ReferenceScorer):
        def score(self, candidates: Sequence[Candidate]) -> list[float]:
            seen.append(list(candidates))
            return [float(len(c.text)) for c in candidates]

    candidates = [Candidate("p", "x" * n, ("x",), "y" * 5, "r") for n in (3, 5, 8)]
    candidates.append(Candidate("q", "xx", (), "", "r"))
    assert [v.difference for v in Lengths().compare(candidates)] == [-2, 0, 3, 2]
    asked = [candidate for call in seen for candidate in call]
    assert len(asked) == len(set(asked)) == 6
    assert Candidate("p", "y" * 5, (), "y" * 5, "r") in asked


def test_what_an_answer_is_scored_beside_does_not_hang_on_what_was_known() -> None:
    """The last bits of a likelihood do; a run that was cut off is to come to the same ones."""
    seen: list[tuple[Candidate, ...]] = []

    class Lengths(ReferenceScorer):
        def score(self, candidates: Sequence[Candidate]) -> list[float]:
            seen.append(tuple(candidates))
            return [float(len(c.text)) for c in candidates]

    def candidates(word: str) -> list[Candidate]:
        return [Candidate(p, f"{word} {p}", (), f"base {p}", "r") for p in "abc"]

    whole, cut = Lengths(), Lengths()
    whole.compare(candidates("one"))
    baselines, _ = seen
    seen.clear()
    whole.compare(candidates("two"))
    (known,) = seen
    seen.clear()
    cut.compare(candidates("two"))
    assert seen == [baselines, known]


def test_penalties_are_for_repetition_for_likeness_and_for_length() -> None:
    plain = Candidate("p", "one two three four five six seven eight", ("a b c d e", "f g h i j"), "x" * 39, LIST)
    assert penalty(plain) == 0
    assert repetition("say it once more " * 9) > 0.8 > 0 == repetition("each word here comes only once")
    assert sameness(["a b c d e", "a b c d e", "v w x y z"]) == 1
    assert sameness(["a b c d e f", "a b c d x y"]) == pytest.approx(1 / 5)
    costs = [penalty(Candidate("p", "x" * n, (), "x" * 100)) for n in (400, 200, 100, 50, 25)]
    assert costs[0] > costs[1] >= costs[2] == 0 and costs[4] > costs[3] >= 0


def test_an_answer_belongs_to_its_own_prompt_more_than_to_anothers() -> None:
    scorer = PmiScorer(loading.load(adapter=None, dtype="float32"))
    pairs = [
        (
            "How do I keep bees?",
            "Bees need a hive, flowers near by and a keeper who checks the combs.",
        ),
        (
            "What is a prime number?",
            "A prime number has no divisors but 1 and itself, like 7 or 13.",
        ),
        (
            "Name a way to sleep better.",
            "Go to bed at the same hour and keep the bedroom dark and cool.",
        ),
    ]
    crossed = [(p, answer) for p, _ in pairs for _, answer in pairs]
    found = scorer.information(crossed)
    for i in range(3):
        row = found[3 * i : 3 * i + 3]
        assert max(range(3), key=lambda j: row[j]) == i
    assert scorer.score([Candidate("p", "")]) == [0.0]


def test_a_baselines_answer_is_scored_once_for_all_systems() -> None:
    asked: list[tuple[str, str]] = []
    known = {"Bees.": 3.0, "Wax.": 5.0, "Hives.": 9.0}

    class Told(PmiScorer):
        def information(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
            asked.extend(pairs)
            return [known[text] for _, text in pairs]

    scorer = Told(loading.load(adapter=None, dtype="float32"))
    one, two = (Candidate("p", text, (), "Bees.") for text in ("Wax.", "Hives."))
    first, again, own = scorer.compare([one, one, Candidate("p", "Bees.", (), "Bees.")])
    (second,) = scorer.compare([two])
    assert sorted(asked) == [("p", "Bees."), ("p", "Hives."), ("p", "Wax.")]
    lengths = [penalty(c) for c in (one, two)]
    assert first == again and first.difference == 5 - lengths[0] - 3
    assert second.difference == 9 - lengths[1] - 3 and own.difference == 0


def test_an_answer_near_its_reference_scores_higher() -> None:
    scorer = ReferenceScorer()
    reference = "Water boils at 100 degrees Celsius at sea level."
    near, far = "At sea level, water boils at 100 °C.", "My cat likes to sleep on warm windowsills."
    first, second, same = scorer.score([Candidate("p", t, reference=reference) for t in (near, far, reference)])
    assert same == pytest.approx(1, abs=1e-5)
    assert second < 0.3 < 0.7 < first < same
    with pytest.raises(RequestError, match="reference answer is needed"):
        scorer.score([Candidate("p", near)])


# ------------------------------------------------------------------------------ the judge


@given(st.floats(-9, 0), st.floats(-9, 0))
def test_a_judges_confidence_is_that_of_its_letters(m: float, other: float) -> None:
    found = preference(Completion("M", top_logprobs={"m": m, " M": other, "x": -0.1}))
    assert found == pytest.approx(1 / (1 + math.exp(m - other)))
    assert preference(Completion("M")) == 1
    assert preference(Completion(" m.")) == 0
    assert preference(Completion("Both are fine.")) == "not a verdict: 'Both are fine.'"
    assert preference(Completion(refused="too long")) == "refused: too long"


def test_the_judge_sees_both_orders_and_a_liking_for_one_place_cancels_out() -> None:
    """A judge that likes what stands second, and a word: only the word is left in the verdict."""

    def answer(body: dict[str, Any]) -> Reply:
        text = body["messages"][-1]["content"]
        first, second = text.split("# Answer m")[1].split("# Answer M")
        odds = 2.0 + 3.0 * ("gold" in second) - 3.0 * ("gold" in first)
        tops = [{"token": t, "logprob": v, "bytes": None} for t, v in (("m", 0.0), ("M", odds))]
        content = [{**tops[1], "top_logprobs": tops}]
        assert (body["max_tokens"], body["logprobs"]) == (1, True)
        if "odd" in text:
            return completion("I like both")
        return completion("M", logprobs={"content": content, "refusal": None})

    with replaying(answer) as url:
        judge = Judge(ChatClient(url, "m", retries=0))
        texts = ("gold", "lead", "odd")
        verdicts = judge.compare([Candidate("p", t, baseline="iron") for t in texts])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert verdicts[0].win == pytest.approx((sigmoid(5) + 1 - sigmoid(-1)) / 2)
    assert verdicts[1].win == pytest.approx(0.5)
    assert verdicts[2].win is None and verdicts[2].why == "not a verdict: 'I like both'"


def test_a_judge_that_is_down_is_one_clear_error() -> None:
    judge = Judge(ChatClient(f"http://127.0.0.1:{free_port()}/v1", "m", retries=0))
    with pytest.raises(RemoteError, match="cannot reach"):
        judge.compare([Candidate("p", "a", baseline="b")])


words = st.lists(st.sampled_from("abcdefgh"), max_size=12)


@given(st.lists(words, max_size=4))
def test_a_part_is_retold_that_has_six_words_of_an_earlier_one(texts: list[list[str]]) -> None:
    def runs(text: list[str]) -> set[tuple[str, ...]]:
        return {tuple(text[i : i + SHARED]) for i in range(len(text) - SHARED + 1)}

    again = [any(runs(text) & runs(earlier) for earlier in texts[:i]) for i, text in enumerate(texts)]
    share = retold([" ".join(text).upper() if i else " ".join(text) for i, text in enumerate(texts)])
    assert share == (sum(again) / len(texts) if texts else 0)


LINE = "is worth some time, since it changes what you can do with an afternoon in town"
LIST = "".join(f"{n}. Walking route {n} {LINE}.\n" for n in range(1, 4))
SECTIONS = "".join(f"## Part {n}\n\nWalking route {n} {LINE}.\n\n" for n in range(1, 4))


@pytest.mark.parametrize("text", [LIST, LIST.replace(". W", ") W"), LIST.replace("\n", "\n\n"), SECTIONS])
@pytest.mark.parametrize("after", ["", "\nOverall, walk more."])
def test_items_and_sections_are_the_parts_of_a_text(text: str, after: str) -> None:
    found = parts(f"Some ideas:\n\n{text}{after}")
    assert len(found) == 3
    assert all(f"route {n} {LINE}." in part and "Overall" not in part for n, part in enumerate(found, 1))
    assert in_parts(text)


@pytest.mark.parametrize(
    "text", ["", "Yes.", f"It {LINE}.\n\nIt {LINE}.\n\nIt {LINE}.", "- red\n- blue\n- green\n", LIST.split("3.")[0]]
)
def test_a_text_without_three_parts_of_a_sentence_is_not_made_of_parts(text: str) -> None:
    assert not in_parts(text)


@given(st.text(alphabet="1.-* \n#ab"))
def test_parts_are_taken_from_the_text_in_order(text: str) -> None:
    at = 0
    for part in parts(text):
        at = text.index(part, at) + len(part)
    assert not in_parts(text) or len(text) >= MIN_PARTS * PART_CHARACTERS


def test_a_fork_where_the_sequential_answer_is_one_text_costs_an_answer_points() -> None:
    forked = Candidate("p", "aa bb", ("aa", "bb"), "a sentence")
    listed = Candidate("p", "aa bb", ("aa", "bb"), LIST)
    assert penalty(forked) - penalty(Candidate("p", "aa bb", (), "a sentence")) == pytest.approx(FORM)
    assert penalty(listed) == penalty(Candidate("p", "aa bb", (), LIST))
    assert asked_for_parts(listed) is True and asked_for_parts(forked) is False
    assert asked_for_parts(Candidate("p", "x", (), LIST, "one sentence")) is False, "the reference knows better"
    assert asked_for_parts(Candidate("p", "x")) is None
    assert penalty(Candidate("p", "aa bb", ("aa", "bb"))) == penalty(Candidate("p", "aa bb"))


def test_chunks_that_say_again_what_a_sibling_said_cost_points() -> None:
    again = ("stay well by walking to work each day", "move: stay well by walking to work each day, always")
    apart = ("stay well by walking to work each day", "eat what grows in the garden behind the old house")
    assert penalty(Candidate("p", "t", again)) > penalty(Candidate("p", "t", apart)) == penalty(Candidate("p", "t"))
