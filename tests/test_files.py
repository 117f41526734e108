"""Files of the real command: nothing of others is touched, nothing of another run is taken for this one's, and one bad
row costs no other."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pastalm.models import checkpoints
from pastalm.models.adapters import shape_of, write_card
from pastalm.records import jsonl
from tests.test_cli import complains, pasta

pytestmark = pytest.mark.usefixtures("own_cache")

LISTED = "Two tips:\n\n1. Sleep: every day, and do it well, for weeks.\n2. Food: eat greens every day, and beans.\n"


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the same name and size, in runs of their own, which say other things."""
    from peft import LoraConfig, get_peft_model

    work = tmp_path_factory.mktemp("runs")
    model, _ = checkpoints.read(tiny)
    shape = shape_of(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    first, second = work / "first" / "adapter", work / "second" / "adapter"
    adapted.save_pretrained(str(first))
    write_card(first, {"base": "tiny", "shape": shape, "tags": [], "sequential_marker": None})
    shutil.copytree(first, second)
    weights = load_file(second / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    save_file(
        {name: torch.randn(value.shape, generator=generator) for name, value in weights.items()},
        second / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return first, second


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in jsonl.read(path)]


def sampled(identity: str, text: str, choice: int = 0) -> dict[str, Any]:
    told = {"prompt": f"What of {identity}?", "annotated": text, "tokens": 9, "critical_path": 9}
    return {"id": identity, "choice": choice, "finish_reason": "stop", **told}


# ------------------------------------------------------------------------------ what is not ours

Words = Callable[[Path, Path, Path], tuple[str | Path, ...]]
COMMANDS: dict[str, Words] = {
    "annotate": lambda work, tiny, out: ("annotate", work / "answers.jsonl", out, "--tokenizer", tiny),
    "sample": lambda work, tiny, out: ("sample", work / "prompts.jsonl", out, "--model", tiny, "--max-tokens", "8"),
    "score": lambda work, tiny, out: (
        *("score", work / "sampled.jsonl", out, "--baseline", work / "baseline.jsonl"),
        *("--model", tiny, "--tokenizer", tiny),
    ),
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with something to work on for each command."""
    write(tmp_path / "answers.jsonl", *({"id": i, "prompt": f"p{i}", "response": LISTED} for i in range(3)))
    write(tmp_path / "prompts.jsonl", *({"id": i, "prompt": f"What of {i}?"} for i in range(3)))
    write(tmp_path / "sampled.jsonl", *(sampled(str(i), f"It is {i}.") for i in range(3)))
    write(tmp_path / "baseline.jsonl", *(sampled(str(i), "It is so.") for i in range(3)))
    return tmp_path


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_another_wrote_is_left_as_it_is(command: str, overwrite: tuple[str, ...], work: Path, tiny: Path) -> None:
    mine = work / "bench.json"
    for content, said in (
        (b'[{"id": 1, "prompt": "p"},\n {"id": 2, "prompt": "q"}]', "is a JSON list"),
        (b"my notes", "not a line of JSON"),
        (b"\x7fELF\xff\n", "not UTF-8"),
        ((work / "prompts.jsonl").read_bytes(), "is missing"),
        (b'{"pasta": {"format": 1, "command": "serve"}}\n', "written by pasta serve"),
    ):
        mine.write_bytes(content)
        complains(pasta(*COMMANDS[command](work, tiny, mine), *overwrite), 2, "bench.json", said)
        assert mine.read_bytes() == content
    (work / "folder").mkdir()
    complains(pasta(*COMMANDS[command](work, tiny, work / "folder"), *overwrite), 2, "is not a file")
    source = Path(COMMANDS[command](work, tiny, mine)[1])
    before = source.read_bytes()
    complains(pasta(*COMMANDS[command](work, tiny, source), *overwrite), 2, "give another file")
    assert source.read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_last_line_goes_only_if_it_does_not_parse(command: str, work: Path, tiny: Path) -> None:
    out = work / "out.jsonl"
    words = COMMANDS[command](work, tiny, out)
    assert pasta(*words).exit_code == 0
    whole = out.read_bytes()
    assert jsonl.header(out) is not None and len(rows(out)) == 3
    for cut in (1, 2, 30, len(whole.splitlines()[-1]) + 1, len(whole) - 5, len(whole)):
        out.write_bytes(whole[:-cut])
        result = pasta(*words)
        assert result.exit_code == 0, result.stderr
        assert out.read_bytes() == whole, cut
    out.write_bytes(whole[:-1])
    assert "3 were there" in pasta(*words).stderr


# ------------------------------------------------------------------------------ what another run made


def test_answers_of_another_adapter_are_not_these(tiny: Path, adapters: tuple[Path, Path], work: Path) -> None:
    out = work / "out.jsonl"
    words = ("sample", work / "prompts.jsonl", out, "--model", tiny, "--max-tokens", "8", "--adapter")
    assert pasta(*words, adapters[0]).exit_code == 0
    header, before = jsonl.header(out), out.read_bytes()
    assert header is not None and header["adapter"]["name"] == "first" and header["seed"] == 0
    assert str(work) not in before.decode()
    complains(pasta(*words, adapters[1]), 2, "adapter is first (", "asked for second (", "--overwrite")
    complains(pasta(*words, "none"), 2, "adapter is first (", "asked for none")
    complains(pasta(*words, adapters[0], "--seed", "7"), 2, "seed is 0, asked for 7")
    complains(pasta(*words[:-2], "9", "--adapter", adapters[0]), 2, "max_tokens is 8, asked for 9")
    moved = work / "moved"
    shutil.copytree(adapters[0], moved)
    assert "3 were there" in pasta(*words, moved).stderr
    assert out.read_bytes() == before
    write(work / "prompts.jsonl", *({"id": i, "prompt": f"And what of {i}?"} for i in range(3)))
    complains(pasta(*words, adapters[0]), 2, "another prompt with id '0'", "--overwrite")
    assert out.read_bytes() == before
    assert pasta(*words, adapters[1], "--overwrite").exit_code == 0
    assert [row["prompt"] for row in rows(out)] == [f"And what of {i}?" for i in range(3)]


def test_an_evaluation_knows_its_systems_by_their_contents(tiny: Path, adapters: tuple[Path, Path], work: Path) -> None:
    """`mine=A`, then `mine=B` into the same folder."""
    out = work / "eval"
    options = ("--prompts", work / "prompts.jsonl", "--baseline", "none", "--model", tiny, "--out", out)
    options += ("--max-tokens", "8", "--no-matched")
    first, second = (f"mine={adapter}" for adapter in adapters)
    result = pasta("eval", first, *options, "--scorer", "pmi")
    assert result.exit_code == 0, result.stderr
    mine = out / "answers" / "mine.jsonl"
    before, scores = mine.read_bytes(), (out / "scored" / "mine.pmi.jsonl").read_bytes()
    for more in ((), ("--from", "score", "--scorer", "pmi"), ("--from", "report")):
        complains(pasta("eval", second, *options, *more), 2, "mine.jsonl", "adapter is first (", "second (")
    complains(pasta("eval", f"{first}:off", *options), 2, 'method is "asynchronous", asked for "sequential"')
    complains(pasta("eval", f"{first}:overlap", *options), 2, 'positions is none, asked for "overlap"')
    complains(pasta("eval", first, *options, "--requests", "2"), 2, "requests is 1, asked for 2")
    assert (mine.read_bytes(), (out / "scored" / "mine.pmi.jsonl").read_bytes()) == (before, scores)
    moved = work / "elsewhere"
    shutil.copytree(adapters[0], moved)
    assert pasta("eval", f"mine={moved}", *options).stderr.startswith("0 answers, 6 were there\n")
    assert pasta("eval", "mine=/not/here", *options, "--from", "report").exit_code == 0
    result = pasta("eval", second, *options, "--overwrite", "--scorer", "pmi")
    assert result.exit_code == 0 and result.stderr.startswith("6 answers, 0 were there\n")
    assert mine.read_bytes() != before


def test_scores_of_other_answers_are_not_these(work: Path, tiny: Path) -> None:
    out = work / "out.jsonl"
    words = COMMANDS["score"](work, tiny, out)
    assert pasta(*words).exit_code == 0
    before = out.read_bytes()
    originals = {name: (work / name).read_bytes() for name in ("sampled.jsonl", "baseline.jsonl")}
    for name in originals:
        write(work / name, *(sampled(str(i), f"It is not {i}, I say.") for i in range(3)))
        complains(pasta(*words), 2, "line 2", "has changed", "--overwrite")
        (work / name).write_bytes(originals[name])
    assert pasta(*words).exit_code == 0
    assert out.read_bytes() == before
    answers = write(work / "a.jsonl", *({"id": i, "prompt": f"p{i}", "response": LISTED} for i in range(3)))
    target = work / "annotated.jsonl"
    assert pasta("annotate", answers, target, "--tokenizer", tiny).exit_code == 0
    before = target.read_bytes()
    write(answers, *({"id": i, "prompt": f"p{i}", "response": "Another."} for i in range(3)))
    complains(pasta("annotate", answers, target, "--tokenizer", tiny), 2, "another text for id '0'", "--overwrite")
    complains(
        pasta("annotate", answers, target, "--tokenizer", tiny, "--annotator", "apar"), 2, 'annotator is "structural"'
    )
    assert target.read_bytes() == before
    assert pasta("annotate", answers, target, "--tokenizer", tiny, "--overwrite").exit_code == 0
    assert {row["annotated"] for row in rows(target)} == {"Another."}


# ------------------------------------------------------------------------------ rows that cannot be used

GOOD = {"id": "good", "prompt": "What of it?", "response": LISTED}
BAD = {
    "half a character": '{"id": "bad", "prompt": "a \\ud83d", "response": "\\udc00"}',
    "a missing field": '{"id": "bad", "text": "x"}',
    "no JSON": '{"id": "bad", "prom',
    "a list": '["bad"]',
    "a number": '{"id": 1.5, "prompt": "x", "response": "x"}',
    "an empty conversation": '{"id": "bad", "messages": []}',
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_is_named_and_costs_no_other(name: str, work: Path, tiny: Path) -> None:
    source, out = work / "source.jsonl", work / "out"
    last = GOOD | {"id": "last"}
    source.write_bytes(f"{json.dumps(GOOD)}\n{BAD[name]}\n{json.dumps(last)}\n".encode())
    evaluated = ("eval", "off=none:off", "--prompts", source, "--baseline", "none", "--model", tiny, "--out", out)
    for words in (
        ("annotate", source, work / "annotated.jsonl", "--tokenizer", tiny),
        ("sample", source, work / "answers.out", "--model", tiny, "--max-tokens", "8"),
        (*evaluated, "--max-tokens", "8", "--no-matched"),
    ):
        result = pasta(*words)
        assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("pasta: "), result.stderr
        assert "source.jsonl, line 2: " in result.stderr
        result = pasta(*words, "--skip-bad")
        assert result.exit_code == 0, result.stderr
        assert result.stderr.count("pasta: left out: ") == 1 and "source.jsonl, line 2: " in result.stderr
    for path in (work / "annotated.jsonl", work / "answers.out", out / "answers" / "off.jsonl"):
        assert [row["id"] for row in rows(path)] == ["good", "last"]


def test_answers_that_cannot_be_scored_cost_no_other(work: Path, tiny: Path) -> None:
    with (work / "sampled.jsonl").open("a") as file:
        file.write(json.dumps(sampled("lonely", "It has no baseline.")) + "\n" + '{"id": "x"}\n')
    words = COMMANDS["score"](work, tiny, work / "out.jsonl")
    complains(pasta(*words), 2, "line 5: not an answer")
    result = pasta(*words, "--skip-bad")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("left out: ") == 2 and "no answer to prompt 'lonely'" in result.stderr
    assert [row["id"] for row in rows(work / "out.jsonl")] == ["0", "1", "2"]


def test_prompts_that_do_not_fit_are_named(work: Path, tiny: Path) -> None:
    source = write(work / "long.jsonl", {"id": "a", "prompt": "x " * 900}, {"id": "b", "prompt": " "}, GOOD)
    words = ("sample", source, work / "out.jsonl", "--model", tiny, "--max-tokens", "8", "--max-model-len", "128")
    result = pasta(*words)
    assert result.exit_code == 0
    assert "left out: prompt 'a'" in result.stderr and "left out: prompt 'b': the prompt is empty" in result.stderr
    assert [row["id"] for row in rows(work / "out.jsonl")] == ["good"]


# ------------------------------------------------------------------------------ forms


def test_an_input_is_asked_about_too_in_every_command(work: Path, tiny: Path) -> None:
    content = json.dumps([{"instruction": "Sort these.", "input": "b a", "output": LISTED}])
    plain, marked, packed = work / "a.json", work / "b.json", work / "c.json.gz"
    plain.write_text(content)
    marked.write_bytes(b"\xef\xbb\xbf" + content.encode())
    packed.write_bytes(gzip.compress(content.encode()))
    for source in (plain, marked, packed):
        out = work / f"{source.name}.out"
        told = ("--baseline", "none", "--model", tiny, "--max-tokens", "8", "--no-matched")
        for words in (
            ("annotate", source, f"{out}.annotated", "--tokenizer", tiny),
            ("sample", source, f"{out}.sampled", "--model", tiny, "--max-tokens", "8"),
            ("eval", "off=none:off", "--prompts", source, "--out", out, *told),
        ):
            result = pasta(*words)
            assert result.exit_code == 0, result.stderr
        for path in (Path(f"{out}.annotated"), Path(f"{out}.sampled"), out / "answers" / "off.jsonl"):
            assert [(row["id"], row["prompt"]) for row in rows(path)] == [("0", "Sort these.\n\nb a")]


# ------------------------------------------------------------------------------ what other verbs write


def test_no_other_output_takes_the_place_of_what_is_not_its_own(work: Path, tiny: Path) -> None:
    mine = work / "notes.txt"
    mine.write_text("my notes")
    asked = ("generate", "hello", "--model", tiny, "--max-tokens", "4")
    complains(pasta(*asked, "--trace", mine), 2, "notes.txt exists and is not a trace")
    complains(pasta("export", mine, "--model", tiny), 2, "notes.txt exists and is not a GGUF file")
    page = work / "site" / "index.html"
    page.parent.mkdir()
    page.write_text("my site")
    options = ("--prompts", work / "prompts.jsonl", "--baseline", "none", "--model", tiny, "--out", work / "out")
    compared = ("eval", "off=none:off", *options, "--max-tokens", "4", "--no-matched", "--report", page.parent)
    result = pasta(*compared)
    assert result.exit_code == 2 and "holds another index.html: give another --report" in result.stderr
    assert (mine.read_text(), page.read_text()) == ("my notes", "my site")
    for _ in range(2):
        assert pasta(*asked, "--trace", work / "trace.jsonl").exit_code == 0


@pytest.mark.parametrize("field", ["id", "prompt", "annotated", "source"])
def test_training_names_the_row_that_is_no_text(field: str, work: Path, tiny: Path) -> None:
    row = {"id": "1", "prompt": "p", "annotated": "x", "tokens": 9, "chunks": 0, "source": "s"}
    data = write(work / "data.jsonl", row, row | {field: "a \ud83d"})
    complains(pasta("train", "sft", data, "--out", work / "out", "--model", tiny), 2, "line 2", "surrogate")
