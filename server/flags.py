"""Command-line flags made from `Settings`: one list of options, with one set of descriptions."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, Optional, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import SettingsError

from server.interrupts import INTERRUPTED, interrupted
from server.settings import Settings


def settings_flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a flag for each named field of `Settings`, and the settings as first argument.

    A flag given wins over `DISCO_*`, which wins over the default. Bad values end the process with
    exit code 2 and one line that names flag and variable.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        _, *own = signature.parameters.values()
        flags = [_parameter(name, Settings.model_fields[name]) for name in names]

        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(read_settings(given), **values)

        parameters = [*own, *flags]
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        return call

    return decorate


def read_settings(given: dict[str, Any]) -> Settings:
    """The settings of the flags that were given (None or an empty list: was not) over the environment."""
    values = {name: value for name, value in given.items() if value is not None and value != []}
    if "policy_options" in values:
        try:
            values["policy_options"] = json.loads(values["policy_options"])
        except json.JSONDecodeError as error:
            fail(f"--policy-options: not JSON: {error}", code=2)
        # pydantic-settings would merge the two objects; a flag replaces its variable.
        os.environ.pop("DISCO_POLICY_OPTIONS", None)
    try:
        return Settings(**values)
    except ValidationError as error:
        fail("; ".join(_problem(each["loc"], each["msg"]) for each in error.errors()), code=2)
    except SettingsError as error:
        fail(str(error), code=2)


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the command with one line on stderr."""
    print(f"disco-serve: {message}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds end the command with their message instead of a traceback."""
    try:
        yield
    except Exception as error:
        if interrupted(error):
            raise typer.Exit(INTERRUPTED) from error
        if isinstance(error, kinds):
            fail(" ".join(str(error).split()))
        raise


def flag(name: str) -> str:
    """The flag of a field: `max_model_len` is `--max-model-len`."""
    return f"--{name.replace('_', '-')}"


def _problem(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")  # pydantic's, of our own validators
    if not location:
        return message
    name = str(location[0])
    return f"{flag(name)} (or DISCO_{name.upper()}): {message}"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kinds = _kinds(field.annotation)
    shown = "" if field.description and "default" in field.description else _default(field)
    text = f"{field.description or ''}{shown}"
    options: dict[str, Any] = {"help": text, "show_default": False}
    annotation: Any = Optional[str]  # noqa: UP045  pydantic reads the value; typer wants this form
    if bool in kinds:
        annotation, names = Optional[bool], f"{flag(name)}/--no-{flag(name)[2:]}"  # noqa: UP045
    else:
        names = flag(name)
        options["metavar"] = _metavar(kinds)
        if list in kinds:
            annotation = Optional[list[str]]  # noqa: UP045
            options["help"] = f"{text} (may be repeated)"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(None, names, **options),
        annotation=annotation,
    )


def _kinds(annotation: Any) -> set[Any]:
    """The plain types and literals in an annotation such as `int | None`."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    arms = [each for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) in (list, dict):
        return {get_origin(annotation)}
    return set().union(*(_kinds(arm) for arm in arms)) if arms else {annotation}


def _metavar(kinds: set[Any]) -> str:
    literals = sorted(each for each in kinds if isinstance(each, str))
    if literals:
        return "|".join(literals)
    known = {int: "INT", float: "FLOAT", dict: "JSON"}
    return next((known[kind] for kind in kinds if kind in known), "TEXT")


def _default(field: FieldInfo) -> str:
    empty = field.default is None or field.default == [] or field.default == {}
    return "" if empty else f" (default: {field.default})"
