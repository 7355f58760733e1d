"""The command `disco-serve key`: makes an API key and the line that a file of keys holds of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from server import keys
from server.flags import fail


def key(
    name: Annotated[str | None, typer.Option(help="Whose key it is; limits and logs go by it.")] = None,
    file: Annotated[Path | None, typer.Option(help="Add the line to this file, for --api-key-file.")] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Take the key from stdin, do not make one.")] = False,
) -> None:
    """Make an API key: the key, told this once, and its hash as a line for --api-key-file."""
    given = sys.stdin.readline().strip() if stdin else keys.new()
    if len(given) < 16:
        fail("a key has at least 16 characters: its hash must not be guessed", code=2)
    if (reason := keys.unfit(given)) is not None:
        fail(reason, code=2)
    try:
        line = keys.line(given, name)
    except ValueError as error:
        fail(f"--name: {error}", code=2)
    if file is None:
        print(line, file=sys.stderr)
    else:
        try:
            _add(file, line)
        except OSError as error:
            fail(f"{file}: {error.strerror or error}")
    if not stdin:
        print(given)


def _add(file: Path, line: str) -> None:
    """A new file is its owner's alone."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with os.fdopen(os.open(file, flags, 0o600), "a", encoding="utf-8") as lines:
        cut = file.stat().st_size and not file.read_bytes().endswith(b"\n")
        lines.write(f"{chr(10) if cut else ''}{line}\n")
