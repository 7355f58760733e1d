"""`disco-serve top`: pages of metrics, what changed between them, the frame, and servers that come and go."""

from __future__ import annotations

import math

import pytest
from fake_disco import Server, answering, drawn, lines, page, run, window
from rich.console import Console
from typer.testing import CliRunner

from server import cli, top
from server.top_frame import frame
from server.top_page import NotOurs, Page, quantile

# ---- pages and windows


@pytest.mark.parametrize("other", ["", "vllm:num_requests_running 3\n", "<html>nothing</html>", "a{b 1\n"])
def test_what_is_not_ours(other: str) -> None:
    with pytest.raises(NotOurs):
        Page(other, 0.0)


def test_rates_and_ratios_are_those_of_the_window() -> None:
    found = window(page(5, time=10.0), page(7, time=14.0))
    assert found.seconds == 4.0
    assert found.rate("generated_tokens_total") == pytest.approx(200)
    assert found.total("requests_total", outcome="stop") == 8
    assert found.ratio("prefix_cache_hit_tokens_total", "prefix_cache_queried_tokens_total") == 0.2
    (disco,) = found.speculated()  # static did nothing meanwhile
    assert (disco.policy, disco.drafter, disco.iterations, disco.emitted) == ("disco", "model", 200, 650)
    assert (disco.acceptance, disco.mean_sl, disco.mean_emitted) == (0.75, 3.0, 3.25)
    assert (disco.speedup, disco.precision, disco.recall) == (1.5, 0.75, 0.6)
    assert disco.phases == {"draft": 0.25, "verify": 0.75}


def test_counters_that_began_anew_count_from_zero() -> None:
    found = window(page(9), page(2, time=2.0))
    assert found.total("generated_tokens_total") == 800
    assert found.rate("prompt_tokens_total") == 100


def test_a_window_forgets_but_always_compares_two() -> None:
    found = window(*(page(i, time=float(i)) for i in range(11)), seconds=4.0)
    assert found.seconds == 4.0 and found.total("prompt_tokens_total") == 400
    found.add(page(20, time=1000.0))
    assert found.seconds == 990.0 and found.new.time == 1000.0


def test_one_page_has_no_rate() -> None:
    found = window(page(3))
    assert found.rate("generated_tokens_total") is None and found.quantiles("request_seconds") is None
    assert found.speculated() == []


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.5, 0.1), (0.25, 0.05), (0.7, 0.15), (0.9, 0.2), (0.95, math.inf)],
)
def test_quantiles_are_prometheus(share: float, wanted: float) -> None:
    assert quantile([(0.1, 5), (0.2, 9), (math.inf, 10)], share) == pytest.approx(wanted)


def test_quantiles_of_the_window() -> None:
    found = window(page(1), page(3, time=2.0)).quantiles("time_to_first_token_seconds")
    assert found is not None
    assert (found.count, found.p50, found.p90, found.p99) == (20, 0.1, pytest.approx(0.2), math.inf)


# ---- the frame


def test_a_frame() -> None:
    found = drawn(frame(window(page(1), page(3, time=2.0)), "ready, 0 restarts", "http://x"))
    for part in (
        "disco-serve 1.2.3 at http://x: ready, 0 restarts",
        "target big, draft small, dtype float32, device cpu; changes over 2.0 s",
        "running 3, waiting 2, in flight 5; ended: abort 2, stop 8",
        "generated 400.0, prompts 100.0; discarded: aborted 14",
        "25.0% (50 of 200 blocks), preemptions 2, prefix cache hits 20.0%",
        "disco, model: policy 75%, cap 25%",
    ):
        assert part in found, part
    rows = lines(frame(window(page(1), page(3, time=2.0)), "ready", "http://x"))
    assert rows["time"][4:] == ["100", "200", "over", "all", "buckets", "20"]
    assert rows["inter-token"][1:] == ["-", "-", "-", "0"]
    assert " ".join(rows["disco"]) == "disco model 200 650 75.0% 3.00 3.25 1.50 75.0% 60.0% 25%/75%/0%/0%"


def test_a_server_that_has_done_nothing_has_a_frame() -> None:
    empty = Page("disco_engine_up 0\n", 0.0)
    found = drawn(frame(window(empty), "the engine is loading", "http://x"))
    assert "the engine is loading" in found and "no model yet" in found and "none at work" in found


# ---- the command


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Server:
    return answering(monkeypatch)


def test_once_prints_one_frame_of_one_interval(fake: Server) -> None:
    result = run("--once")
    assert result.exit_code == 0, result.output
    assert "at http://x:1: ready, 2 restarts" in result.stdout
    assert "ended: abort 1, stop 4" in result.stdout
    assert fake.asked == ["http://x:1/metrics", "http://x:1/health"] * 2


def test_metrics_may_be_elsewhere(fake: Server) -> None:
    assert run("--once", "--metrics-url", "http://x:9/metrics").exit_code == 0
    assert fake.asked[:2] == ["http://x:9/metrics", "http://x:1/health"]


def test_an_engine_that_is_away_is_told(fake: Server) -> None:
    fake.health = 503
    assert "the engine is restarting" in run("--once").stdout


def test_a_server_that_is_not_there(fake: Server) -> None:
    fake.there = False
    result = run("--once")
    assert result.exit_code == 1 and "unreachable: [Errno 111] Connection refused" in result.stderr


def test_a_server_that_is_not_ours(fake: Server) -> None:
    fake.ours = False
    result = run("--once")
    assert result.exit_code == 1 and "no metrics of disco-serve" in result.stderr


def test_without_a_terminal_once_is_wanted(fake: Server) -> None:
    result = run()
    assert result.exit_code == 2 and "--once" in result.stderr and fake.asked == []


@pytest.mark.parametrize("url", ["http://x:port", "x:8000", "ftp://x"])
def test_urls_that_cannot_be(url: str) -> None:
    result = CliRunner().invoke(cli.app, ["top", "--url", url, "--once"])
    assert result.exit_code in (1, 2) and url in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_live_it_goes_on_where_a_server_comes_back(fake: Server) -> None:
    shown = []
    with top.Watched("http://x:1", "http://x:1/metrics", 30.0, 2.0) as watched:
        for there, ours in ((True, True), (False, True), (True, False), (True, True)):
            fake.there, fake.ours = there, ours
            shown.append(drawn(top._frame(watched, 2.0)))
    assert "ready" in shown[0]
    assert "unreachable" in shown[1] and "asking again every 2 s" in shown[1]
    assert "no metrics of disco-serve" in shown[2]
    assert "ready" in shown[3] and "ended: abort 2, stop 8" in shown[3]


def test_live_in_a_terminal_until_ctrl_c(fake: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 0

    def sleep(_: float) -> None:
        nonlocal frames
        frames += 1
        if frames == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    monkeypatch.setattr(Console, "is_terminal", True)
    result = run()
    assert result.exit_code == 0, result.output
    assert fake.rounds == 3 and "ended: abort 2, stop 8" in result.stdout
