"""The methods that came before: lossless where they claim it, their costs counted, the text of their data kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm import LLM
from pastalm.core.language import Promise
from pastalm.eval.baselines import apar
from pastalm.eval.baselines.copying import Copying, along, decode, lookup
from pastalm.eval.baselines.skeleton import SkeletonOfThought, points_of
from pastalm.eval.systems import Decoding
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

RUNS = st.lists(st.integers(0, 2), max_size=12)


@given(RUNS, RUNS, st.integers(1, 3), st.integers(0, 2), st.integers(1, 5))
def test_a_draft_followed_what_the_answer_ends_with(
    known: list[int], source: list[int], shortest: int, more: int, draft: int
) -> None:
    longest = shortest + more
    found = lookup(known, source, longest=longest, shortest=shortest, draft=draft)

    def followed(size: int) -> list[list[int]]:
        tail = known[-size:]
        return [source[i + size : i + size + draft] for i in range(len(source) - size) if source[i : i + size] == tail]

    sizes = [size for size in range(shortest, longest + 1) if size <= len(known) and followed(size)]
    assert found == (followed(max(sizes))[-1] if sizes else [])


@pytest.mark.parametrize("source", ["prompt", "references"])
@pytest.mark.parametrize("max_tokens", [1, 2, 40])
def test_copying_is_lossless(llm: LLM, source: str, max_tokens: int) -> None:
    copied = Copying("copied", llm, source, shortest=1)  # type: ignore[arg-type]
    plain = Decoding("plain", llm, parallelism=0)
    fewer = 0
    for prompt in ASKED:
        found, wanted = copied.answer(prompt, max_tokens), plain.answer(prompt, max_tokens)
        assert (found.text, found.tokens, found.finish_reason) == (wanted.text, wanted.tokens, wanted.finish_reason)
        fewer += wanted.tokens - found.critical_path
    assert max_tokens < 40 or source == "references" or fewer > 0, "nothing was ever copied: the test sees nothing"


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_any_draft_leaves_the_answer_as_it_is(llm: LLM, right: float) -> None:
    """Drafts that are right for a while, then wrong: the tokens are those of no drafts at all."""
    model, prompt = llm.loaded.model, list(llm.loaded.vocabulary.encode("Say what?"))

    def run(propose: object) -> tuple[list[int], int]:
        found = decode(model, prompt, propose, max_tokens=30, ends=frozenset(), never=())  # type: ignore[arg-type]
        return found.tokens, found.passes

    plain, passes = run(lambda known: [])
    assert (len(plain), passes) == (30, 30)

    def propose(known: Sequence[int]) -> list[int]:
        at = len(known) - len(prompt)
        coming = plain[at : at + 6]
        return coming[: int(right * 6)] + [(token + 1) % 97 for token in coming[int(right * 6) :]]

    tokens, passes = run(propose)
    assert tokens == plain
    assert along(prompt, plain, propose, max_tokens=30).passes == passes
    assert passes == {0.0: 30, 0.5: 9, 1.0: 6}[right]


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


def test_copying_needs_transformers(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from pastalm.errors import CapabilityError

    with pytest.raises(CapabilityError, match="transformers"):
        Copying("copied", SimpleNamespace(loaded=SimpleNamespace(model=object())))  # type: ignore[arg-type]
