"""The command as Python runs it, and Ctrl-C before it has begun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from server.interrupts import ends_at_once

SMALL = ["--device", "cpu", "--kv-blocks", "64"]


@pytest.mark.parametrize("module", ["server", "server.cli"])
def test_python_runs_the_package_as_the_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"disco-serve {version('disco-serve')}\n")


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 1, 2)])
def test_a_server_whose_standard_streams_are_closed_starts_and_ends(
    closed: tuple[int, ...], tiny_llama: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = ["serve", "--target", str(tiny_llama), "--draft", "none", "--port", str(port), *SMALL]
    server = subprocess.Popen([sys.executable, "-m", "server", *serve], preexec_fn=lambda: closing(closed))
    try:
        until = time.monotonic() + 120
        while not answers(port):
            assert server.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


def closing(files: tuple[int, ...]) -> None:
    for each in files:
        os.close(each)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def run_with(module: str, happens: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A command in whose process something happens as it begins to import a module."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {happens}
sys.meta_path.insert(0, Finder())
sys.argv[1:] = {arguments!r}
from server.__main__ import main
main()
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def interrupted_at(module: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command whose process gets SIGINT as it begins to import a module."""
    done = run_with(module, "os.kill(os.getpid(), signal.SIGINT)", arguments)
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["typer", "pydantic", "classifiers.cli", "torch", "uvicorn"])
def test_ctrl_c_within_imports_ends_the_command_without_a_word(module: str, tiny_llama: Path) -> None:
    serve = ["serve", "--target", str(tiny_llama), "--draft", "none", "--port", "0"]
    assert interrupted_at(module, serve) == (130, "")


@pytest.mark.parametrize("command", ["serve", "generate hello", "models list", "models pull smollm2"])
def test_what_the_system_refuses_to_imports_is_told_in_one_line(command: str) -> None:
    """As without any writable folder for temporary files, which torch looks for."""
    done = run_with("torch", "raise FileNotFoundError(2, 'No usable temporary directory')", command.split())
    said = "disco-serve: [Errno 2] No usable temporary directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_ctrl_c_that_a_library_takes_for_a_failed_import_is_still_one(tiny_llama: Path) -> None:
    serve = ["serve", "--target", str(tiny_llama), "--draft", "none", "--port", "0"]
    code, said = interrupted_at("transformers.models.auto.tokenization_auto", serve)
    assert code == 130 and "Traceback" not in said


def test_sigint_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ends_at_once():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
