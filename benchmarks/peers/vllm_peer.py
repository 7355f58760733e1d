"""vLLM under the same load: starts `vllm serve` on a local checkpoint, measures it, stops it.

    python benchmarks/peers/vllm_peer.py --model DIR --streams 1 4 16 32 -- --no-enable-prefix-caching

vLLM may be installed in an environment of its own: only its command is used. Where there is none, says so
and exits with code 2. Prompts go as token ids, so that every server reads the same ones. What comes
after `--` is handed to `vllm serve` as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, for what lies in benchmarks/

from http_load import add_load_options, keep, measure_all, show

from peers.streams import LoadError

NAME = "peer"
"""What the served model is called."""


class ServeError(Exception):
    """The server did not come up; the message has the end of its log."""


def find(command: str | None = None) -> Path | None:
    """vLLM's command: the given one, else the one beside this Python, else the one on the path."""
    if command is not None:
        found = shutil.which(command)
    else:
        found = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
    return None if found is None else Path(found)


@contextmanager
def serving(
    command: Path, checkpoint: Path, flags: Sequence[str] = (), timeout: float = 900.0
) -> Iterator[str]:
    """The base URL of `vllm serve` on a checkpoint's directory, once it is healthy; stopped afterwards.

    Raises ServeError if it ends or takes longer than `timeout` seconds, ValueError for a directory
    without a checkpoint.
    """
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"model {checkpoint}: no directory of a checkpoint")
    port = _free_port()
    root = f"http://127.0.0.1:{port}"
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [command, "serve", checkpoint, *where, *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: its engine's processes are stopped with it
        )
        try:
            _wait(process, root, timeout, log)
            yield f"{root}/v1"
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], root: str, timeout: float, log: IO[bytes]) -> None:
    """Returns when the server is healthy. Raises ServeError if it will not be."""
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        try:
            if httpx.get(f"{root}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        if time.monotonic() > deadline:
            raise ServeError(f"vllm serve is not healthy after {timeout:g} s:\n{_tail(log)}")
        time.sleep(0.2)
    raise ServeError(f"vllm serve ended with exit code {process.returncode}:\n{_tail(log)}")


def _tail(log: IO[bytes], lines: int = 30) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server's process group, kindly at first."""
    for sign, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def version_of(url: str) -> str | None:
    """What the server at a base URL calls its version."""
    answer = httpx.get(f"{url.removesuffix('/v1')}/version", trust_env=False)
    return str(answer.json()["version"]) if answer.status_code == 200 else None


def main() -> None:
    args = _arguments()
    command = find(args.vllm)
    if command is None:
        print("vllm is not installed")
        raise SystemExit(2)
    flags = list(args.flags)
    if args.speculative_config is not None:
        flags += ["--speculative-config", args.speculative_config]
    args.tokenizer = args.tokenizer or str(args.model)
    try:
        with serving(command, args.model, flags, args.start_timeout) as url:
            version = version_of(url)
            rows = measure_all(args, url, NAME)
    except (LoadError, ServeError, ValueError) as error:
        raise SystemExit(f"no figures: {error}") from error
    show(rows, f"vLLM {version}, {args.model.name}: {args.tokens} tokens a request")
    keep(args, rows, what=__doc__, vllm=version)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a directory with a checkpoint")
    parser.add_argument("--vllm", help="vLLM's command; default: the one of this environment or on the path")
    parser.add_argument("--speculative-config", help="JSON, vLLM's flag of that name")
    parser.add_argument("--start-timeout", type=float, default=900.0, help="seconds until it is healthy")
    parser.add_argument("flags", nargs="*", help="after --: flags of vllm serve")
    add_load_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
