"""What users see of the package: its names, its types, its command, and that help needs no torch."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import pastalm

ROOT = Path(__file__).parents[1]
VERBS = (
    "generate", "replay", "chat", "demo", "parse", "pull", "env", "annotate", "train", "train sft",
    "train prefer", "sample", "score", "eval", "export", "serve",
)  # fmt: skip


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def test_the_public_surface() -> None:
    assert sorted(pastalm.__all__) == [
        "CapabilityError",
        "CompletionOutput",
        "DataError",
        "EngineError",
        "LLM",
        "LanguageError",
        "Limits",
        "ModelError",
        "PastaError",
        "RequestError",
        "RequestOutput",
        "SamplingParams",
        "Transcript",
    ]
    assert all(hasattr(pastalm, name) for name in pastalm.__all__)


def test_the_version_is_said_once() -> None:
    assert pastalm.__version__ == project()["version"]


def test_the_command_says_its_version_without_torch() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from pastalm.cli import app\n"
        "result = CliRunner().invoke(app, ['--version'])\n"
        f"assert (result.exit_code, result.stdout) == (0, 'pastalm {pastalm.__version__}\\n'), result.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_types_ship_with_it() -> None:
    assert (Path(pastalm.__file__).parent / "py.typed").is_file()


def test_the_command_is_there() -> None:
    module, function = project()["scripts"]["pasta"].split(":")
    assert callable(getattr(import_module(module), function))


def test_what_is_asked_for_is_pinned() -> None:
    pinned = {
        line.split("==")[0].replace("_", "-").lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = project()["optional-dependencies"]
    asked = [*project()["dependencies"], *(d for each in extras.values() for d in each)]
    names = {re.split(r"[\[<>=]", d)[0] for d in asked} - {"pastalm"}
    assert names <= pinned, names - pinned


def test_every_verb_explains_itself_without_torch() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from pastalm.cli import app\n"
        f"for verb in {VERBS!r}:\n"
        "    result = CliRunner().invoke(app, [*verb.split(), '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage:' in result.stdout, (verb, result.output)\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_adapter_of_own_answers_owes_nothing_to_anyone() -> None:
    record = json.loads((ROOT / "adapters" / "own" / "train.json").read_text())
    runs = [record, record["before"]]
    assert "before" not in runs[-1] and runs[-1]["config"]["start"] is None
    for data in (run["data"] for run in runs):
        assert set(data["licences"]) <= {"Apache-2.0", "the model's own"}
        assert set(data["sources"]) <= {"pastalm prompts", "own answers"}


def built(project: Path, target: str, out: Path) -> Path:
    """The one archive that hatchling makes of a project; no compiler is looked for."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    environment = os.environ | {"CXX": "nothing"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = out.iterdir()
    return archive


def test_a_source_distribution_is_small_and_makes_the_wheel(tmp_path: Path) -> None:
    """It holds the adapter that ships and the sources, none of the other weights, and no results."""
    archive = built(ROOT, "sdist", tmp_path / "sdist")
    assert archive.stat().st_size < 15e6
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (project,) = tmp_path.glob("pastalm-*")
    shipped = Path("pastalm", "adapters", "smollm2-135m-instruct", "adapter_model.safetensors")
    assert [file.relative_to(project) for file in project.rglob("*.safetensors")] == [shipped]
    sources = Path("pastalm", "engines", "native", "src")
    assert {file.name for file in (project / sources).iterdir()} == {file.name for file in (ROOT / sources).iterdir()}
    assert not (project / "results").exists()
    with zipfile.ZipFile(built(project, "wheel", tmp_path / "wheel")) as wheel:
        assert wheel.read(shipped.as_posix()) == (ROOT / shipped).read_bytes()


def test_functions_of_the_command_are_short() -> None:
    """Options that go together are a group (`cli/options.py`), so that no verb is a page of parameters."""
    for path in (ROOT / "pastalm" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name}"
