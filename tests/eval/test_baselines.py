"""The methods that came before: lossless where they claim it, their costs counted, the text of their data kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm import LLM, SamplingParams
from pastalm.core.language import Promise
from pastalm.engines.drafts.budget import StepCosts
from pastalm.eval import evaluate
from pastalm.eval.baselines import apar
from pastalm.eval.baselines.skeleton import SkeletonOfThought, points_of
from pastalm.eval.systems import Decoding, force
from pastalm.models import checkpoints
from pastalm.records.documents import parse, render, strip
from pastalm.records.prompts import Prompt
from tests.test_models import BYTE_LEVEL, small_model
from tests.train.test_structure import words


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, folder)
    return LLM(str(folder), dtype="float64", max_num_seqs=4, max_model_len=2048)


ASKED = [
    Prompt(id=str(i), text=text, references=(reference,))
    for i, (text, reference) in enumerate(
        [("abcabcabcabc", "cabcab"), ("What is it? What is it?", "It is. It is."), ("x", "yyyyyyyy"), ("aaaa", "")]
    )
]

# ------------------------------------------------------------------------------ copying


@pytest.fixture
def eager(llm: LLM) -> LLM:
    """The model where rows cost nothing, so that every guess is fed."""
    llm.driver.engine._drafting.costs = StepCosts(lambda rows: 1 + rows * 1e-6)  # type: ignore[attr-defined]
    return llm


@pytest.mark.parametrize("method", ["lookup", "llma"])
@pytest.mark.parametrize("max_tokens", [1, 2, 40])
def test_copying_is_lossless(eager: LLM, method: str, max_tokens: int) -> None:
    base = Decoding(evaluate.BASELINE, eager, parallelism=0)
    plain, copying = evaluate.build([method], base, lambda *_: eager)
    fewer = 0
    for prompt in ASKED:
        found, wanted = copying.answer(prompt, max_tokens), plain.answer(prompt, max_tokens)
        assert (found.text, found.tokens, found.finish_reason) == (wanted.text, wanted.tokens, wanted.finish_reason)
        assert found.critical_path == wanted.critical_path == wanted.passes
        fewer += (wanted.passes or 0) - (found.passes or 0)
    assert max_tokens < 40 or method == "llma" or fewer > 0, "nothing was ever copied: the test sees nothing"


def test_references_save_passes_where_they_hold_the_answer(eager: LLM) -> None:
    """And only for who names them: drafts of all kinds do not read what a prompt's file knows of its answer."""
    plain = Decoding("plain", eager, parallelism=0).answer(ASKED[1], 40)
    known = replace(ASKED[1], references=("no", plain.text))
    passes = {
        drafts: Decoding("drafted", eager, parallelism=0, drafts=drafts).answer(known, 40).passes or 0
        for drafts in ("references", "siblings,references", "siblings")
    }
    assert passes["references"] < 30 and passes["siblings,references"] < 30
    assert passes["siblings"] == plain.passes == plain.tokens, "a single thread has no siblings"
    said = Decoding("drafted", eager, drafts="auto")._params(known, 40)
    assert said.references is None and said.drafts == "auto"


def test_forced_decoding_feeds_no_guesses(eager: LLM) -> None:
    """The time of a text decoded one token after the other is what speedups are relative to."""
    passes: list[int] = []
    engine, plain = eager.driver.engine, Decoding("plain", eager, parallelism=0).answer(ASKED[0], 40)
    forward = engine._forward  # type: ignore[attr-defined]
    engine._forward = lambda batch, keep: passes.append(len(keep)) or forward(batch, keep)  # type: ignore[attr-defined]
    try:
        tokens = eager.loaded.vocabulary.encode(plain.text)
        force(engine, eager.encode([{"role": "user", "content": ASKED[0].text}], SamplingParams()), tokens)
    finally:
        engine._forward = forward  # type: ignore[attr-defined]
    assert set(passes) == {1} and len(passes) >= len(tokens) - 1


# ------------------------------------------------------------------------------ skeleton of thought


def test_points_are_read_from_a_skeleton() -> None:
    said = "Sure:\n1. Sleep early:\n 2) Eat greens \n3. Sleep early\nand\n4.\n5. Walk"
    assert points_of(said) == ["Sleep early", "Eat greens", "Walk"]
    assert len(points_of("".join(f"{i}. point {i}\n" for i in range(1, 20)))) == 10


def test_a_skeleton_costs_itself_and_its_longest_point(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model writes no skeleton: it is put in its mouth; the points are its own."""
    monkeypatch.setattr("pastalm.eval.baselines.skeleton.points_of", lambda said: ["Sleep early", "Eat greens"])
    found = SkeletonOfThought("sot", llm, max_point=20).answer(ASKED[0], 60)
    assert [p.topic for p in parse(found.annotated) if isinstance(p, Promise)] == ["Sleep early", "Eat greens"]
    assert found.text.startswith("1. Sleep early: ") and "\n2. Eat greens: " in found.text
    assert found.critical_path < found.tokens <= 200 + 2 * 20
    assert 0 < (found.first_seconds or 0) < (found.seconds or 0)
    assert not llm.driver.running


def test_without_a_skeleton_the_answer_is_sequential_and_dearer(llm: LLM) -> None:
    plain = Decoding("plain", llm, parallelism=0).answer(ASKED[0], 24)
    for routed in (False, True):
        found = SkeletonOfThought("sot", llm, routed=routed).answer(ASKED[0], 24)
        assert found.text == plain.text
        assert found.tokens == found.critical_path > plain.tokens


# ------------------------------------------------------------------------------ APAR

PARAGRAPHS = "Ants are small. They carry far more than they weigh, and for a long way too.\n\nBees dance. "
PARAGRAPHS += "They tell each other by it where the best flowers of the meadow are to be found."
LIST = "Try these:\n1. Sleep well: go to bed at the same hour, in a dark and quiet room, each day.\n"
LIST += "2. Eat greens: they have what a body needs, and few of those who eat them fall ill.\n"
LIST += "3. Walk. Half an hour is enough, and the dog that you do not have yet will be glad of it.\n\nThat is all."


@pytest.mark.parametrize(("text", "chunks"), [(PARAGRAPHS, 2), (LIST, 3), (LIST + "\n```\nx\n```", 0), ("Yes.", 0)])
def test_details_of_lists_and_paragraphs_become_chunks(text: str, chunks: int) -> None:
    document = apar.annotate(text, words)
    assert sum(isinstance(node, Promise) for node in document) == chunks
    assert strip(parse(render(document))) == text
    assert "<sync/>" not in render(document)


@given(st.text(alphabet="ab1. \n:2)3", max_size=80))
def test_any_text_is_kept(text: str) -> None:
    assert strip(parse(render(apar.annotate(text, len)))) == text


def test_heads_stay_in_the_main_thread() -> None:
    main = "".join(getattr(node, "text", "") for node in apar.annotate(LIST, words))
    assert main.startswith("Try these:\n1. Sleep well:2. Eat greens:3. Walk.") and main.endswith("That is all.")
