"""A whole evaluation on a tiny model: systems side by side, scores, figures, a page; gone on with where it was cut."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias
from unittest.mock import MagicMock

import pytest

from pastalm import LLM
from pastalm.core.layout import Policy
from pastalm.engines.drafts.budget import StepCosts
from pastalm.errors import DataError, RequestError
from pastalm.eval import compare, evaluate, measure, report
from pastalm.eval.compare import Pair
from pastalm.eval.intervals import Mean, mean
from pastalm.eval.quality import Candidate, Verdict
from pastalm.eval.systems import Decoding
from pastalm.models import checkpoints
from pastalm.records import answers, scores
from pastalm.records.answers import Answer
from pastalm.records.prompts import Prompt
from tests.test_models import BYTE_LEVEL, small_model

PROMPTS = [Prompt(id=str(i), text=f"What of {i}?", category="ab"[i % 2]) for i in range(4)]
FORKED = "".join(f'<promise topic="{t}" tokens="10"/><async>{t}{t}{t}</async>' for t in "ab") + "<sync/>end"
ANSWER = Answer(
    id="1",
    prompt="p",
    annotated=FORKED,
    tokens=40,
    critical_path=20,
    steps=18,
    finish_reason="stop",
    seconds=2.0,
    passes=10,
    first_seconds=0.5,
    matched_seconds=3.0,
)
PLAIN = replace(ANSWER, annotated="plain", tokens=50, critical_path=50, passes=50, seconds=5.0, matched_seconds=5.0)


class Lengths:
    """Longer is better; on one prompt it cannot tell."""

    name = "pmi"

    def compare(self, candidates: list[Candidate]) -> list[Verdict]:
        longer = [len(c.text) - len(c.baseline or "") for c in candidates]
        return [
            Verdict(why="no idea") if c.prompt.endswith("3?") else Verdict(difference=more)
            for c, more in zip(candidates, longer, strict=True)
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, path)
    return str(path)


Load: TypeAlias = Callable[[str, Policy | None], LLM]


@pytest.fixture(scope="module")
def load(folder: str) -> Load:
    return lambda _, positions: LLM(
        folder,
        engine="transformers",
        adapter=None,
        dtype="float32",
        positions=positions,
        max_num_seqs=4,
        max_model_len=1024,
    )


def test_speedups_are_those_of_the_definitions() -> None:
    pair = Pair(ANSWER, PLAIN, text_tokens=30, baseline_text_tokens=49)
    assert pair.speedups == {
        "theoretical": 50 / 20,
        "theoretical, matched": 30 / 20,
        "theoretical, smaller": 30 / 20,
        "in passes": 50 / 10,
        "in passes, matched": 30 / 10,
        "realized": 5.0 / 2.0,
        "realized, matched": 3.0 / 2.0,
    }
    bare = Pair(replace(ANSWER, seconds=None, passes=None), PLAIN, 30, 49)
    assert list(bare.speedups) == ["theoretical", "theoretical, matched", "theoretical, smaller"]


def test_figures_are_means_over_prompts() -> None:
    slow = replace(ANSWER, id="2", annotated="x", critical_path=40, seconds=8.0, finish_reason="length")
    found = compare.pairs([ANSWER, slow, replace(ANSWER, id="odd")], [PLAIN, replace(PLAIN, id="2")], len)
    assert [pair.answer.id for pair in found] == ["1", "2"]
    table = compare.figures(found, {})
    assert table["forks"].mean == 0.5 and table["cut off"].mean == 0.5 and table["chunks"].mean == 1
    assert table["theoretical"].mean == pytest.approx(math.sqrt(50 / 20 * 50 / 40))
    assert table["theoretical, arithmetic mean"].mean == pytest.approx((50 / 20 + 50 / 40) / 2)
    assert table["theoretical, harmonic mean"].mean == pytest.approx(2 / (20 / 50 + 40 / 50))
    assert table["realized"].low <= table["realized"].mean <= table["realized"].high
    assert table["seconds to the first token"].mean == 0.5
    assert table["tokens a pass"].mean == 40 / 10
    assert all(value.n == 2 for value in table.values())
    assert {key: value["theoretical"].n for key, value in compare.groups(found, lambda p: p.chunks).items()} == {
        "0": 1,
        "2": 1,
    }
    with pytest.raises(DataError, match="no prompt was answered by both"):
        compare.pairs([ANSWER], [replace(PLAIN, id="9")], len)


def test_promised_lengths_are_held_against_those_of_the_chunks() -> None:
    def promised(identity: str, *lengths: tuple[int, int]) -> Answer:
        chunks = (
            f'<promise topic="t{i}" tokens="{n}"/><async>{"x" * real}</async>' for i, (n, real) in enumerate(lengths)
        )
        return replace(ANSWER, id=identity, annotated="".join(chunks))

    def told(*own: Answer) -> dict[str, Mean]:
        return compare.figures(compare.pairs(own, [replace(PLAIN, id=a.id) for a in own], len), {})

    name = "promised lengths, rank correlation"
    rising = [promised(str(i), (20 * i, 7 * i), (20 * i + 10, 7 * i + 3)) for i in range(1, 9)]
    assert told(*rising)[name].mean == pytest.approx(1) and told(*rising)[name].n == 16
    assert told(*(promised(str(i), (10 * i, 90 - i)) for i in range(1, 9)))[name].mean == pytest.approx(-1)
    mixed = told(promised("1", (10, 5), (20, 50), (30, 20)), promised("2", (10, 20), (20, 9), (40, 80)))[name]
    assert mixed.low <= mixed.mean <= mixed.high and -1 < mixed.mean < 1
    assert told(promised("1", (40, 5), (40, 9)), promised("2", (40, 8)))[name].mean == 0, (
        "always the same tells nothing"
    )
    assert name not in told(PLAIN)


def test_parts_that_say_again_what_another_said_are_counted_with_chunks_or_without() -> None:
    item, other = (
        "walk to work every single day of the year in any weather",
        "eat what grows in the garden behind the house",
    )
    forked = "".join(f'<promise topic="t{i}" tokens="10"/><async>{i}. {item}\n</async>' for i in range(2))
    texts = {"forked": forked, "list": f"1. {item}\n2. {item}\n", "apart": f"1. {item}\n2. {other}\n", "none": item}
    told = {name: replace(ANSWER, id=name, annotated=text) for name, text in texts.items()}
    again = {
        name: compare.figures(compare.pairs([own], [replace(PLAIN, id=name)], len), {})["a part retold"].mean
        for name, own in told.items()
    }
    assert again == {"forked": 1, "list": 1, "apart": 0, "none": 0}


def test_prompts_that_are_numbers_stand_in_order() -> None:
    many = [replace(ANSWER, id=i) for i in ("10", "b", "9", "a")]
    assert [p.answer.id for p in compare.pairs(many, many, len)] == ["9", "10", "a", "b"]


@pytest.mark.parametrize("kind", ["arithmetic", "geometric", "harmonic"])
def test_a_mean_lies_in_its_interval(kind: str) -> None:
    found = mean([1.0, 2.0, 4.0, 8.0], kind)  # type: ignore[arg-type]
    assert 1 <= found.low < found.mean < found.high <= 8
    assert found.mean == pytest.approx({"arithmetic": 3.75, "geometric": 8**0.5, "harmonic": 32 / 15}[kind])
    assert mean([3.0], kind).low == mean([3.0, 3.0], kind).high == pytest.approx(3)  # type: ignore[arg-type]


def test_a_run_goes_on_where_it_was_cut_and_ends_in_a_page(load: Load, tmp_path: Path) -> None:
    base = Decoding(evaluate.BASELINE, load("", None), parallelism=0)
    wanted = ["own=some:overlap+drafts", "off=some:off", "lookup", "sot"]
    systems = list(evaluate.build(wanted, base, load))
    assert isinstance(systems[1], Decoding) and systems[1].llm.positions == "overlap" != base.llm.positions
    names = [system.name for system in systems]
    assert names == evaluate.check(wanted) == ["baseline", "own", "off", "lookup", "sot"]

    def stop(counts: measure.MeasureCounts, _: Answer) -> None:
        if counts.written == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.measure(systems, PROMPTS, tmp_path / "answers", matched=base, max_tokens=12, progress=stop)
    counts = measure.measure(systems, PROMPTS, tmp_path / "answers", matched=base, max_tokens=12)
    assert (counts.skipped, counts.written, counts.refused) == (7, 13, {})
    texts = {}
    for name in names:
        found = answers.read(tmp_path / "answers" / f"{name}.jsonl")
        assert sorted(a.id for a in found) == [p.id for p in PROMPTS]
        assert all((a.seconds or 0) > 0 and (a.matched_seconds or 0) > 0 and a.passes for a in found)
        texts[name] = {a.id: a.text for a in found}
    assert texts["off"] == texts["lookup"] == texts["baseline"]

    references = tmp_path / "references.jsonl"
    references.write_text("".join(json.dumps({"id": p.id, "prompt": p.text}) + "\n" for p in PROMPTS))
    missing = evaluate.score_all(tmp_path, names, [Lengths()], len, references=references)
    assert missing == {"pmi": {"no idea": 5}}
    rows, units = evaluate.compare_all(tmp_path, names, {"pmi": None}, len)
    assert units["pmi"] == scores.spread([s for n in names for s in scores.read(tmp_path / f"scored/{n}.pmi.jsonl")])
    by = {row.system: row for row in rows}
    assert by["baseline"].figures["quality, pmi"].mean == 0.5 and by["baseline"].figures["quality, pmi"].n == 3
    assert by["off"].figures["theoretical"].mean == 1
    assert by["lookup"].figures["theoretical, matched"].mean == by["off"].figures["theoretical, matched"].mean
    in_passes = {name: row.figures["in passes, matched"].mean for name, row in by.items()}
    assert in_passes["lookup"] >= in_passes["off"] == in_passes["baseline"] > in_passes["sot"]

    table = compare.markdown(rows, units, "off")
    assert "| score (theoretical) less off's | pmi, lambda 1 |" in table
    gains = table.split("score (theoretical) less")[1]
    assert "| own | " in gains and "| off | " not in gains
    apart = compare.differences(by["baseline"], by["off"], units)["pmi, lambda 4"]
    assert (apart.mean, apart.n) == (0, 3), "tags off is the baseline here"
    page = report.write(tmp_path / "report", rows, table, baseline="baseline", settings={"command": "pasta eval"})
    shown = page.read_text()
    assert "What of 2?" in shown and "pasta eval" in shown and 'src="http' not in shown
    kept = json.loads((tmp_path / "report" / "figures.json").read_text())
    assert set(kept["systems"]) == set(names)
    assert set(kept["systems"]["own"]["by category"]) == {"a", "b"}
    assert len(kept["systems"]["own"]["prompts"]) == 4
    assert {row["passes"] for row in kept["systems"]["baseline"]["prompts"]} == {12}
    for name in ("frontier", "frontier-passes", "frontier-theoretical", "speedups"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    public = report.write(tmp_path / "public", rows, table, baseline="baseline", settings={}, public=True)
    assert "What of" not in public.read_text() + (tmp_path / "public" / "figures.json").read_text()


def test_under_load_the_answers_are_the_same(load: Load, tmp_path: Path) -> None:
    names = ["baseline", "own", "sot", "sot-routed", "lookup", "llma"]
    wanted = ["own=some", *names[2:]]
    systems = list(evaluate.build(wanted, Decoding(evaluate.BASELINE, load("", None), parallelism=0), load))
    prompts = [replace(prompt, references=(f"Of {prompt.id}",)) for prompt in PROMPTS]
    measure.measure(systems, prompts, tmp_path / "one", max_tokens=12)
    counts = measure.under_load(systems, prompts, tmp_path / "many", max_tokens=12, timed=False)
    assert (counts.written, counts.skipped, counts.refused) == (24, 0, {})
    for name in names:
        one, many = (answers.read(tmp_path / where / f"{name}.jsonl") for where in ("one", "many"))
        told = [{a.id: (a.annotated, a.tokens, a.critical_path, len(a.threads)) for a in file} for file in (one, many)]
        assert told[0] == told[1], name
        assert all(a.seconds is None and a.first_seconds is None for a in many)
    assert measure.under_load(systems, prompts, tmp_path / "many", max_tokens=12).skipped == 24
    long = [Prompt(id="long", text="x" * 2000)]
    counts = measure.under_load(systems, [*prompts, *long], tmp_path / "long", max_tokens=12)
    assert counts.written == 24 and sum(counts.refused.values()) == 6


@pytest.mark.parametrize(
    ("entry", "adapter", "policy", "off", "drafts", "method"),
    [
        ("a=x", "x", None, False, "off", "asynchronous"),
        ("a=x:off", "x", None, True, "off", "sequential"),
        ("a=x+drafts", "x", None, False, "auto", "asynchronous, drafts auto"),
        ("a=x+lookup", "x", None, False, "lookup", "asynchronous, drafts lookup"),
        ("a=x:overlap+lookup,answers", "x", "overlap", False, "lookup,answers", "asynchronous, drafts lookup,answers"),
        ("a=x:off+answers", "x", None, True, "answers", "sequential, drafts answers"),
        ("a=more+less/x", "more+less/x", None, False, "off", "asynchronous"),
        ("a=more+less/x+references", "more+less/x", None, False, "references", "asynchronous, drafts references"),
        ("lookup", "", None, True, "lookup", "sequential, drafts lookup"),
        ("llma", "", None, True, "references", "sequential, drafts references"),
        ("sot-routed", "", None, False, "off", "sot-routed"),
        ("sot=x", "x", None, False, "off", "asynchronous"),
    ],
)
def test_a_system_is_an_adapter_its_threads_and_its_drafts(
    entry: str, adapter: str, policy: Policy | None, off: bool, drafts: str, method: str
) -> None:
    spec = evaluate.parse_system(entry)
    assert (spec.adapter, spec.policy, spec.off, spec.drafts) == (adapter, policy, off, drafts)
    headers = evaluate.described([entry], lambda adapter: {"name": adapter, "sha256": ""}, "base", {})
    assert headers[spec.name]["method"] == spec.method == method


def test_the_baseline_and_what_runs_on_it_are_recorded_with_its_adapter() -> None:
    """Also where the settings are those of a model that has none."""
    settings = {"model": {"name": "m", "sha256": "1"}, "adapter": None}
    systems = ["mine=other", "sot", "lookup"]
    headers = evaluate.described(systems, lambda adapter: {"name": adapter, "sha256": ""}, "base", settings)
    adapters = {name: header["adapter"]["name"] for name, header in headers.items()}
    assert adapters == {"baseline": "base", "mine": "other", "sot": "base", "lookup": "base"}


def test_drafts_change_no_answer(load: Load, tmp_path: Path) -> None:
    wanted = ["own=some", "more=some+drafts", "two=some+lookup,siblings", "off=some:off+drafts", "lookup", "llma"]
    systems = list(evaluate.build(wanted, Decoding(evaluate.BASELINE, load("", None), parallelism=0), load))
    prompts = [replace(prompt, references=(f"Of {prompt.id}",)) for prompt in PROMPTS]
    for system in systems:
        system.llm.driver.engine._drafting.costs = StepCosts(lambda rows: 1 + rows * 1e-6)  # type: ignore[attr-defined]
    measure.measure(systems, prompts, tmp_path, max_tokens=40)
    told = {
        name: [(a.text, a.tokens, a.critical_path, a.finish_reason) for a in answers.read(tmp_path / f"{name}.jsonl")]
        for name in evaluate.check(wanted)
    }
    passes = {name: sum(a.passes or 0 for a in answers.read(tmp_path / f"{name}.jsonl")) for name in told}
    assert told["more"] == told["two"] == told["own"]
    assert told["off"] == told["lookup"] == told["llma"] == told["baseline"]
    assert max(passes["more"], passes["two"]) < passes["own"]
    assert max(passes["off"], passes["lookup"]) < passes["baseline"]


def test_systems_that_cannot_be_built(load: Load) -> None:
    base = Decoding(evaluate.BASELINE, load("", None), parallelism=0)
    for wanted, said in (
        (["nothing"], "unknown system"),
        (["a=x", "a=y"], "cannot name"),
        (["baseline=x"], "cannot"),
        (["a=x+guesses"], r"unknown drafts 'guesses' of x: end in \+drafts, or in some of \+lookup"),
        (["a=x+lookup:off"], "unknown drafts"),
    ):
        with pytest.raises(RequestError, match=said):
            list(evaluate.build(wanted, base, load))


def test_only_the_system_whose_turn_it_is_is_in_memory(load: Load, tmp_path: Path) -> None:
    living: list[weakref.ref[LLM]] = []

    def watched(adapter: str, positions: Policy | None) -> LLM:
        gc.collect()
        assert not any(ref() for ref in living), "the system before is still there"
        living.append(weakref.ref(found := load(adapter, positions)))
        return found

    base = Decoding(evaluate.BASELINE, load("", None), parallelism=0)
    measure.under_load(evaluate.build(["a=x", "b=y", "c=z"], base, watched), PROMPTS[:1], tmp_path, max_tokens=4)
    assert len(living) == 3


def test_a_prompt_that_does_not_fit_is_counted(load: Load, tmp_path: Path) -> None:
    systems = [Decoding(evaluate.BASELINE, load("", None), parallelism=0)]
    counts = measure.measure(systems, [*PROMPTS, Prompt(id="long", text="x" * 2000)], tmp_path, max_tokens=4)
    assert counts.written == 4 and sum(counts.refused.values()) == 1


@pytest.mark.parametrize(("passes", "seconds"), [(50, 5.0), (30, 7.0)])
def test_a_text_that_guesses_made_sooner_is_decoded_again_without(
    monkeypatch: pytest.MonkeyPatch, passes: int, seconds: float
) -> None:
    """An answer in one thread is its own comparison only where no guess saved a pass."""
    monkeypatch.setattr(measure, "force", lambda *_: 7.0)
    monkeypatch.setattr(measure, "cold", lambda _: None)
    system = MagicMock()
    system.llm.loaded.vocabulary.eos = {0}
    assert measure._forced(system, replace(PLAIN, steps=50, passes=passes)) == seconds
