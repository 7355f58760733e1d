"""`disco-serve classifier`: every module here is a subcommand, by its name and its `command` function.

Modules import what is heavy inside their functions, since each start of `disco-serve` reads them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

app = typer.Typer(
    name="classifier",
    help="Teach, judge and export what decides how far to draft.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What was asked wrongly ends with code 2, what cannot be done with 1; both with one line."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        import torch
        from safetensors import SafetensorError

        from engine.types import CannotLoad, RequestFailed

        try:
            command(*args, **given)
        except torch.OutOfMemoryError as error:
            _fail(f"not enough memory; lower --batch: {error}", 1)
        except SafetensorError as error:
            _fail(f"a file of tensors cannot be read or written: {error}", 1)
        except (CannotLoad, RequestFailed, OSError) as error:
            _fail(str(error), 1)
        except ValueError as error:
            _fail(str(error), 2)

    return run


def _fail(message: str, code: int) -> NoReturn:
    print(f"disco-serve: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if not _module.name.startswith("_"):
        _command = importlib.import_module(f"{__name__}.{_module.name}").command
        app.command(_module.name.replace("_", "-"))(one_line_errors(_command))
