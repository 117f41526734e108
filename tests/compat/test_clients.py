"""Real clients of OpenAI's API get from our server what it says: `make compat` installs them beside, and runs this."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pastalm import LLM
from tests.server.serving import TIPS, TIPS_TEXT, Served, playing, serving, tiny

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-compat"
pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(not ENVIRONMENTS.exists(), reason="the clients are not installed: make compat"),
]


def asked(client: str, url: str, folder: Path = HERE) -> Any:
    """What a client got, by its own Python, without anything of ours."""
    python = ENVIRONMENTS / ("llama-index" if client.endswith("llama_index") else "all") / "bin" / "python"
    quiet = {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "secret", "LLM_USER_PATH": str(folder)}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | quiet
    command = [python, folder / "clients.py", client, f"{url}/v1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(playing(TIPS), api_key="secret") as here:
        yield here


@pytest.mark.parametrize(
    "client", ["openai", "litellm", "langchain", "llama_index", "agents", "pydantic_ai", "autogen", "llm"]
)
def test_a_client_gets_the_text(served: Served, client: str, tmp_path: Path) -> None:
    shutil.copy(HERE / "clients.py", tmp_path)
    got = asked(client, served.url, tmp_path)
    assert len(got) >= 2 and set(got.values()) == {TIPS_TEXT}, got


@pytest.fixture(scope="module")
def embedded() -> Iterator[Served]:
    """The embedded model on the native engine: answers of a script have no form."""
    with serving(LLM(engine="native", max_model_len=2048), api_key="secret") as here:
        yield here


@pytest.mark.parametrize(
    "client", ["openai", "litellm", "langchain", "llama_index", "agents", "pydantic_ai", "autogen", "llm"]
)
def test_a_client_gets_json(embedded: Served, client: str, tmp_path: Path) -> None:
    shutil.copy(HERE / "clients.py", tmp_path)
    got = asked(f"json_{client}", embedded.url, tmp_path)
    kinds = {"height_cm": int, "weight_kg": float, "alive": bool}
    for value in got.values():
        assert list(value) == list(kinds), got
        assert all(isinstance(value[name], kind | int if kind is float else kind) for name, kind in kinds.items()), got


def test_lm_eval_scores_and_generates(tmp_path: Path) -> None:
    """What it took for the log-likelihood of each choice is that of plain transformers, and what it read is what a
    request by hand gets."""
    shutil.copytree(HERE, tmp_path / "here", ignore=shutil.ignore_patterns("__pycache__"))
    tasks = tmp_path / "here" / "tasks"
    for task in tasks.glob("*.yaml"):
        task.write_text(task.read_text().replace("ROWS", str(tasks / "rows.jsonl")))
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    with serving(tiny(max_model_len=256), api_key="secret", parallelism=0) as here:
        got = asked("lm_eval", here.url, tmp_path / "here")
        for sample in got["scored"]:
            row = rows[sample["row"]]
            right = [likelihood(here, row["question"], choice) for choice in row["choices"]]
            assert [float(logprob) for logprob, _ in sample["got"]] == pytest.approx(right, abs=1e-4)
        client = here.client.with_options(api_key="secret")
        for sample in got["written"]:
            prompt = rows[sample["row"]]["question"]
            reply = client.completions.create(
                model="played", prompt=prompt, max_tokens=12, temperature=0, stop=["\n\n"]
            )
            assert sample["got"] == [[reply.choices[0].text]]
        assert len(got["scored"]) == len(got["written"]) == len(got["chat"]) == len(rows)


def likelihood(here: Served, question: str, choice: str) -> float:
    """The log-probability of a choice behind its question, by one forward pass."""
    import torch

    encode = here.llm.loaded.vocabulary.encode
    ids, begin = encode(question + choice), len(encode(question))
    with torch.no_grad():
        right = here.llm.loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(right[i - 1, ids[i]].item() for i in range(begin, len(ids)))
