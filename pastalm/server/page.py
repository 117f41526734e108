"""The web page at `/`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi.responses import FileResponse, Response

PAGE = {
    "/": "index.html",
    **{f"/{name}": name for name in ("page.css", "trace.js", "draw.js", "page.js")},
}
"""The page's paths and its files in static/. They refer to each other by relative names, so that the page can also be
opened as a file."""
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    # the browser enforces that the page loads nothing from other hosts and runs no other scripts
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def file_route(name: str) -> Callable[[], Awaitable[Response]]:
    """A route handler that returns a file of the page."""

    async def file() -> Response:
        return FileResponse(Path(__file__).parent / "static" / name, headers=_PAGE_HEADERS)

    return file
