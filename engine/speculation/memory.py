"""What policies learn over all requests, kept in a small file, so that a restart need not begin anew."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.memory_faults import is_out_of_memory
from engine.speculation.features import VERSION
from engine.types import CannotLoad

log = logging.getLogger(__name__)

_IDLE_SECONDS, _BUSY_SECONDS = 5.0, 60.0


class _NotFinite(Exception):
    """What was learned is not to be kept."""


class PolicyStateError(CannotLoad):
    """A file of learned state that cannot be used here."""


class Learner(Protocol):
    """What remembers something of all requests: a `PolicyTable`, or a `TreeTable`."""

    def shared(self) -> dict[str, dict[str, Tensor]]: ...


class Memory:
    """The shared state of `tables` (by drafter) in the file at `path`, a safetensors.

    `pair` names target and draft by fingerprint: what was learned of one pair is refused for another.
    """

    def __init__(self, path: Path, tables: Mapping[str, Learner], pair: Mapping[str, str]) -> None:
        """Takes over what the file holds, if it exists. Raises PolicyStateError."""
        self._path, self._tables = path, tables
        self._about = {**pair, "features": str(VERSION)}
        self._kept, self._failing = time.monotonic(), False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.exists()
        except OSError as error:
            raise PolicyStateError(f"policy state {str(path)!r} cannot be kept there: {error}") from error
        if path.is_dir():
            raise PolicyStateError(f"policy state {str(path)!r} is a directory: name a file")
        if there:
            self._recall()

    def keep(self, idle: bool, last: bool = False) -> None:
        """Writes the file if it is time: seldom while requests run, more often after, and at the `last`."""
        if not last and time.monotonic() - self._kept < (_IDLE_SECONDS if idle else _BUSY_SECONDS):
            return
        self._kept = time.monotonic()
        try:
            self._write()
        except Exception as error:  # a full disk must not end those who are served
            if not isinstance(error, OSError | SafetensorError | _NotFinite) and not is_out_of_memory(error):
                raise
            if not self._failing:
                log.warning("policy state %r cannot be written: %s", str(self._path), error)
            self._failing = True
        else:
            if self._failing:
                log.warning("policy state %r is written again", str(self._path))
            self._failing = False

    def _write(self) -> None:
        part = self._path.with_name(self._path.name + ".part")
        held = {name: tensor.contiguous().cpu() for name, tensor in self._shared().items()}
        for name, tensor in held.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise _NotFinite(f"{name} holds NaN or infinity")  # the next start would refuse it
        try:
            save_file(held, part, metadata=self._about)
            os.replace(part, self._path)
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                part.unlink()  # what there was room for
            raise

    def _shared(self) -> dict[str, Tensor]:
        return {
            f"{drafter}/{policy}/{name}": tensor
            for drafter, table in self._tables.items()
            for policy, tensors in table.shared().items()
            for name, tensor in tensors.items()
        }

    def _recall(self) -> None:
        try:
            with safe_open(self._path, framework="pt") as file:
                about = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PolicyStateError(f"policy state {str(self._path)!r} cannot be read: {error}") from error
        for name, value in self._about.items():
            if about.get(name) != value:
                raise PolicyStateError(
                    f"policy state {str(self._path)!r} was learned with another {name} "
                    f"({_short(about.get(name, 'none'))}, here {_short(value)}): name another file "
                    "or remove it"
                )
        mine = self._shared()
        for name, value in found.items():
            if name not in mine:
                continue  # of a policy that this engine cannot serve, or a drafter it does not have
            if value.shape != mine[name].shape or value.dtype != mine[name].dtype:
                raise PolicyStateError(
                    f"policy state {str(self._path)!r}: {name} is {value.dtype}{list(value.shape)}, here it "
                    f"is {mine[name].dtype}{list(mine[name].shape)}: name another file or remove it"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise PolicyStateError(f"policy state {str(self._path)!r}: {name} holds NaN or infinity")
        for name, value in found.items():
            if name in mine:
                mine[name].copy_(value)


def _short(fingerprint: str) -> str:
    """Its begin, and the number of layers of an early exit, which shares the rest with its target."""
    digest, *layers = fingerprint.split(":", 1)
    return ":".join((digest[:12], *layers))
