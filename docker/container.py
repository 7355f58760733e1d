"""A container run by runc as a cluster with strict settings runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Failed(Exception):
    """Something is not as it must be; the message says what."""


def say(text: str) -> None:
    print(text, flush=True)


def run(command: Sequence[str], *, log: Path | None = None, cwd: Path | None = None) -> str:
    """What the command printed on stdout; with `log` all goes there as it comes, and "" is returned.

    Raises Failed with its last words.
    """
    try:
        if log is None:
            done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
        else:
            with log.open("a") as file:
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    except FileNotFoundError:
        raise Failed(f"{command[0]} is not installed") from None
    if done.returncode:
        said = done.stdout + done.stderr if log is None else log.read_text()
        raise Failed(f"{' '.join(command[:6])} ... ended with {done.returncode}:\n{said.strip()[-2000:]}")
    return done.stdout or ""


class Container:
    """The image's own command with `flags`, from its start to its end, in this machine's network.

    Root is read-only, all capabilities are dropped, nothing can be gained by setuid; /tmp is 256 MB,
    and `cache` is bound at /cache.
    """

    def __init__(
        self,
        folder: Path,
        rootfs: Path,
        config: Mapping[str, Any],
        cache: Path,
        environment: Mapping[str, str],
        flags: Sequence[str],
    ) -> None:
        self._folder, self._name = folder, f"disco-check-{folder.name}"
        self._runtime = ["runc", "--root", str(folder / "state")]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        run(["runc", "spec"], cwd=folder)
        spec = json.loads((folder / "config.json").read_text())
        _confine(spec, rootfs, config["User"], cache)
        process = spec["process"]
        process["args"] = [*config["Entrypoint"], *flags]
        process["cwd"] = config["WorkingDir"]
        process["env"] = [*config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        (folder / "config.json").write_text(json.dumps(spec, indent=1))
        self.log = folder / "log"

    def __enter__(self) -> Container:
        words = [*self._runtime, "run", "--bundle", str(self._folder), self._name]
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        state = self._folder / "state" / self._name / "state.json"
        while self.running and not state.exists():
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._runc("delete", "--force", self._name)
            self._process.wait(30)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the container's first process, on this machine."""
        state: dict[str, Any] = json.loads(self._runc("state", self._name))
        return int(state["pid"])

    def execute(self, *command: str) -> tuple[int, str]:
        """The exit code and the words of a command inside, as the container's own user."""
        words = [*self._runtime, "exec", self._name, *command]
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return done.returncode, done.stdout + done.stderr

    def signal(self, number: signal.Signals) -> None:
        """Sends it to the first process, as a stop of the container does."""
        self._runc("kill", self._name, number.name.removeprefix("SIG"))

    def wait(self, seconds: float) -> int:
        """The exit code. Raises Failed if it has not ended by then."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"the container still runs after {seconds:.0f} s{self.words()}") from None

    def words(self) -> str:
        """The end of what it said, for messages."""
        return f"; its log ends:\n{self.log.read_text()[-2000:]}"

    def _runc(self, *words: str) -> str:
        return run([*self._runtime, *words])


def _confine(spec: dict[str, Any], rootfs: Path, user: str, cache: Path) -> None:
    uid, gid = (int(number) for number in user.split(":"))
    process = spec["process"]
    process["terminal"], process["noNewPrivileges"] = False, True
    process["user"] = {"uid": uid, "gid": gid}
    process["capabilities"] = {kind: [] for kind in process["capabilities"]}
    spec["root"] = {"path": str(rootfs), "readonly": True}
    namespaces = spec["linux"]["namespaces"]
    spec["linux"]["namespaces"] = [each for each in namespaces if each["type"] != "network"]
    # the network of this machine comes without its /sys
    spec["mounts"] = [each for each in spec["mounts"] if not each["destination"].startswith("/sys")]
    tmpfs = {"type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "size=256m"]}
    bound = {"type": "bind", "source": str(cache), "options": ["rbind", "rw"]}
    spec["mounts"] += [{"destination": "/tmp", **tmpfs}, {"destination": "/cache", **bound}]
