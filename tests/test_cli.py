"""The real command: what goes where, exit codes, one line for what the user got wrong, Ctrl-C, pipes.

In process where that tells the same; as a process of its own where signals and closed pipes matter.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pastalm.cli import app
from pastalm.core.events import Decoded, Finished, Forked
from pastalm.core.transcript import Transcript
from pastalm.engines.native import library
from pastalm.engines.transformers import engine as transformers
from pastalm.models import adapters, checkpoints
from pastalm.records.documents import parse, strip
from pastalm.records.traces import from_json, to_json
from tests.served import replaying

pytestmark = pytest.mark.usefixtures("own_cache")

TRACE = Path(__file__).parent / "data" / "trace.jsonl"
KEYS = {
    "text", "annotated", "tokens", "steps", "passes", "drafted", "accepted", "tokens_per_pass", "critical_path",
    "parallelism", "seconds", "finish_reason", "threads",
}  # fmt: skip
THREAD_KEYS = {
    "id", "parent", "topic", "promised_tokens", "tokens", "start_step", "end_step",
}  # fmt: skip


def pasta(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


@pytest.fixture
def template_less(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "template-less"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def complains(result: Result, code: int, *words: str) -> None:
    """One line on stderr that holds `words`, nothing on stdout, the exit code, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("pasta: ")
    assert all(word in result.stderr for word in words), result.stderr


# ------------------------------------------------------------------------------ bad input


def test_an_unknown_model(tmp_path: Path) -> None:
    complains(pasta("generate", "hello", "--model", tmp_path / "nowhere"), 2, "no model folder")


def test_bad_options_of_the_server(tmp_path: Path) -> None:
    complains(pasta("serve", "--timeout", 0), 2, "timeouts")
    complains(pasta("serve", "--host", "nowhere.invalid"), 2, "cannot listen", "--host")
    complains(pasta("serve", tmp_path / "nowhere", "--port", 0), 2, "no model folder")
    complains(pasta("serve", tmp_path / "nowhere.gguf", "--port", 0), 2, "no GGUF file")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    complains(pasta("generate", "hello", "--model", tmp_path), 2, "config.json")


def test_a_corrupt_model(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "corrupt")
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"\0\1 not weights")
    complains(pasta("generate", "hello", "--model", tmp_path / "corrupt"), 2, "cannot load")


def test_no_adapter_there(tiny: Path, tmp_path: Path) -> None:
    result = pasta("generate", "hello", "--model", tiny, "--adapter", tmp_path)
    complains(result, 2, "no adapter")


def test_a_corrupt_adapter(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0\1 not weights")
    (tmp_path / "pasta.json").write_text("{")
    result = pasta("generate", "hello", "--model", tiny, "--adapter", tmp_path)
    complains(result, 2, "not JSON")
    model, _ = checkpoints.read(tiny)
    adapters.write_card(tmp_path, {"base": "tiny", "shape": adapters.shape_of(model)})
    result = pasta("generate", "hello", "--model", tiny, "--adapter", tmp_path)
    complains(result, 2, "cannot read the adapter")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(prompt: str) -> None:
    complains(pasta("generate", prompt), 2, "empty")
    complains(pasta("generate", "-", stdin=prompt), 2, "empty")


@pytest.mark.parametrize(
    "option",
    [
        ("--max-tokens", "0"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--stop", ""),
        ("--parallelism", "-1"),
        ("--max-threads", "0"),
        ("--positions", "nowhere"),
    ],
)
def test_an_option_out_of_range(option: tuple[str, str]) -> None:
    complains(pasta("generate", "hello", *option), 2)


def test_serial_positions_are_not_for_this_engine(tiny: Path) -> None:
    complains(pasta("generate", "hello", "--model", tiny, "--positions", "serial"), 2, "serial")


def test_an_unknown_dtype(tiny: Path) -> None:
    complains(pasta("generate", "hello", "--model", tiny, "--dtype", "int3"), 2, "dtype")


def test_a_prompt_longer_than_the_context(tiny: Path) -> None:
    complains(pasta("generate", "-", "--model", tiny, stdin="many words " * 3000), 2, "2048")


def test_a_model_without_a_chat_template(template_less: Path) -> None:
    complains(pasta("generate", "hello", "--model", template_less), 2, "chat template", "--raw")
    result = pasta("generate", "hello", "--raw", "--model", template_less, "--max-tokens", "4")
    assert result.exit_code == 0


def test_a_prompt_that_is_no_text() -> None:
    complains(pasta("generate", "-", stdin=b"\xff\xfe"), 2, "UTF-8")


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    complains(pasta("generate", "hello", "--trace", tmp_path / "no" / "x.jsonl"), 2, "cannot write")


@pytest.mark.parametrize(
    "asked",
    [
        ("generate", "hi", "--raw", "--system", "Be kind."),
        ("generate", "hi", "--sequential", "--parallelism", "2"),
        ("generate", "hi", "--sequential", "--max-threads", "2"),
        ("generate", "hi", "--parallelism", "0", "--positions", "overlap"),
        ("generate", "hi", "--top-p", "0.9"),
        ("generate", "hi", "--temperature", "0", "--top-k", "9"),
        ("generate", "hi", "--min-p", "0.1"),
        ("chat", "--sequential", "--parallelism", "2"),
        ("generate", "hi", "--drafts", "off", "--reference", TRACE),
        ("generate", "hi", "--drafts", "lookup,answers", "--reference", TRACE),
        ("generate", "hi", "--drafts", "references"),
        ("chat", "--drafts", "off", "--reference", TRACE),
        ("sample", "a", "b", "--drafts", "references"),
        ("replay", TRACE, "--json", "--speed", "2"),
        ("serve", "--base-url", "http://127.0.0.1:9/v1", "--max-model-len", "99"),
        ("annotate", "a", "b", "--base-url", "http://127.0.0.1:9/v1"),
        ("annotate", "a", "b", "--annotator", "apar", "--model", "m"),
        ("annotate", "a", "b", "--max-tokens", "9"),
        ("sample", "a", "b", "--top-p", "0.5"),
        ("score", "a", "b", "--baseline", "c", "--concurrency", "2"),
        ("score", "a", "b", "--baseline", "c", "--scorer", "judge", "--adapter", "e"),
        ("eval", "m=none", "--prompts", "a", "--baseline", "none", "--out", "b", "--judge", "x"),
        ("eval", "m=none", "--prompts", "a", "--baseline", "none", "--out", "b", "--timed", "3"),
        ("train", "sft", "a", "--out", "b", "--full", "--lora-rank", "4"),
    ],
    ids=lambda asked: " ".join(map(str, asked)).replace(str(TRACE), "TRACE"),
)
def test_an_option_that_would_do_nothing_is_refused(asked: tuple[str | Path, ...]) -> None:
    complains(pasta(*asked), 2, "does nothing")


@pytest.mark.parametrize("option", [("--base-url", "http://x/v1"), ("--tokenizer", "x"), ("--prompted",)])
def test_a_replay_asks_no_model(option: tuple[str, ...]) -> None:
    complains(pasta("replay", TRACE, *option), 2, option[0], "pasta replay --help")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("generate",), "prompt"),
        (("generate", "hi", "--nonsense"), "--nonsense"),
        (("generate", "hi", "--seed", "x"), "--seed"),
        (("serve", "--port", "70000"), "--port"),
        (("nonsense",), "nonsense"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line(asked: tuple[str, ...], said: str) -> None:
    complains(pasta(*asked), 2, said, "--help")


def test_no_verb_shows_the_help_and_help_is_no_failure() -> None:
    assert (nothing := pasta()).exit_code == 2 and "Commands:" in nothing.stderr
    assert (asked := pasta("--help")).exit_code == 0 and "Commands:" in asked.stdout


# ------------------------------------------------------------------------------ answers


def test_json_text_and_trace_tell_the_same(tiny: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    asked = ["generate", "Five tips", "--model", str(tiny), "--dtype", "float32"]
    asked += ["--parallelism", "1e6", "--temperature", "1", "--seed", "3", "--max-tokens", "200"]
    result = pasta(*asked, "--json", "--trace", trace)
    assert result.exit_code == 0 and result.stderr == ""
    answer = json.loads(result.stdout)
    assert set(answer) == KEYS
    assert all(set(thread) == THREAD_KEYS for thread in answer["threads"])
    assert len(answer["threads"]) > 1, "it never forked"
    assert answer["tokens"] == sum(thread["tokens"] for thread in answer["threads"]) <= 200
    assert strip(parse(answer["annotated"])) == answer["text"]
    replayed = json.loads(pasta("replay", trace, "--json").stdout)
    assert replayed == answer
    plain = pasta(*asked)
    assert plain.stdout.rstrip("\n") == answer["text"].rstrip("\n")


def test_sequential_makes_no_chunk(tiny: Path) -> None:
    asked = ("--model", tiny, "--sequential", "--json", "--max-tokens", "40")
    answer = json.loads(pasta("generate", "Five tips", *asked).stdout)
    assert len(answer["threads"]) == 1 and answer["annotated"] == answer["text"]
    assert answer["parallelism"] == 1


def test_a_chat_goes_on_until_its_input_ends(tiny: Path) -> None:
    asked = ("chat", "--model", tiny, "--max-tokens", "6")
    result = pasta(*asked, stdin="one\ntwo\n")
    assert result.exit_code == 0
    assert result.stderr.count("tokens/s") == 2


@pytest.mark.parametrize(
    "asked",
    [
        ("generate", "hi"),
        ("chat",),
        ("demo",),
        ("serve",),
        ("sample", "a", "b"),
    ],
    ids=lambda asked: asked[0],
)
@pytest.mark.parametrize("names", ["jacobi", "lookup,", "lookup lookup", "auto,off", ""])
def test_names_of_no_drafter_are_one_line_everywhere(asked: tuple[str, ...], names: str) -> None:
    complains(pasta(*asked, "--drafts", names), 2, "drafts must be auto, off, or some of")


@pytest.mark.parametrize("asked", [("generate", "hi"), ("chat",), ("sample", "a", "b")], ids=lambda asked: asked[0])
def test_references_that_cannot_be_read_are_one_line(asked: tuple[str, ...], tmp_path: Path) -> None:
    complains(pasta(*asked, "--reference", tmp_path / "nowhere"), 2, f"cannot read {tmp_path / 'nowhere'}")
    (tmp_path / "bytes").write_bytes(b"caf\xe9")
    complains(pasta(*asked, "--reference", tmp_path / "bytes"), 2, "is not UTF-8")
    complains(pasta(*asked, "--references", tmp_path / "bytes"), 2, "--references", "--help")


def test_drafts_change_no_answer_and_are_counted(tiny: Path, tmp_path: Path) -> None:
    """What was said before is given as a reference, so that all of it could be copied."""
    asked = ("generate", "Five tips", "--model", tiny, "--dtype", "float32", "--max-tokens", "60", "--sequential")
    off = json.loads(pasta(*asked, "--drafts", "off", "--json").stdout)
    assert (off["drafted"], off["accepted"], off["passes"]) == ({}, {}, off["steps"])
    (tmp_path / "said").write_text(off["text"])
    trace = tmp_path / "trace"
    given = ("--reference", tmp_path / "said", "--drafts", "references,lookup", "--trace", trace)
    result = pasta(*asked, *given, "--json")
    on = json.loads(result.stdout)
    assert on["text"] == off["text"] and on["tokens"] == off["tokens"]
    assert set(on["drafted"]) <= {"references", "lookup"} and set(on["accepted"]) <= set(on["drafted"])
    assert on["passes"] == on["steps"] - sum(on["accepted"].values())
    drafted = [json.loads(line).get("drafted", []) for line in trace.read_text().splitlines()]
    assert sum(map(len, drafted)) == sum(on["drafted"].values())


def process(
    *arguments: str | Path, stdin: int | None = None, stdout: int = subprocess.PIPE, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pastalm.cli", *map(str, arguments)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
    )


@pytest.fixture
def answering(tiny: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of an answer: greedy, the model repeats its last token up to a limit far away."""
    endless = shutil.copytree(tiny, tmp_path / "endless")
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    asked = ("--model", endless, "--raw", "--max-tokens", "4000", "--sequential", "--drafts", "off")
    running = process("generate", "hello", *asked)
    assert running.stdout is not None
    assert select.select([running.stdout], [], [], 200)[0], "it wrote nothing"
    yield running
    running.kill()
    running.wait()


def test_ctrl_c_prints_what_is_there(answering: subprocess.Popen[bytes]) -> None:
    answering.send_signal(signal.SIGINT)
    out, err = answering.communicate(timeout=100)
    assert answering.returncode == 130, err
    assert out
    lines = err.decode().splitlines()
    assert len(lines) == 2 and "stopped" in lines[0] and "interrupted" in lines[1]


@pytest.mark.parametrize("asked", ["generate", "json", "replay", "parse", "env"])
def test_a_closed_stdout_ends_it_in_one_line(tiny: Path, asked: str) -> None:
    """Nobody ever reads from it, so that the first write fails, however fast the answer is."""
    model = ("generate", "hello", "--model", tiny, "--raw", "--max-tokens", "8", "--sequential")
    arguments: dict[str, tuple[str | Path, ...]] = {
        "generate": model,
        "json": (*model, "--json"),
        "replay": ("replay", TRACE),
        "parse": ("parse", TRACE, "--render"),
        "env": ("env",),
    }
    reading, writing = os.pipe()
    os.close(reading)
    running = process(*arguments[asked], stdout=writing)
    os.close(writing)
    _, err = running.communicate(timeout=100)
    assert running.returncode == 1
    assert err == b"pasta: stdout was closed before the end\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("asked", [("replay", TRACE), ("replay", TRACE, "--json")], ids=["text", "json"])
def test_a_stdout_that_takes_no_more_is_one_line(asked: tuple[str | Path, ...]) -> None:
    with open("/dev/full", "wb") as full:
        running = process(*asked, stdout=full.fileno())
        _, err = running.communicate(timeout=100)
    assert running.returncode == 1
    assert err.decode().splitlines() == ["pasta: cannot write: No space left on device"]


# ------------------------------------------------------------------------------ text that is none, and stdouts


HALF = "caf\udce9"
"""What Python makes of the argument `caf\xe9`."""


@pytest.mark.parametrize(
    "asked",
    [
        ("generate", HALF),
        ("generate", "--raw", HALF),
        ("generate", "hello", "--system", HALF),
        ("generate", "hello", "--stop", "x", "--stop", HALF),
        ("generate", "hello", "--model", HALF),
        ("generate", "hello", "--base-url", f"http://{HALF}/v1"),
        ("chat", "--system", HALF),
        ("demo", "--prompt", HALF),
        ("serve", "--name", HALF),
        ("serve", "--api-key", HALF),
        ("pull", HALF),
        ("eval", f"mine={HALF}", "--prompts", "x", "--baseline", "none", "--out", "y"),
    ],
    ids=" ".join,
)
def test_an_argument_that_is_no_text_is_one_line(asked: tuple[str, ...]) -> None:
    complains(pasta(*asked), 2, "not UTF-8", "0xe9")


def test_half_a_character_in_an_argument_is_one_line() -> None:
    complains(pasta("generate", "a \ud83d"), 2, "contains a lone surrogate", "U+D83D")


def test_bytes_that_are_no_text_on_the_real_command_line(tiny: Path) -> None:
    command = [sys.executable, "-m", "pastalm.cli", "generate", b"caf\xe9", "--model", str(tiny)]
    done = subprocess.run(command, capture_output=True, timeout=100, check=False)
    assert done.returncode == 2 and done.stdout == b""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(b"pasta: ") and b"UTF-8" in done.stderr


def test_lines_of_a_chat_that_are_no_text(tiny: Path) -> None:
    asked = ("chat", "--model", tiny, "--max-tokens", "4")
    complains(pasta(*asked, stdin=b"caf\xe9\n"), 2, "UTF-8")
    running = process(*asked, stdin=subprocess.PIPE, env={"PYTHONIOENCODING": "utf-8:surrogateescape"})
    out, err = running.communicate(b"caf\xe9\n", timeout=100)
    assert (running.returncode, out) == (2, b"")
    assert len(err.splitlines()) == 1 and b"not UTF-8" in err


def foreign(tmp_path: Path) -> Path:
    """A trace of an answer that most encodings cannot write."""
    events = (
        Forked(path=()),
        Decoded(path=(), token=1, text="caf\xe9 \u2014 \u6f22 \U0001f35d"),
        Finished(path=()),
    )
    path = tmp_path / "foreign.jsonl"
    path.write_text("".join(to_json(event) + "\n" for event in events), encoding="utf-8")
    return path


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "ascii:strict", "latin-1", "cp437"])
def test_an_answer_is_not_lost_on_a_stdout_that_cannot_write_it(tmp_path: Path, encoding: str) -> None:
    trace = foreign(tmp_path)
    answer = Transcript(map(from_json, trace.read_text(encoding="utf-8").splitlines())).text
    running = process("replay", trace, env={"PYTHONIOENCODING": encoding})
    out, _ = running.communicate(timeout=100)
    assert running.returncode == 0
    assert out.decode("ascii").strip() if encoding.startswith("ascii") else out
    written = out.decode(encoding.partition(":")[0]).rstrip("\r\n")
    assert "\\u6f22 \\U0001f35d" in written
    assert re.sub(r"\\(?:x..|u.{4}|U.{8})", lambda m: m[0].encode().decode("unicode_escape"), written) == answer
    running = process("replay", trace, "--json", env={"PYTHONIOENCODING": encoding})
    out, _ = running.communicate(timeout=100)
    assert running.returncode == 0
    assert json.loads(out.decode(encoding.partition(":")[0]))["text"] == answer


@pytest.mark.parametrize("form", [(), ("--strip",), ("--render",)], ids=["json", "strip", "render"])
def test_a_parsed_document_is_not_lost_either(tmp_path: Path, form: tuple[str, ...]) -> None:
    source = tmp_path / "document.txt"
    source.write_text("caf\xe9 \u6f22", encoding="utf-8")
    running = process("parse", source, *form, env={"PYTHONIOENCODING": "ascii"})
    out, err = running.communicate(timeout=100)
    assert (running.returncode, err) == (0, b"")
    assert b"\\u6f22" in out


# ------------------------------------------------------------------------------ without a model


def test_replay_gives_the_text() -> None:
    result = pasta("replay", TRACE)
    assert result.exit_code == 0
    events = [from_json(line) for line in TRACE.read_text().splitlines()]
    assert result.stdout.rstrip("\n") == Transcript(events).text.rstrip("\n")
    assert "tokens/s" in result.stderr


def test_replay_of_what_is_no_trace(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    complains(pasta("replay", tmp_path / "none"), 2, "cannot read")
    for content in ("nonsense\n", '{"kind": "decoded", "path": [1], "token": 1}\n'):
        bad.write_text(content)
        complains(pasta("replay", bad), 2, "line 1")
    bad.write_text("\n")
    complains(pasta("replay", bad), 2, "no events")
    complains(pasta("replay", TRACE, "--speed", "0"), 2, "speed")


DOCUMENT = 'Two.<promise topic="a b" tokens="20"/><async>1 é</async><sync/>End.'


def test_parse_speaks_json_text_and_its_own_form() -> None:
    values = json.loads(pasta("parse", stdin=DOCUMENT).stdout)
    assert values == [
        {"type": "text", "text": "Two."},
        {"type": "promise", "topic": "a b", "tokens": 20},
        {"type": "async", "body": [{"type": "text", "text": "1 é"}]},
        {"type": "sync"},
        {"type": "text", "text": "End."},
    ]
    assert pasta("parse", "--strip", stdin=DOCUMENT).stdout == "Two.1 éEnd."
    assert pasta("parse", "--render", stdin=DOCUMENT).stdout == DOCUMENT


def test_parse_says_where_the_error_is(tmp_path: Path) -> None:
    complains(pasta("parse", stdin="x<async>"), 1, "at character 1")
    complains(pasta("parse", tmp_path / "none"), 2, "cannot read")


def test_env_says_what_works() -> None:
    facts = json.loads(pasta("env", "--json").stdout)
    assert facts["engines"]["transformers"] == f"works: {transformers.CAPABILITIES}"
    assert "positions promised, overlap" in facts["engines"]["scripted"]
    assert facts["engines"]["native"].startswith(library.unavailable() or "works: Llama")
    assert facts["engines"]["llama.cpp"].startswith(("works: GGUF", "pip install"))
    assert facts["python"] == sys.version.split()[0]
    assert "transformers" in pasta("env").stdout


def test_annotate_and_pull(tiny: Path, tmp_path: Path) -> None:
    tips = "".join(f"{i}. **Tip {w}**: {'do it every day and do it well, ' * 5}\n" for i, w in
                   enumerate(("sleep", "food", "water"), 1))  # fmt: skip
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"id": "a", "prompt": "Three tips?", "response": tips}) + "\n")
    result = pasta("annotate", source, target, "--tokenizer", tiny)
    assert result.exit_code == 0, result.output
    assert "1 written" in result.stderr
    assert len(target.read_text().splitlines()) == 2
    complains(pasta("annotate", tmp_path / "none", target), 2, "no file")
    assert pasta("pull", tiny).stdout.strip() == str(tiny)


def test_training_needs_data(tmp_path: Path) -> None:
    result = pasta("train", "sft", tmp_path / "none", "--out", tmp_path / "out")
    complains(result, 2, "pasta annotate")


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sampled(identity: str, choice: int, text: str) -> dict[str, object]:
    """An answer as pasta sample writes it."""
    return {
        "id": identity,
        "choice": choice,
        "prompt": f"What of {identity}?",
        "sequential": False,
        "annotated": text,
        "tokens": len(text) // 3,
        "critical_path": len(text) // 4,
        "finish_reason": "stop",
    }


def test_asking_a_server_needs_its_name(tmp_path: Path) -> None:
    rows, out = write(tmp_path / "in.jsonl", {"id": "a", "prompt": "p", "response": "r"}), tmp_path / "out"
    complains(pasta("annotate", rows, out, "--annotator", "openai"), 2, "--base-url", "--model")
    complains(pasta("annotate", rows, out, "--annotator", "magic"), 2, "unknown annotator")
    with replaying(lambda _: (401, {}, {"error": {"message": "bad key"}})) as url:
        asked = pasta("annotate", rows, out, "--annotator", "openai", "--base-url", url, "--model", "m")
    assert asked.exit_code == 1
    assert asked.stderr.splitlines()[-1].startswith(f"pasta: {url} answers 401: ")
    assert "bad key" in asked.stderr
    assert not out.exists() or len(out.read_text().splitlines()) == 1, "its header, and no row"


def test_systems_are_compared_in_a_page(tiny: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", *({"index": i, "instruction": f"What of {i}?"} for i in range(3)))
    out = tmp_path / "out"
    options = ("--prompts", prompts, "--baseline", "none", "--model", tiny, "--out", out, "--max-tokens", "16")
    result = pasta("eval", "own=none", "lookup", *options, "--scorer", "pmi", "--limit", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("6 answers, 0 were there\n")
    assert [line.split(" | ")[0] for line in result.stdout.splitlines()[2:]] == ["| baseline", "| own", "| lookup"]
    result = pasta("eval", "own=none", "lookup", *options, "--scorer", "pmi", "--sigma", "pmi=20", "--public")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("3 answers, 6 were there\n")
    assert result.stdout.splitlines()[2].startswith("| baseline | 3 |")
    page = out / "report" / "index.html"
    assert result.stderr.splitlines()[-1] == str(page) and "What of" not in page.read_text()
    assert json.loads((page.parent / "figures.json").read_text())["sigmas"] == {"pmi": 20}
    complains(pasta("eval", "mine", *options), 2, "unknown system 'mine'", "NAME=ADAPTER")
    complains(pasta("eval", "mine=none+most", *options), 2, "unknown drafts 'most'", "+drafts", "+lookup")
    complains(pasta("eval", "own=none+lookup", *options), 2, "drafts lookup", "--overwrite")
    complains(pasta("eval", "own=none", *options, "--scorer", "best"), 2, "unknown scorer")
    complains(pasta("eval", "own=none", *options, "--scorer", "judge"), 2, "--base-url", "--judge")
    complains(pasta("eval", "own=none", *options, "--sigma", "pmi=small"), 2, "SCORER=UNIT")
    complains(pasta("eval", "own=none", *options, "--from", "here"), 2, "decode, score or report")
    (out / "scored" / "own.pmi.jsonl").unlink()
    again = pasta("eval", "own=none", "lookup", *options, "--scorer", "pmi", "--from", "report")
    assert again.exit_code == 0, again.stderr
    systems = json.loads((page.parent / "figures.json").read_text())["systems"]
    assert [name for name, told in systems.items() if "quality, pmi" in told["figures"]] == ["baseline", "lookup"]
    labels = write(tmp_path / "labels.jsonl", {"id": 0, "label": "one"}, {"id": 2, "label": "should"})
    told = pasta("eval", "own=none", *options, "--labels", labels, "--from", "report")
    assert "| forks, one | forks, should |" in told.stdout and told.exit_code == 0, told.stderr
    write(labels, {"id": 7, "label": "one"})
    complains(pasta("eval", "own=none", *options, "--labels", labels, "--from", "report"), 2, "labels none of")
    options = ("--prompts", tmp_path / "none", *options[2:])
    complains(pasta("eval", "own=none", *options), 2, "cannot read")


def test_some_prompts_are_timed_alone_and_the_others_answered_together(tiny: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", *({"index": i, "instruction": f"What of {i}?"} for i in range(5)))
    out = tmp_path / "out"
    options = ("--prompts", prompts, "--baseline", "none", "--model", tiny, "--out", out, "--max-tokens", "8")
    options += ("--engine", "transformers")
    for written in (15, 0):
        result = pasta("eval", "own=none:overlap+drafts", "lookup", *options, "--requests", "3", "--timed", "2")
        assert result.exit_code == 0, result.stderr
        assert result.stderr.splitlines()[0] == f"{written} answers, {15 - written} were there"
    answers = out / "answers" / "lookup.jsonl"
    kept = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(kept[:5]))
    more = ("--requests", "3", "--timed", "2", "--from", "score")
    result = pasta("eval", "own=none:overlap+drafts", "lookup", *options, *more)
    assert result.exit_code == 0, result.stderr
    systems = json.loads((out / "report" / "figures.json").read_text())["systems"]
    counts = {name: found["figures"]["theoretical"]["n"] for name, found in systems.items()}
    assert counts == {"baseline": 5, "own": 5, "lookup": 4}, "what is missing is left out, nothing is decoded"
    for system in ("own", "lookup"):
        assert systems[system]["figures"]["realized, matched"]["n"] == 2
        assert [row["id"] for row in systems[system]["prompts"] if row["seconds"] is not None] == ["0", "2"]


def test_answers_are_scored_and_a_round_is_trained_on_them(tiny: Path, tmp_path: Path) -> None:
    """The way of stage 2 on a command line: sample is given; score, prefer; the adapter answers."""
    texts = ("It is a plain thing to say.", "Nothing nothing nothing nothing nothing nothing.", "No.")
    rows = [sampled(f"p{i}", c, f"{text} {i}") for i in range(4) for c, text in enumerate(texts)]
    samples = write(tmp_path / "samples.jsonl", *rows)
    baseline = write(tmp_path / "base.jsonl", *(sampled(f"p{i}", 0, f"It is plain. {i}") for i in range(4)))
    target = tmp_path / "scored.jsonl"
    options = ("--baseline", baseline, "--model", tiny, "--tokenizer", tiny)
    first = pasta("score", samples, target, *options, "--limit", "2")
    assert first.exit_code == 0, first.stderr
    result = pasta("score", samples, target, *options)
    assert result.exit_code == 0, result.stderr
    assert "6 answers scored, 6 were there" in result.stderr
    table = json.loads(result.stdout)
    assert table["answers"] == 12 and table["sigma"] > 0 and 0 < table["quality"] < 1
    complains(pasta("score", samples, target, *options, "--scorer", "reference"), 2, "--references")
    complains(pasta("score", samples, target, *options, "--scorer", "best"), 2, "unknown scorer")
    complains(pasta("score", samples, target, "--baseline", tmp_path / "none"), 2, "no file")
    lost = write(tmp_path / "lost.jsonl", sampled("p0", 0, "x"))
    options = ("--baseline", lost, "--model", tiny, "--tokenizer", tiny)
    assert "no answer to prompt 'p1'" in pasta("score", samples, tmp_path / "s2", *options).stderr
    out = tmp_path / "round"
    round_ = ("train", "prefer", target, "--out", out, "--model", tiny)
    complains(pasta(*round_, "--start", tmp_path / "none"), 2, "none")
    complains(pasta(*round_, "--start", tiny, "--length", "long"), 2, "unknown length")
    complains(pasta(*round_, "--start", tiny, "--positions", "somewhere"), 2, "cannot read positions")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_one_clear_line_and_what_is_written_is_whole(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        rows = write(
            tmp_path / "in.jsonl",
            *({"id": str(i), "prompt": "p", "response": f"{i} " + "word " * 400} for i in range(60)),
        )
        result = pasta("annotate", rows, small / "out.jsonl")
        complains(result, 2, "cannot write", "No space left", "run again to resume")
        lines = (small / "out.jsonl").read_text().splitlines()[1:]
        assert 0 < len(lines) < 60
        assert [json.loads(line)["id"] for line in lines] == [str(i) for i in range(len(lines))]
        subprocess.run(["mount", "-o", "remount,size=10m", small], check=True)
        assert pasta("annotate", rows, small / "out.jsonl").exit_code == 0
        assert len((small / "out.jsonl").read_text().splitlines()) == 61
    finally:
        subprocess.run(["umount", small], check=True)
