"""The verb of the language: parse."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pastalm.cli.command import app, verb
from pastalm.cli.files import read_text
from pastalm.cli.terminal import print_json
from pastalm.errors import RequestError

if TYPE_CHECKING:
    from pastalm.records.documents import Node


@verb(app)
def parse(
    file: Annotated[str, typer.Argument(help="PASTA-LANG text; - is stdin.")] = "-",
    strip: Annotated[bool, typer.Option("--strip", help="Print only the reader's text.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Print the text form, normalized.")] = False,
) -> None:
    """Parse PASTA-LANG: prints its values as JSON."""
    from pastalm.records import documents

    if strip and render:
        raise RequestError("give --strip or --render, not both")
    document = documents.parse(read_text(file))
    if strip or render:
        sys.stdout.write(documents.strip(document) if strip else documents.render(document))
    else:
        print_json([_as_json(node) for node in document])


def _as_json(node: Node) -> dict[str, Any]:
    from pastalm.core.language import Promise, Text
    from pastalm.records.documents import Async

    if isinstance(node, Text):
        return {"type": "text", "text": node.text}
    if isinstance(node, Promise):
        return {"type": "promise", "topic": node.topic, "tokens": node.tokens}
    if isinstance(node, Async):
        return {"type": "async", "body": [_as_json(inner) for inner in node.body]}
    return {"type": "sync"}
