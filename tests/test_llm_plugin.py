"""`llm -m pasta`: the plugin is found, streams, keeps a conversation, and says errors in a line."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llm")

import llm

from pastalm.errors import PastaError
from pastalm.llm_plugin import Pasta
from pastalm.models import chat_template, checkpoints
from pastalm.text_options import offered
from tests.test_models import BYTE_LEVEL, small_model

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    checkpoints.save(small_model(len(BYTE_LEVEL)), BYTE_LEVEL, path)
    return str(path)


def test_an_answer_streams_and_is_counted(folder: str) -> None:
    response = Pasta().prompt("Hello?", model=folder, max_tokens=20)
    pieces = list(response)
    assert len(pieces) > 1 and "".join(pieces) == response.text() != ""
    used = response.usage()
    assert used.input > 0 and 0 < used.output <= 20
    assert 0 < used.details["critical_path"] <= used.output
    assert 0 < used.details["passes"] <= used.output
    assert response.response_json["finish_reason"] in ("stop", "length")


def test_a_conversation_goes_on(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = chat_template.chat_prompt
    monkeypatch.setattr(chat_template, "chat_prompt", lambda *a, **k: seen.append(a[1]) or real(*a, **k))
    talk = Pasta().conversation()
    first = talk.prompt("Hello?", system="Be kind.", model=folder, max_tokens=8)
    said = first.text()
    talk.prompt("And?", model=folder, max_tokens=8).text()
    assert [m["role"] for m in seen[0]] == ["system", "user"]
    assert [m["content"] for m in seen[1]][-3:] == ["Hello?", said, "And?"]


def test_what_cannot_be_done_is_a_line(folder: str) -> None:
    for options, said in (({"model": "/nowhere"}, "no model folder"), ({"temperature": -1}, "temperature")):
        with pytest.raises(llm.ModelError, match=said):
            Pasta().prompt("Hello?", **{"model": folder} | options).text()


def test_options_are_the_rows_of_the_table(folder: str) -> None:
    assert all(Pasta.Options.model_fields[name].description == row.help for name, row in offered().items())
    whole = Pasta().prompt("Hello?", model=folder, max_tokens=20).text()
    cut = Pasta().prompt("Hello?", model=folder, max_tokens=20, stop=whole[3:5]).text()
    assert cut == whole[: whole.index(whole[3:5])]


@pytest.mark.parametrize("where", ["prompt", "system"])
def test_text_that_is_none_is_a_line(folder: str, where: str) -> None:
    asked = {"prompt": "Hello?", "system": "Be kind."} | {where: "caf\udce9"}
    with pytest.raises(llm.ModelError, match="not UTF-8") as caught:
        Pasta().prompt(asked["prompt"], system=asked["system"], model=folder, max_tokens=8).text()
    assert "\n" not in str(caught.value)


def test_who_stops_listening_ends_the_answer(folder: str) -> None:
    pasta = Pasta()
    pieces = iter(pasta.prompt("Hello?", model=folder, max_tokens=400))
    next(pieces)
    assert pasta._loaded is not None and pasta._loaded.driver.running
    del pieces
    gc.collect()
    assert not pasta._loaded.driver.running
    assert pasta.prompt("Hello?", model=folder, max_tokens=8).text()


def test_threads_share_one_model(folder: str) -> None:
    pasta = Pasta()
    alone = {q: pasta.prompt(q, model=folder, max_tokens=12).text() for q in ("One?", "Two?", "Three?")}
    with ThreadPoolExecutor(3) as pool:
        asked = [*alone] * 3
        together = list(pool.map(lambda q: pasta.prompt(q, model=folder, max_tokens=12).text(), asked))
    assert together == [alone[q] for q in asked]


def test_one_model_is_kept(folder: str, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    pasta = Pasta()
    pasta.prompt("Hello?", model=folder, max_tokens=4).text()
    first = pasta._loaded
    pasta.prompt("Hello?", model=str(other), max_tokens=4).text()
    assert pasta._loaded is not first and first is not None
    with pytest.raises(PastaError, match="closed"):
        first.generate("Hello?")


def test_the_command_finds_it(folder: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("llm")), "-m", "pasta", "Hello?", "-o", "model", folder]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "-o", "max_tokens", "8"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1, "a tiny model may say nothing but white space"
    logged = subprocess.run(
        [command[0], "logs", "--json"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(logged.stdout)[0]["model"] == "pasta-smollm2-135m-instruct"
