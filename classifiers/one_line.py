"""How commands end on errors: one line, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


@contextmanager
def one_line_errors(lower: str, files: str) -> Iterator[None]:
    """What was asked wrongly ends with code 2, what cannot be done with 1; both with one line.

    `lower`: the options that save memory; `files`: what the safetensors that it handles hold.
    """
    import torch
    from safetensors import SafetensorError

    from engine.types import CannotLoad, RequestFailed

    try:
        yield
    except torch.OutOfMemoryError as error:
        fail(f"not enough memory; lower {lower}: {error}", 1)
    except SafetensorError as error:
        fail(f"a file of {files} cannot be read or written: {error}", 1)
    except (CannotLoad, RequestFailed, OSError) as error:
        fail(str(error), 1)
    except ValueError as error:
        fail(str(error), 2)


def fail(message: str, code: int) -> NoReturn:
    print(f"disco-serve: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)
