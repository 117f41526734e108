"""Errors as clients get them: OpenAI's error objects, and which error of ours becomes which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from pastalm.errors import CapabilityError, ModelError, PastaError, RequestError


class Refused(PastaError):
    """An error as clients get it.

    message: one line for the user.
    status: the HTTP status.
    code: OpenAI's code.
    param: the field that the error is about.
    headers: further headers of the reply.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = str(self).encode("utf-8", "replace").decode()  # a lone surrogate that a client sent
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def bad_value(message: str, param: str) -> Refused:
    """The error for a field with a value that this server does not support."""
    return Refused(message, code="invalid_value", param=param)


INSTEAD = {
    "functions": "tools",
    "function_call": "tool_choice",
    "guided_json": "response_format or structured_outputs",
}
"""What replaces fields of older versions of the API."""


class BadValue(PydanticCustomError):
    """Raised by validators: the field `param` has an invalid value. pydantic collects it."""

    def __new__(cls, param: str, message: str) -> BadValue:
        return super().__new__(cls, "bad_value", "{message}", {"message": message, "param": param})


def refusal(errors: Sequence[Mapping[str, Any]], body: Any) -> Refused:
    """One error for an invalid body: a field that is not supported comes first, then the error that lies deepest.

    errors: pydantic's. For a value that may have several types they contain those of each type.
    body: the invalid body.
    """
    places = [_place(error, body) for error in errors]
    rank = [
        (e["type"] == "extra_forbidden", len(where), not str(e["type"]).endswith("_type"))
        for e, where in zip(errors, places, strict=True)
    ]
    worst = max(range(len(errors)), key=lambda i: rank[i])
    error, where = errors[worst], places[worst]
    param = _spelled(where) or None
    if error["type"] == "bad_value":
        message, param = (
            f"{param}: {error['msg']}" if param else error["msg"],
            _spelled([*where, error["ctx"]["param"]]),
        )
        return Refused(message, code="invalid_value", param=param)
    if error["type"] == "extra_forbidden":
        instead = f"give {INSTEAD[str(param)]}" if param in INSTEAD else "leave it out"
        message = f"{param} is not supported by this server: {instead}"
        return Refused(message, code="unsupported_parameter", param=param)
    if error["type"] == "json_invalid":
        return Refused("the body is not JSON", code="invalid_json")
    if error["type"] == "missing" and param:
        return bad_value(f"{param} is missing: give it", param)
    message = str(error["msg"]).removeprefix("Value error, ")
    if param is None and (error["type"] == "missing" or error["type"].endswith("_type")):
        message = "the body must be a JSON object"
    return Refused(f"{param}: {message}" if param else message, code="invalid_value", param=param)


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The path to an error in the body. pydantic's own path also contains the names of union members, which are left
    out."""
    where: list[str | int] = []
    parts = [part for part in error["loc"] if part != "body"]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        listed = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if listed or isinstance(body, dict) and part in body:
            body = body[part]
        elif not (last and error["type"] == "missing"):
            continue
        where.append(part)
    return where


def _spelled(where: Sequence[str | int]) -> str:
    """A path as OpenAI writes it: messages[0].content[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def client_error(error: Exception) -> Refused:
    """The error that a client gets for an exception."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RequestValidationError):
        return refusal(error.errors(), error.body)
    if isinstance(error, HTTPException):
        return Refused(error.detail, error.status_code, headers=error.headers)
    if isinstance(error, TimeoutError):
        message = "the time for this request is over: ask for fewer tokens"
        # the same request would take as long again
        return Refused(message, 504, "timeout", headers={"x-should-retry": "false"})
    if isinstance(error, RequestError | CapabilityError | ModelError):
        return Refused(str(error), code="invalid_value")
    if isinstance(error, PastaError):
        return Refused(str(error), 500, "engine_error")
    return Refused("internal error, please report it", 500, "internal_error")


async def error_reply(request: Request, error: Exception) -> Response:
    """The reply for an exception; one for a body that is not sent as JSON says so."""
    refused = client_error(error)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if isinstance(error, RequestValidationError) and kind != "application/json" and not kind.endswith("+json"):
        has = f"not {kind}" if kind else "this request has no Content-Type"
        refused = Refused(f"send JSON with Content-Type: application/json, {has}", code="unsupported_content_type")
    return JSONResponse(refused.body(), refused.status, refused.headers)


class ErrorObject(BaseModel):
    """The fields of OpenAI's errors."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorObject
