"""Recipes: options of a verb from a TOML file, `--config FILE`. What stands on the command line goes first.

model = "Qwen/Qwen3-8B"         # an option's name without its dashes; outside the tables, for every verb
gradient-checkpointing = true

[sft]                           # for `pasta train sft`
learning-rate = 1e-4
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from pastalm.errors import RequestError


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a file's values the defaults of the verb. Raises typer.BadParameter."""
    if path is not None:
        options = {name.lstrip("-"): p.name for p in context.command.params for name in p.opts if name[:2] == "--"}
        verbs = context.parent.command.commands if context.parent else {}  # type: ignore[attr-defined]
        try:
            values = chosen(path, context.info_name or "", set(options) - {"config", "help"}, set(verbs))
        except RequestError as error:
            raise typer.BadParameter(str(error)) from None
        context.default_map = {options[name]: value for name, value in values.items()}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=_read, help="TOML file of options; the command line goes before it."
    ),
]


def chosen(path: Path, verb: str, options: set[str], verbs: set[str]) -> dict[str, Any]:
    """What a recipe says of a verb, by option. Raises RequestError.

    path: the file.
    verb: its name.
    options: its options, without dashes.
    verbs: all verbs that may have a table.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not TOML: {error}") from None
    tables = {name: value for name, value in recipe.items() if isinstance(value, dict)}
    if unknown := sorted(set(tables) - verbs):
        raise RequestError(f"{path} has a table for {unknown[0]!r}: use {', '.join(sorted(verbs))}")
    values = {name: value for name, value in recipe.items() if name not in tables} | tables.get(verb, {})
    if unknown := sorted(set(values) - options):
        raise RequestError(f"{path} sets {unknown[0]!r}, which pasta train {verb} does not take")
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise RequestError(f"{path} sets {name!r} to a {type(value).__name__}: give one value")
    return values
