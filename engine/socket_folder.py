"""A private folder for the engine's sockets, taken away even after a kill -9: by whoever starts next.

A socket in a folder of its own, and not an abstract one, since any user of the machine may connect to those.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_PREFIX, _LOCK = "disco-engine-", "lock"


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder that only this user may enter, removed at the end. Raises OSError if it cannot be made.

    Folders that dead servers left are removed first. A lock, not a process id, says who is alive:
    containers may share the directory and not their processes.
    """
    _sweep(Path(tempfile.gettempdir()))
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            held = stack.enter_context((folder / _LOCK).open("w"))  # the engine's process does not inherit it
            fcntl.flock(held, fcntl.LOCK_EX)
            if (folder / _LOCK).exists():  # else another one's sweep was quicker than this lock
                break
        yield folder


def _sweep(root: Path) -> None:
    """Removes this user's folders whose lock nobody holds."""
    for folder in root.glob(f"{_PREFIX}*"):
        # Another user's, one without a lock, or gone by now: OSError. BlockingIOError: somebody holds it.
        with contextlib.suppress(OSError), (folder / _LOCK).open() as lock:
            if os.fstat(lock.fileno()).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                log.info("removed %s, which a killed server left", folder)
