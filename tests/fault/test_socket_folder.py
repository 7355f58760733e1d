"""What a killed server leaves in the temporary directory is taken away by the next one, and nothing else."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine.socket_folder import socket_folder

HOLDER = """
import sys
from engine.socket_folder import socket_folder
with socket_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_private_and_gone_afterwards(temporary: Path):
    with socket_folder() as folder:
        assert folder.parent == temporary and folder.stat().st_mode & 0o077 == 0
        (folder / "0").touch()
    assert list(temporary.iterdir()) == []


def test_a_killed_servers_folder_is_swept_and_a_living_ones_stays(temporary: Path):
    dead, left = holder(temporary)
    living, held = holder(temporary)
    try:
        (left / "0").touch()
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert left.exists()
        with socket_folder() as mine:
            assert {*temporary.iterdir()} == {held, mine}
    finally:
        for each in (dead, living):
            each.kill()
            each.communicate()


def test_what_is_no_such_folder_is_left_alone(temporary: Path):
    others = [temporary / "disco-engine-without-a-lock", temporary / "else"]
    for other in others:
        other.mkdir()
    (temporary / "disco-engine-file").touch()
    (temporary / "disco-engine-link").symlink_to(temporary / "else")
    before = {*temporary.iterdir()}
    with socket_folder() as mine:
        assert {*temporary.iterdir()} == before | {mine}
    assert {*temporary.iterdir()} == before
