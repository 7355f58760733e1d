"""A live `disco-serve serve` for a run, and environments of their own for what talks to it."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOAD_SECONDS = 300.0
STOP_SECONDS = 60.0


class RunFailed(Exception):
    """Something outside the checks went wrong: an installation, or the server's start."""


@dataclass(frozen=True)
class Served:
    """Where a server is. `url` without a path; `model` is a name that it serves."""

    url: str
    key: str
    model: str

    def environment(self) -> dict[str, str]:
        """Variables that tell a session where to go. Proxies stay out of the way."""
        told = {"SERVED_AT": self.url, "SERVED_KEY": self.key, "SERVED_MODEL": self.model}
        return {**os.environ, **told, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@contextmanager
def serving(log: Path, *flags: str) -> Iterator[Served]:
    """Starts the default pair on a free port behind a key, waits for /ready, and ends it by SIGTERM.

    Raises RunFailed when it is not ready after LOAD_SECONDS or does not end after STOP_SECONDS.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended then, too
    key = secrets.token_hex(8)
    command = [str(Path(sys.executable).with_name("disco-serve")), "serve", "--port", "0", *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        # the key by variable: the arguments of a process are for all to see
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "DISCO_API_KEY": key}
        )
    try:
        yield Served(_wait(process, log), key, "smollm2")
        if process.poll() is not None:
            raise RunFailed(f"the server ended by itself with {process.returncode}; see {log}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise RunFailed(f"the server did not end after SIGTERM; see {log}") from None


def _wait(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + LOAD_SECONDS
    while time.monotonic() < end and process.poll() is None:
        address = re.search(r" on (http://\S+)", log.read_text())
        if address and _ready(address[1]):
            return address[1]
        time.sleep(0.2)
    raise RunFailed(f"the server is not ready; the end of {log}:\n{log.read_text()[-2000:]}")


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def python_environment(folder: Path, requirements: Path, *, with_project: bool = False) -> Path:
    """The interpreter of a virtual environment with these requirements; made anew when they change.

    `with_project`: sees this interpreter's packages too (torch, transformers), and installs over them.
    Raises RunFailed when pip fails.
    """
    python = folder / "bin" / "python"
    stamp, wanted = folder / "installed", hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    _say(f"installing {requirements.relative_to(ROOT)}")
    system = ["--system-site-packages"] if with_project else []  # where a torch for a GPU may come from
    _run([sys.executable, "-m", "venv", "--clear", *system, str(folder)])
    if with_project:
        (site,) = folder.glob("lib/python*/site-packages")
        ours = Path(sys.executable).parent.parent / "lib" / site.parent.name / "site-packages"
        (site / "project.pth").write_text(f"{ours}\n")
    _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(requirements)])
    stamp.write_text(wanted)
    return python


def node_environment(folder: Path, sources: Path) -> Path:
    """A folder with the sources and the node_modules of their package-lock.json.

    Raises RunFailed when npm fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    stamp = folder / "installed"
    wanted = hashlib.sha256((sources / "package-lock.json").read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        _say(f"installing {sources.relative_to(ROOT)}/package-lock.json")
        _run(["npm", "ci", "--no-audit", "--no-fund"], folder)
        stamp.write_text(wanted)
    return folder


def _run(command: list[str], folder: Path = ROOT) -> None:
    try:
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    except FileNotFoundError as error:
        raise RunFailed(f"{command[0]} is not installed") from error
    if done.returncode:
        raise RunFailed(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
