"""Every Triton kernel compiles for a Hopper GPU, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "compile_kernels.py"
KERNELS = {
    *("_scan", "_merge", "_masses", "_stand", "_residual", "_pick", "_advance", "_agree", "_attend"),
    *("_add_norm", "_gate", "_decide", "_limit", "_observe", "_classify"),
}


def test_all_compile_to_machine_code() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = os.pathsep.join(map(str, (SCRIPT.parents[1], SCRIPT.parent)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) >= KERNELS
