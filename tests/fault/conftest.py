"""A supervised engine that only counts, which leaves nothing behind."""

import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from engine.client_worker import WorkerEngine
from engine.config import EngineConfig

sys.path.insert(0, str(Path(__file__).parent))  # the worker process gets it too
from worker_support import FACTORY


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerEngine]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = WorkerEngine(EngineConfig(target="ok"), FACTORY, restart_delay=0.05, grace=1.0)
    await engine.start()
    yield engine
    await engine.close()
    assert list(tmp_path.iterdir()) == []
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]
    assert engine.pid is None
