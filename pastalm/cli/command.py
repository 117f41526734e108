"""What all verbs share: the application, groups of options, and errors as one line with the right exit code."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, NoReturn, Protocol, TypeVar, get_type_hints, runtime_checkable

import typer
from typer.core import TyperGroup

from pastalm.cli.terminal import BAD_INPUT, FAILED, INTERRUPTED, drop_stdout, fail, print_error
from pastalm.engine_choice import missing
from pastalm.errors import CapabilityError, DataError, ModelError, PastaError, RequestError, check_text

R = TypeVar("R")

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """The verbs. An invalid command line is a one-line error, too. Characters that stdout lacks are escaped."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _UsageError as error:
            message: str = error.format_message()  # type: ignore[attr-defined]
            context: typer.Context = error.ctx  # type: ignore[attr-defined]
            if "\n" in message:  # the help, if no verb was given
                print(message, file=sys.stderr)
            else:
                print_error(f"{message} Try {context.command_path} --help" if context else message)
            code = BAD_INPUT
        if standalone_mode:
            sys.exit(code or 0)
        return code


app = typer.Typer(
    name="pasta",
    cls=_Group,
    help="Language models that decode the independent parts of an answer at the same time.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        from pastalm import __version__

        print(f"pastalm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models that decode the independent parts of an answer at the same time."""


# ------------------------------------------------------------------------------ verbs


@dataclass(frozen=True, slots=True)
class NoEffect:
    """Options that are an error if they have no effect.

    names: of the options.
    when: whether they have no effect, given all arguments of the verb.
    reason: `when` in words; completes the message "--option does nothing".
    """

    names: tuple[str, ...]
    when: Callable[[Mapping[str, Any]], bool]
    reason: str


def verb(
    group: typer.Typer, name: str | None = None, *, no_effect: Sequence[NoEffect] = ()
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Turns a function into a verb: its errors become one line with the right exit code.

    A parameter that is a dataclass, or that has an `OptionGroup` in its annotation, becomes several options.

    group: the application, or the group of verbs.
    name: of the verb, if it is not the function's.
    no_effect: options that are an error with certain others.
    """

    def decorated(function: Callable[..., R]) -> Callable[..., R]:
        signature = inspect.signature(function, eval_str=True)
        option_groups = ((p.name, _group(p.annotation)) for p in signature.parameters.values())
        groups = {name: options for name, options in option_groups if options is not None}

        @functools.wraps(function)
        def guarded(context: typer.Context, **arguments: Any) -> R:
            try:
                _check_arguments(context, arguments, no_effect)
                built = {name: options.build(arguments) for name, options in groups.items()}
                plain = {name: arguments[name] for name in signature.parameters if name not in groups}
                result = function(**plain, **built)
                sys.stdout.flush()
                return result
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                _fail_with(error)

        options = [_parameter("context", typer.Context)]
        for parameter in signature.parameters.values():
            if parameter.name in groups:
                options += groups[parameter.name].options()
            else:
                options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        guarded.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
        guarded.__annotations__ = {option.name: option.annotation for option in options}
        group.command(name)(guarded)
        return guarded

    return decorated


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing that are the fault of neither the user nor the program."""


def _fail_with(error: BaseException) -> NoReturn:
    """Ends the command with one line about an error, and its exit code. Raises typer.Exit."""
    if isinstance(error, KeyboardInterrupt):
        fail("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        drop_stdout()
        fail("stdout was closed before the end", FAILED)
    if isinstance(error, RequestError | CapabilityError | ModelError | DataError):
        fail(str(error), BAD_INPUT)
    if isinstance(error, PastaError):
        fail(str(error), FAILED)
    if isinstance(error, ModuleNotFoundError):
        fail(missing(error), FAILED)
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        drop_stdout()
        fail(f"cannot write: {error.strerror}", FAILED)
    if os.environ.get("PASTA_DEBUG"):
        raise error
    what = f"{type(error).__name__}: {error}"[:300]
    fail(f"internal error, please report it ({what}); PASTA_DEBUG=1 shows where", FAILED)


def _check_arguments(context: typer.Context, arguments: Mapping[str, Any], no_effect: Sequence[NoEffect]) -> None:
    """Raises RequestError for an argument that is not valid text (except file names), or an option without effect."""
    shown = {p.name or "": p.opts[0] if p.opts[0].startswith("-") else f"the {p.name}" for p in context.command.params}
    for name, value in arguments.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name != "file":
                check_text(text, shown[name])
    for rule in no_effect:
        for name in rule.names:
            source = context.get_parameter_source(name)
            if source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP") and rule.when(arguments):
                raise RequestError(f"{shown[name]} does nothing {rule.reason}: leave out one of them")


# ------------------------------------------------------------------------------ groups of options


@runtime_checkable
class OptionGroup(Protocol):
    """Options that together give one argument of a verb."""

    def options(self) -> list[inspect.Parameter]:
        """The options, as parameters of a function for typer."""

    def build(self, arguments: Mapping[str, Any]) -> Any:
        """The value, from all arguments of the verb. Raises RequestError."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """A group with one option for each field of a dataclass."""

    kind: type[Any]

    def options(self) -> list[inspect.Parameter]:
        hints = get_type_hints(self.kind, include_extras=True)
        return [_parameter(field.name, hints[field.name], _default(field)) for field in fields(self.kind)]

    def build(self, arguments: Mapping[str, Any]) -> Any:
        return self.kind(**{field.name: arguments[field.name] for field in fields(self.kind)})


def _group(annotation: Any) -> OptionGroup | None:
    """The group of options for a parameter; None if it is a single option."""
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, OptionGroup):
            return extra
    return _Fields(annotation) if is_dataclass(annotation) and isinstance(annotation, type) else None


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
