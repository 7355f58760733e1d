"""`disco-serve classifier`: every module here is a subcommand, by its name and its `command` function.

Modules import what is heavy inside their functions, since each start of `disco-serve` reads them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import typer

from classifiers.one_line import one_line_errors

app = typer.Typer(
    name="classifier",
    help="Teach, judge and export what decides how far to draft.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        with one_line_errors("--batch", "tensors"):
            command(*args, **given)

    return run


for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if not _module.name.startswith("_"):
        _command = importlib.import_module(f"{__name__}.{_module.name}").command
        app.command(_module.name.replace("_", "-"))(_guarded(_command))
