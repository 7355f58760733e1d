"""What lies free in the C library's heaps goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_CODE = """
import ctypes, sys
import psutil
from engine import heaps

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 64 << 10
blocks = [libc.malloc(size) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, size)
for block in blocks[:-1]:  # the last one is behind them all
    libc.free(block)
heaps._TIDY_SECONDS = float(sys.argv[1])
before = psutil.Process().memory_info().rss
heaps.Tidy().now_and_then()
print(before - psutil.Process().memory_info().rss)
"""


def given_back(seconds: float) -> int:
    """Bytes, of 125 MiB that lie free."""
    told = subprocess.run(
        [sys.executable, "-c", _CODE, str(seconds)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return int(told.stdout)


def test_what_lies_free_goes_back_once_it_is_time() -> None:
    assert given_back(-1.0) > 100 << 20
    assert given_back(60.0) < 10 << 20
