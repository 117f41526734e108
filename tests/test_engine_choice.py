"""Which engine runs a model, what says so where it is another than one would think, and what a start imports."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
import tomllib
import weakref
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pastalm import LLM, SamplingParams, engine_choice
from pastalm.cli import app
from pastalm.core.events import Finished
from pastalm.engine_choice import Options
from pastalm.engines import registry
from pastalm.engines.native import library
from pastalm.errors import CapabilityError, ModelError, PastaError, RequestError
from pastalm.models import checkpoints, loading, preparing
from tests.test_models import BYTE_LEVEL, byte_level, small_model

pytestmark = pytest.mark.usefixtures("own_cache")
native = pytest.mark.skipif(bool(library.unavailable()), reason=library.unavailable())
PARAMS = SamplingParams(temperature=0, max_tokens=12)
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model with the tag tokens."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = small_model(len(BYTE_LEVEL)), byte_level()
    preparing.prepare(model, tokenizer)
    model.generation_config.eos_token_id = 1
    checkpoints.save(model, tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of a kind that the native engine does not run."""
    path = tmp_path_factory.mktemp("odd")
    model = small_model(len(BYTE_LEVEL))
    model.config.mlp_bias = True
    checkpoints.save(type(model)(model.config), BYTE_LEVEL, path)
    return str(path)


@pytest.fixture(scope="module")
def gguf(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    gguf_files = pytest.importorskip("pastalm.models.gguf_files")
    loaded = loading.load(folder, adapter=None, dtype="float32")
    return str(gguf_files.export(loaded, tmp_path_factory.mktemp("gguf") / "small.gguf", "F32"))


def engine_of(llm: LLM) -> str:
    return llm.driver.engine.capabilities.name


# ------------------------------------------------------------------------------ the choice

AUTO: list[tuple[str, dict[str, Any], str]] = [
    ("folder", {}, "native"),
    ("folder", {"dtype": "q4_0"}, "native"),
    ("folder", {"dtype": "bfloat16"}, "native"),
    ("folder", {"dtype": "float32"}, "native"),
    ("folder", {"dtype": "float16"}, "transformers"),
    ("folder", {"dtype": "float64"}, "transformers"),
    ("folder", {"compiled": True}, "transformers"),
    ("folder", {"device": "cuda"}, "transformers"),
    ("folder", {"engine": "native", "dtype": "float16"}, "native"),
    ("folder", {"engine": "transformers"}, "transformers"),
    ("file.gguf", {}, "native"),
    ("file.gguf", {"device": "cuda"}, "llama.cpp"),
    ("file.gguf", {"engine": "llama.cpp"}, "llama.cpp"),
    ("file.gguf", {"engine": "native"}, "native"),
]


@pytest.mark.parametrize(("model", "options", "chosen"), AUTO, ids=str)
def test_the_choice(model: str, options: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def loader(name: str) -> Any:
        return lambda *_: asked.append(name)

    monkeypatch.setattr(engine_choice, "_LOADERS", {name: loader(name) for name in engine_choice.ENGINES[1:]})
    engine_choice.load(model, Options(**options))
    assert asked == [chosen]


REFUSED: list[tuple[str, dict[str, Any], type[PastaError], str]] = [
    ("folder", {"engine": "vllm"}, RequestError, "auto, native, transformers, llama.cpp"),
    ("folder", {"dtype": "int3"}, RequestError, "auto, q8_0, q4_0, bfloat16, float16, float32, float64"),
    ("file.gguf", {"dtype": "q4_0"}, RequestError, "has its adapter merged and its weight type fixed"),
    ("file.gguf", {"adapter": "somewhere"}, RequestError, "has its adapter merged and its weight type fixed"),
    ("file.gguf", {"engine": "transformers"}, CapabilityError, "native or llama.cpp"),
    ("file.gguf", {"engine": "llama.cpp", "compiled": True}, CapabilityError, "has no compiled=True"),
    ("folder", {"engine": "llama.cpp"}, CapabilityError, "pasta export"),
    ("folder", {"engine": "native", "device": "cuda"}, CapabilityError, "on CPUs, not on cuda"),
    ("folder", {"engine": "native", "dtype": "float64"}, CapabilityError, "no float64"),
    ("folder", {"engine": "native", "compiled": True}, CapabilityError, "has no compiled=True"),
    ("folder", {"engine": "transformers", "dtype": "q8_0"}, CapabilityError, "for the native engine"),
    ("folder", {"device": "cuda", "dtype": "q4_0"}, CapabilityError, "for the native engine"),
]


@pytest.mark.parametrize(("model", "options", "kind", "said"), REFUSED, ids=str)
def test_what_cannot_be_is_a_line(model: str, options: dict[str, Any], kind: type[PastaError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        LLM(model, **options)
    assert "\n" not in str(caught.value)


@native
def test_a_model_that_it_cannot_run_goes_to_transformers(
    odd: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(odd) as llm:
        assert engine_of(llm) == "transformers"
        assert llm.chat(HELLO, PARAMS)[0].outputs[0].token_ids
    (record,) = (r for r in caplog.records if r.name == "pastalm")
    assert record.levelno == logging.WARNING
    assert "its MLP has biases" in record.message and "transformers" in record.message
    assert "\n" not in record.message
    monkeypatch.setattr(checkpoints, "read", lambda *_, **__: pytest.fail("weights are read to be refused"))
    for refused in ({"engine": "native"}, {"dtype": "q4_0"}):
        with pytest.raises(CapabilityError, match="its MLP has biases"):
            LLM(odd, **refused)


def test_without_the_library_everything_works(
    folder: str, gguf: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASTALM_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", lambda: (None, "it was not built"))
    with pytest.raises(CapabilityError, match="it was not built"):
        LLM(folder, engine="native")
    with LLM(folder) as llm:
        assert engine_of(llm) == "transformers"
    pytest.importorskip("llama_cpp")
    with LLM(gguf) as llm:
        assert engine_of(llm) == "llama.cpp"
        assert llm.chat(HELLO, PARAMS)[0].outputs[0].token_ids
    said = [r.message for r in caplog.records if r.name == "pastalm"]
    assert [("it was not built" in line, line.split()[-3]) for line in said] == [
        (True, "transformers"),
        (True, "llama.cpp"),
    ]
    assert not list(tmp_path.rglob("*.packed")), "nothing is packed for what is not there"


@native
def test_weights_are_of_the_type_that_is_asked_for(folder: str) -> None:
    wanted = {"q8_0": "Q8_0", "q4_0": "Q4_0", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    sizes = {}
    for dtype, kind in wanted.items():
        with LLM(folder, engine="native", dtype=dtype) as llm:
            assert llm.loaded.model.tensors["0.down"].type == kind
            sizes[dtype] = llm.driver.engine._pool.slot_bytes  # type: ignore[attr-defined]
            assert llm.chat(HELLO, PARAMS)[0].outputs[0].token_ids
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 2 * sizes["q8_0"]


@native
def test_both_engines_say_the_same(folder: str, gguf: str) -> None:
    """The weights, and what goes with them, are those of the model; also out of a GGUF file."""
    params = SamplingParams(n=2, temperature=1, seed=5, max_tokens=60, stop="zz", logprobs=1, parallelism=100)
    texts = {}
    for engine in ("native", "transformers"):
        with LLM(folder, engine=engine, dtype="float32") as llm:
            assert engine_of(llm) == engine
            (output,) = llm.chat(HELLO, params)
            texts[engine] = [(one.text, one.token_ids) for one in output.outputs]
            assert any(len(one.transcript.threads) > 1 for one in output.outputs), "nothing forked"
    assert texts["native"] == texts["transformers"]
    with LLM(gguf) as llm:
        assert engine_of(llm) == "native"
        (output,) = llm.chat(HELLO, params)
        assert output.prompt_token_ids and output.outputs[0].text


# ------------------------------------------------------------------------------ packing


@native
def test_a_model_is_packed_once_and_that_is_said(
    folder: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASTALM_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, "pastalm")
    for _ in range(2):
        LLM(folder, dtype="q4_0").close()
    packing = [r.message for r in caplog.records if "packing" in r.message]
    assert len(packing) == 1 and folder in packing[0]


@native
def test_packing_needs_transformers_and_says_so(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PASTALM_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"not packed .*transformers is missing: pip install 'pastalm.transformers.'"):
        LLM(folder)


START = """
import sys
{what}
heavy = {{"torch", "transformers", "peft", "llama_cpp"}} & set(sys.modules)
print("heavy", sorted(heavy))
"""
COMMAND = """
from pastalm.cli import app
try:
    app({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
"""
SERVED = """
import json, os, signal, threading, urllib.request
from pastalm.server import app as served
real = served.serve

def serve(llm, settings, listening):
    def ask():
        body = {"model": settings.name, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 9}
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        print(urllib.request.urlopen(request).read().decode())
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=ask).start()
    real(llm, settings, listening)

served.serve = serve
"""
PLUGIN = """
from pastalm.llm_plugin import Pasta
print(Pasta().prompt("Hello?", model={folder!r}, max_tokens=9, temperature=1).text())
"""
SAMPLED = ("--temperature", "1", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.1", "--stop", "zz")


@native
@pytest.mark.parametrize("verb", ["generate", "sampled", "gguf", "chat", "demo", "serve", "llm"])
def test_a_start_of_a_packed_model_imports_neither_torch_nor_transformers(
    verb: str, folder: str, request: pytest.FixtureRequest
) -> None:
    if verb == "llm":
        pytest.importorskip("llm")
    model = request.getfixturevalue("gguf") if verb == "gguf" else folder
    LLM(model).close()
    asked = {
        "generate": ["generate", "Hello?", "--model", model, "--max-tokens", "9"],
        "sampled": ["generate", "Hello?", "--model", model, "--max-tokens", "40", *SAMPLED],
        "gguf": ["generate", "Hello?", "--model", model, "--max-tokens", "9"],
        "chat": ["chat", "--model", model, "--max-tokens", "9"],
        "demo": ["demo", "--model", model, "--max-tokens", "20"],
        "serve": ["serve", model, "--port", "0"],
    }
    what = PLUGIN.format(folder=model) if verb == "llm" else COMMAND.format(arguments=asked[verb])
    what = SERVED + what if verb == "serve" else what
    done = subprocess.run(
        [sys.executable, "-c", START.format(what=what)],
        input="One?\nTwo?\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy []"
    assert len(done.stdout.splitlines()) > 1, "it said nothing"
    assert "pasta: " not in done.stderr, "another engine ran it"


# ------------------------------------------------------------------------------ the command line


def pasta(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def complains(result: Result, *words: str) -> None:
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_an_engine_is_chosen_by_name(folder: str) -> None:
    asked = ("generate", "Hello?", "--model", folder, "--max-tokens", "9", "--engine")
    assert pasta(*asked, "transformers").exit_code == 0
    complains(pasta(*asked, "best"), "unknown engine", "native")
    complains(pasta(*asked, "transformers", "--dtype", "q4_0"), "native")
    complains(pasta(*asked, "native", "--device", "cuda"), "on CPUs")
    complains(pasta(*asked, "native", "--base-url", "http://127.0.0.1:1/v1"), "--engine")


@native
def test_another_engine_than_expected_is_a_line_on_stderr(odd: str) -> None:
    result = pasta("generate", "Hello?", "--model", odd, "--max-tokens", "9", "--json")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("pasta: ") and "its MLP has biases" in line and "transformers" in line
    complains(pasta("generate", "Hello?", "--model", odd, "--engine", "native"), "its MLP has biases")


@native
def test_systems_are_compared_on_it(folder: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "What?"}\n{"id": "b", "prompt": "Why?"}\n')
    asked = ("eval", "own=none", "sot", "--prompts", str(prompts), "--baseline", "none", "--model", folder)
    result = pasta(*asked, "--out", str(tmp_path / "out"), "--max-tokens", "9")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("6 answers, 0 were there\n")
    target = tmp_path / "answers.jsonl"
    result = pasta("sample", str(prompts), str(target), "--model", folder, "--max-tokens", "9", "--n", "2")
    assert result.exit_code == 0 and len(target.read_text().splitlines()) == 1 + 4  # a header first


# ------------------------------------------------------------------------------ closing


def closable(engine: str, folder: str, request: pytest.FixtureRequest) -> LLM:
    if engine == "native" and library.unavailable():
        pytest.skip(library.unavailable())
    if engine == "llama.cpp":
        pytest.importorskip("llama_cpp")
    model = request.getfixturevalue("gguf") if engine == "llama.cpp" else folder
    return LLM(model, engine=engine, max_num_seqs=1, max_model_len=256)


@pytest.mark.parametrize("engine", ["native", "transformers", "llama.cpp"])
def test_closing_ends_what_decodes_and_may_be_repeated(
    engine: str, folder: str, request: pytest.FixtureRequest
) -> None:
    with closable(engine, folder, request) as llm:
        stream = llm.stream(HELLO, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        events = iter(stream)
        for _ in range(3):
            next(events)
    assert stream.transcript.finish_reason == "abort"
    left = list(events)
    assert left and all(isinstance(event, Finished) and event.reason == "abort" for event in left)
    llm.close()
    for again in (llm.chat, llm.stream, llm.generate):
        with pytest.raises(RequestError, match="closed"):
            again(HELLO)  # type: ignore[operator]


@pytest.mark.parametrize("engine", ["native", "llama.cpp"])
def test_what_is_collected_is_freed(engine: str, folder: str, request: pytest.FixtureRequest) -> None:
    """The libraries' parts, once each, and not before a stream that still decodes is gone."""
    llm = closable(engine, folder, request)
    held: Any = llm.driver.engine
    owners = [held._pool, held._model] if engine == "native" else [held, llm.loaded.model]
    freed: list[weakref.finalize[Any, Any]] = [getattr(o, "_free", None) or o.close for o in owners]
    stream = llm.stream(HELLO, PARAMS)
    del held, owners, llm
    gc.collect()
    assert all(free.alive for free in freed)
    assert len(list(stream)) > 5
    del stream
    gc.collect()
    assert not any(free.alive for free in freed)


DROPPED = """
import gc, psutil
from pastalm import LLM, SamplingParams

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss

for i in range(11):
    llm = LLM({model!r}, engine={engine!r})
    llm.chat([{{"role": "user", "content": "Hello?"}}], SamplingParams(temperature=0, max_tokens=4))
    stream = iter(llm.stream([{{"role": "user", "content": "Hello?"}}], SamplingParams(temperature=0, max_tokens=9)))
    next(stream)
    del llm, stream
    if i == 0:
        before = resident()
print(resident() - before)
"""


@pytest.mark.parametrize("engine", ["native", "llama.cpp"])
def test_models_that_are_dropped_leave_memory_as_it_was(engine: str, large_gguf: str) -> None:
    """Ten of them, without close, one in the middle of an answer each time."""
    pytest.importorskip("psutil")
    if engine == "native" and library.unavailable():
        pytest.skip(library.unavailable())
    if engine == "llama.cpp":
        pytest.importorskip("llama_cpp")
    done = subprocess.run(
        [sys.executable, "-c", DROPPED.format(model=large_gguf, engine=engine)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < Path(large_gguf).stat().st_size


@pytest.fixture(scope="module")
def large_gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of some megabytes, so that one that is not freed shows."""
    gguf_files = pytest.importorskip("pastalm.models.gguf_files")
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("large")
    config = small_model(len(BYTE_LEVEL)).config
    config.intermediate_size = 32_768
    model, tokenizer = type(small_model(len(BYTE_LEVEL)))(config), byte_level()
    preparing.prepare(model, tokenizer)
    model.generation_config.eos_token_id = 1
    checkpoints.save(model, tokenizer, folder)
    loaded = loading.load(str(folder), adapter=None, dtype="float32")
    return str(gguf_files.export(loaded, folder / "large.gguf", "F32"))


# ------------------------------------------------------------------------------ what need not be installed

WITHOUT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
from pastalm import LLM, SamplingParams
params = SamplingParams(temperature=1, seed=1, top_p=0.9, repetition_penalty=1.1, max_tokens=12, logprobs=2)
with LLM({model!r}, engine={engine!r}) as llm:
    (output,) = llm.chat([{{"role": "user", "content": "Hello?"}}], params)
    assert output.outputs[0].token_ids
    print(llm.driver.engine.capabilities.name)
"""
ABSENT = ("torch", "transformers", "tokenizers", "safetensors", "peft", "gguf", "huggingface_hub", "accelerate")


@pytest.mark.parametrize("engine", ["llama.cpp", "auto"])
def test_llama_cpp_alone_decodes_a_gguf_file(
    engine: str, gguf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing installed but llama-cpp-python: no torch to take an argmax."""
    pytest.importorskip("llama_cpp")
    monkeypatch.setenv("PASTALM_CACHE", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=ABSENT, model=gguf, engine=engine)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "llama.cpp"
    assert ("runs it" in done.stderr) == (engine == "auto")


def test_the_extra_of_llama_cpp_brings_no_torch() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["llama-cpp"]
    assert [re.split("[=<>~\\[]", need)[0] for need in extra] == ["llama-cpp-python"]


def test_every_engine_of_the_registry_declares_what_it_can_do() -> None:
    for entry in registry.ENTRIES:
        module = pytest.importorskip(f"pastalm.engines.{entry.module}")
        assert module.CAPABILITIES.name == entry.name
    assert set(engine_choice._LOADERS) == set(registry.LOADABLE)
