"""The documents say what is: the help of the command, and files that they point at."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import pastalm

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


def test_the_commands_help_is_in_the_docs() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.page(), "run python docs/make_cli.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target, anchor in re.findall(r"\]\(([^)#\s]+\.md)#([^)]+)\)", text):
        heads = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    """Paths of this tree in code spans."""
    text = page.read_text(encoding="utf-8")
    for named in re.findall(r"`((?:pastalm|tests|docs|runs|benchmarks|results|examples)/[\w./-]+)`", text):
        if not named.startswith("runs/out/") and "NAME" not in named and f"`{named}` of commit" not in text:
            assert (ROOT / named).exists(), f"{page.name} names {named}"


def test_the_languages_examples_run() -> None:
    text = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    from pastalm.records.documents import parse, render

    shown = "".join(line.removeprefix("    ") for line in re.findall(r"^    .*\n", text, re.MULTILINE)[:4])
    assert render(parse(shown)) == shown and len(parse(shown)) == 7


def test_the_readme_is_short_and_its_tree_is_the_packages() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 110
    tree = text.split("\n    pastalm/\n")[1].split("\n    tests/")[0]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    package = (path for path in (ROOT / "pastalm").iterdir() if not path.name.startswith("__"))
    assert listed == {path.name for path in package} - {"adapters", "py.typed"}


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pastalm.__version__
    assert citation["authors"] == [{"name": "pastalm contributors"}]
    assert {"cff-version", "message", "title"} <= set(citation)
    paper = citation["references"][0]
    assert paper["title"].startswith("Learning to Keep a Promise") and len(paper["authors"]) == 9


def test_hooks_before_a_commit_run_what_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["entry"].removeprefix(".venv/bin/") for repo in config["repos"] for hook in repo["hooks"]}
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    lines = re.findall(r"\$\(BIN\)/([a-z-]+(?: check| format)?)", recipe)
    assert hooks == set(lines)


def test_the_changelog_names_what_there_is() -> None:
    """Modules by their new path, options by the command's own help."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    help_pages = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for option in set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", text)):
        assert option in help_pages, option
    for module in set(re.findall(r"is `(pastalm\.[\w.]+)`", text)):
        assert importlib.util.find_spec(module), module


SCRIPTS = sorted(path for folder in ("benchmarks", "runs", "examples") for path in ROOT.glob(f"{folder}/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_ask_for_what_the_package_has(script: Path) -> None:
    """No tool checks the types of these: what they import from here, also inside functions, must be there."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pastalm":
            try:
                module = importlib.import_module(node.module or "")
            except ImportError as error:
                if (error.name or "").startswith("pastalm"):
                    raise
                pytest.skip(f"{error.name} is not installed")
            for name in node.names:
                found = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                assert found, f"{script.name} imports {name.name} from {node.module}"
