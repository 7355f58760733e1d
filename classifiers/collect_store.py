"""The directory of a recording: it belongs to one set of options and to one run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from classifiers import traces
from classifiers.traces import Manifest


class CollectError(ValueError):
    """Something that the command was given cannot work; the message says what."""


def require(holds: bool, message: str) -> None:
    """Raises CollectError unless it holds."""
    if not holds:
        raise CollectError(message)


def refuse_another_directory(out: Path) -> None:
    """A directory that no run of ours made is never written into."""
    if out.is_dir() and not (out / traces.MANIFEST).exists():
        taken = sorted(each.name for each in out.iterdir() if not each.name.startswith("."))
        require(not taken, f"--out {out} holds something else ({', '.join(taken[:1])}); give another")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Two runs in one directory would write each other's files. The lock goes with its process."""
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise CollectError(f"another run is at work in {out}") from error


def claim(out: Path, mine: Manifest) -> Manifest:
    """Gives the directory to this recording: the manifest that goes on, finished or not.

    One in which nothing was recorded yet is anybody's. Raises CollectError if it holds another's,
    naming how it differs.
    """
    if not traces.shard_file(out, 0).exists():
        traces.write_manifest(out, mine)
        return mine
    theirs = traces.read_manifest(out)
    settings = {"trees": False} | theirs.settings
    changed = [_flag(name) for name, value in mine.settings.items() if settings.get(name) != value]
    for name in ("target", "draft"):
        if getattr(mine, name).fingerprint != getattr(theirs, name).fingerprint:
            changed.append(f"--{name}")
    if [each.sha256 for each in mine.data] != [each.sha256 for each in theirs.data]:
        changed.append("--data")
    if mine.feature_version != theirs.feature_version:
        changed.append("feature version")
    require(
        not changed,
        f"{out} holds a recording with another {', '.join(changed)}; give the same options to go on, "
        "or another --out",
    )
    return theirs


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
