"""What benchmarks/overload.py makes of a load's requests, and that an aim can be missed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import overload
from overload import Part, aims, part_of

from server.bench.exchange import Record
from server.bench.load import Outcome


def answer(sent: float, seconds: float, tokens: int = 10) -> Record:
    return Record(
        0, sent, first=sent + 0.1, last=sent + seconds, ended=sent + seconds, chunks=tokens, tokens=tokens
    )


def refusal(sent: float, seconds: float, error: str = "HTTP 429") -> Record:
    return Record(0, sent, ended=sent + seconds, error=error)


def test_rates_are_of_the_time_between_ramp_and_end() -> None:
    """Of ten seconds from 100 on the first two are the ramp; what ends after the arrivals is not counted."""
    good = [answer(100.0 + i, 1.5) for i in range(10)]
    part = part_of(Outcome(records=[*good, refusal(101.0, 0.01), refusal(102.0, 0.03)]), 10.0, 2.0)
    assert part.accepted == 10 and part.refused == 2
    assert part.offered == pytest.approx(1.2)
    assert part.requests_per_second == 8 / 8  # those sent at 101 to 108 end at 102.5 to 109.5
    assert part.tokens_per_second == 80 / 8
    assert part.whole == pytest.approx((1500.0, 1500.0))
    assert part.refusal == pytest.approx((20.0, 29.8, 30.0))
    assert part.others == {} and part.cpu_ms_a_token is None


def test_other_failures_are_no_refusals() -> None:
    part = part_of(Outcome(records=[answer(0.0, 1.0), refusal(0.0, 1.0, "HTTP 500")]), 10.0, 1.0, cpu=0.5)
    assert list(part.others) == ["HTTP 500: "] and part.refused == 0 and part.refusal is None
    assert part.cpu_ms_a_token == 50.0


def test_a_run_that_is_too_short_says_so() -> None:
    with pytest.raises(SystemExit, match="too short"):
        part_of(Outcome(records=[answer(0.0, 4.0)]), 4.0, 4.0)


CAPACITY = Part(10.0, 100, 10.0, 640.0, (50.0, 90.0), (10.0, 12.0), (1000.0, 1200.0), 0, None, {}, 1.0, None)
GOOD = replace(CAPACITY, offered=40.0, tokens_per_second=600.0, refused=300, refusal=(2.0, 20.0, 60.0))


def missed(during: Part, capacity: Part = CAPACITY) -> list[str]:
    return [aim.what for aim in aims([capacity, CAPACITY], during, slack=1.5) if not aim.holds]


def test_all_aims_can_hold() -> None:
    assert missed(GOOD) == []
    assert missed(replace(GOOD, refused=0, refusal=None)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens_per_second": 570.0}, "goodput"),
        ({"refusal": (2.0, 51.0, 60.0)}, "429"),
        ({"token": (15.1, 30.0)}, "time a token"),
        ({"whole": (1501.0, 1600.0)}, "end to end at p50"),
        ({"whole": (1100.0, 1801.0)}, "end to end at p99"),
        ({"others": {"HTTP 503": 1}}, "neither"),
    ],
)
def test_each_aim_can_be_missed(change: dict[str, object], said: str) -> None:
    (found,) = missed(replace(GOOD, **change))
    assert said in found


def test_a_capacity_that_refuses_is_none() -> None:
    (found,) = missed(GOOD, replace(CAPACITY, refused=1))
    assert "refused at capacity" in found


def test_it_starts_with_flags_that_the_server_has() -> None:
    from server.settings import Settings

    names = {flag.removeprefix("--").replace("-", "_") for flag in overload._FLAGS if flag.startswith("--")}
    assert names <= set(Settings.model_fields)
