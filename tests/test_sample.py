"""A model's own answers: seeded, resumable, many at once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from pastalm import LLM, SamplingParams
from pastalm.answering import SampleCounts, sample
from pastalm.engines.drafts.budget import StepCosts
from pastalm.errors import DataError, RequestError
from pastalm.models import checkpoints, preparing
from pastalm.records import answers as kept_answers
from pastalm.records import jsonl
from pastalm.records.documents import parse
from pastalm.records.prompts import Prompt
from tests.test_models import BYTE_LEVEL, small_model

PARAMS = SamplingParams(n=2, temperature=1, max_tokens=24, seed=3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, folder)
    return LLM(str(folder), dtype="float64", max_num_seqs=3, max_model_len=256)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model that has the tags, and says them now and then."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer, model = copy.deepcopy(BYTE_LEVEL), small_model(len(BYTE_LEVEL))
    preparing.prepare(model, tokenizer)
    checkpoints.save(model, tokenizer, folder)
    return LLM(str(folder), dtype="float64", max_num_seqs=3, max_model_len=512)


PROMPTS = [*(Prompt(id=str(i), text=f"What of {i}?") for i in range(5)), Prompt(id="long", text="x " * 300)]


def answers(path: Path) -> dict[tuple[str, int], str]:
    rows = [row for _, row in jsonl.read(path)]
    assert len({(r["id"], r["choice"]) for r in rows}) == len(rows)
    for row in rows:
        parse(row["annotated"])
        assert row["tokens"] >= row["critical_path"] >= 1
    return {(r["id"], r["choice"]): r["annotated"] for r in rows}


def test_a_run_that_was_broken_off_goes_on_to_the_same_answers(llm: LLM, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    counts = sample(llm, PROMPTS, whole, PARAMS)
    assert (counts.written, counts.refused, counts.skipped) == (10, 2, 0)
    assert counts.tokens == sum(row["tokens"] for _, row in jsonl.read(whole))
    assert sum(counts.ended.values()) == 10

    def stop(counts: SampleCounts) -> None:
        if counts.written == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(llm, PROMPTS, broken, PARAMS, progress=stop)
    assert not llm.driver.running
    with broken.open("a") as file:
        file.write('{"id": "4", "cho')
    counts = sample(llm, PROMPTS, broken, PARAMS)
    assert (counts.written, counts.skipped) == (6, 4)
    assert answers(broken) == answers(whole)
    assert broken.read_bytes() == whole.read_bytes()
    assert len(set(answers(whole).values())) > 5  # choices and prompts differ


OTHER_VALUES = {
    "stop": "x", "logit_bias": {3: 1.0}, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [5], "temperature": 0.5,
    "top_p": 0.5, "top_k": 3, "min_p": 0.5, "repetition_penalty": 2.0, "max_tokens": 9,
    "processors": ["decortl"],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_file_of_answers_continues_only_with_the_same_parameters(llm: LLM, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.jsonl"
    changed = replace(PARAMS, n=1, **{name: OTHER_VALUES[name]})
    sample(llm, PROMPTS[:1], out, changed)
    assert sample(llm, PROMPTS[:1], out, changed).skipped == 1
    with pytest.raises(DataError, match=f"other settings.*{name}"):
        sample(llm, PROMPTS[:1], out, replace(PARAMS, n=1))


def test_drafts_leave_the_file_as_it_is(prepared: LLM, tmp_path: Path) -> None:
    """How many guesses are fed depends on the clock: no row may depend on it, or a run could not be repeated."""
    tags = prepared.loaded.vocabulary.tags
    assert tags is not None
    bias = {tags.promise: 6.0, tags.promise_end: 9.0, tags.tokens: 9.0, tags.async_close: 4.0}
    params = replace(PARAMS, temperature=0, n=1, max_tokens=120, logit_bias=bias, ignore_eos=True)
    prepared.driver.engine._drafting.costs = StepCosts(lambda rows: 1 + rows * 1e-6)  # type: ignore[attr-defined]
    written = []
    for drafts in ("off", "auto"):
        target = tmp_path / f"{drafts}.jsonl"
        sample(prepared, PROMPTS[:4], target, replace(params, drafts=drafts))
        written.append(target.read_bytes())
    assert written[0] == written[1] and b"<async>" in written[0]
    assert all("steps" not in row for _, row in jsonl.read(tmp_path / "auto.jsonl")), (
        "a thread may get ahead by guesses"
    )


def test_processors_are_recorded_by_name_or_not_at_all(llm: LLM, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(RequestError, match="logits processors by name"):
        sample(llm, PROMPTS[:1], out, replace(PARAMS, processors=[lambda visible, logits: logits]))
    assert not out.exists() and not llm.driver.running


def test_files_that_cannot_be_used_are_one_clear_line(llm: LLM, tmp_path: Path) -> None:
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"prompt": 3}\n')
    with pytest.raises(DataError, match="line 1: not an answer .*use another file"):
        sample(llm, PROMPTS, odd, PARAMS)
    with pytest.raises(DataError, match="cannot write"):
        sample(llm, PROMPTS, odd / "out.jsonl", PARAMS)
    assert not llm.driver.running


def test_answers_keep_the_tokens_that_were_sampled(llm: LLM, prepared: LLM, tmp_path: Path) -> None:
    """In linear order, which of them no thread sampled beside them: what was forced, or put in the place of another."""
    out = tmp_path / "out.jsonl"
    sample(prepared, PROMPTS[:5], out, replace(PARAMS, max_tokens=150))
    rows = kept_answers.read(out)
    vocabulary = prepared.loaded.vocabulary
    assert vocabulary.tags is not None
    assert any(row.chunks for row in rows)
    for row in rows:
        assert len(row.token_ids) == row.tokens and set(row.forced) <= set(range(row.tokens))
        assert vocabulary.text(row.token_ids).startswith(row.text.partition("\n")[0])
        opened = [i for i, token in enumerate(row.token_ids) if token == vocabulary.tags.async_open]
        syncs = [i for i, token in enumerate(row.token_ids) if token == vocabulary.tags.sync]
        assert set(opened) <= set(row.forced) and not set(syncs) & set(row.forced)
        assert kept_answers.read(out) == rows
    assert any(list(vocabulary.encode(row.text)) != list(row.token_ids) for row in rows if not row.chunks)
    sample(llm, PROMPTS[:1], tmp_path / "plain.jsonl", PARAMS)
    assert not any(row.token_ids for row in kept_answers.read(tmp_path / "plain.jsonl"))
