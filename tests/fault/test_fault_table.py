"""A miniature of the runs of `table.py` and `kills.py`: the harness works, and what it says holds."""

import asyncio
import sys
import tempfile
from contextlib import aclosing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import table
from kills import kill_again_and_again
from starts import STARTS, started

FEW = ("nan", "draft_nan", "memory", "cuda", "half_closed", "no_utf8")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("FAULTS", "")  # set within, and to be forgotten


def test_a_few_faults_harm_nobody_else():
    faults = [fault for fault in table.FAULTS if fault.name in FEW]

    async def injected() -> list[table.Row]:
        async with aclosing(table.run(faults, clients=3, ways=(True,))) as rows:
            return [row async for row in rows]

    rows = asyncio.run(injected())
    assert [row.fault for row in rows] == [fault.name for fault in faults]
    assert [row.lost for row in rows] == [[]] * len(rows)
    by_name = {row.fault: row for row in rows}
    assert (by_name["nan"].told, by_name["nan"].fine) == (1, 2)
    assert by_name["cuda"].restarts == 1 and by_name["memory"].restarts == 0


def test_kills_in_a_row_leave_nothing_behind():
    report = asyncio.run(kill_again_and_again(kills=4, streams=4, scripted=True))
    assert report.in_flight == 16 and report.told_so + report.finished == 16
    assert report.failures() == []


@pytest.mark.parametrize("name", ["truncated", "foreign_head"])
def test_a_start_that_cannot_be_ends_in_one_line(name: str):
    (start,) = [start for start in STARTS if start.name == name]
    assert started(start).wrong == []
