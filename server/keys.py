"""API keys: where they come from, how a file holds them, and whose key one is."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9_.@-]{1,64})\s+)?sha256:(?P<digest>[0-9a-fA-F]{64})")
_LOOK_SECONDS = 1.0  # between looks at the file


class BadKeys(Exception):
    """A file of keys that cannot be read; the message names file and line, and nothing of the line."""


@dataclass(frozen=True)
class Key:
    """A key as it is kept: its SHA-256, and the name that limits and operators know it by."""

    name: str
    digest: bytes


class KeyRing:
    """The keys of one server. With none of them, and no file, it is open to all.

    Random keys need no slow hash: who reads the file cannot guess 256 bits. Raises BadKeys.
    """

    def __init__(self, plain: Iterable[str] = (), file: str | None = None) -> None:
        """`plain`: keys as they are, from flags or the environment; `file`: of lines that `line` makes."""
        self._plain = [Key(f"key-{place}", digest(key)) for place, key in enumerate(plain, 1)]
        self._file = None if file is None else Path(file)
        self._filed: Sequence[Key] = ()
        self._stamp: tuple[int, ...] = ()
        self._looked = 0.0
        if self._file is not None:
            self._stamp = _stamp(self._file)
            self._filed = read(self._file)
            if not self._filed:
                raise BadKeys(f"{self._file}: holds no key")

    @property
    def locked(self) -> bool:
        """Whether the server needs a key; a file that has become empty lets nobody in."""
        return bool(self._plain) or self._file is not None

    def name_of(self, key: str) -> str | None:
        """The name of this key; None if it is not one of the ring's.

        Every key is compared, in constant time, so that the time does not tell which one came close.
        """
        self._look()
        given = digest(key)
        every = (*self._plain, *self._filed)
        found = [each.name for each in every if hmac.compare_digest(given, each.digest)]
        return found[0] if found else None

    def reload(self) -> None:
        """Reads the file again. What cannot be read changes nothing: the log says so."""
        if self._file is None:
            return
        try:
            self._stamp = _stamp(self._file)
            self._filed = read(self._file)
        except BadKeys as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            told = log.info if self._filed else log.warning
            told("the API keys were read again: %d in the file", len(self._filed))

    def _look(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        try:
            changed = _stamp(self._file) != self._stamp
        except BadKeys:
            changed = self._stamp != ()
            self._stamp = ()
        if changed:
            self.reload()


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def unfit(key: str) -> str | None:
    """Why no client could ever send it as a bearer token, or None; nothing of the key is told."""
    if not key.strip():
        return "a key is empty"
    if not re.fullmatch(r"[!-~]+", key):
        return "a key is printable ASCII without spaces: a header carries nothing else"
    return None


def new() -> str:
    """A key that nobody guesses: 256 random bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def line(key: str, name: str | None) -> str:
    """How a file holds the key. Raises ValueError for a name that a line cannot hold."""
    text = f"{'' if name is None else name + ' '}sha256:{digest(key).hex()}"
    if not _LINE.fullmatch(text):
        raise ValueError("a name has 1 to 64 letters, digits and _.@-")
    return text


def read(file: Path) -> list[Key]:
    """The keys of a file: a line each, `NAME sha256:HEX` or without the name; # begins a comment."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadKeys(f"{file}: {_why(error)}") from error
    keys = []
    for place, text in enumerate(lines, 1):
        text = text.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise BadKeys(f"{file}, line {place}: not 'NAME sha256:HEX'; `disco-serve key` makes such lines")
        keys.append(Key(match["name"] or f"key-{match['digest'][:8]}", bytes.fromhex(match["digest"])))
    return keys


def _why(error: Exception) -> str:
    return error.strerror or "cannot be read" if isinstance(error, OSError) else "is not UTF-8"


def _stamp(file: Path) -> tuple[int, ...]:
    """Changes with the file. Raises BadKeys."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise BadKeys(f"{file}: {_why(error)}") from error
    if not (
        stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    ):  # reading a pipe would wait for its writer
        raise BadKeys(f"{file}: it is not a regular file")
    return status.st_mtime_ns, status.st_size, status.st_ino
