"""Where tokens go: answers, stop strings, clients that left, engines that died; nothing is kept for long."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from engine.types import StepStats, TokenEvent
from server.metrics_ledger import Ledger


class Books:
    """A ledger, and what it tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ledger = Ledger(self.registry)

    def step(self, tokens: int, *, name: str = "a", ends: bool = False, life: int = 0) -> None:
        event = TokenEvent(id=name, token_ids=(7,) * tokens, finish_reason="stop" if ends else None)
        self.ledger.on_step(StepStats(), [event], life)

    def left(self, *names: str, life: int = 0) -> None:
        self.ledger.on_step(StepStats(left=names), [], life)

    @property
    def generated(self) -> float:
        return self.registry.get_sample_value("disco_generated_tokens_total") or 0.0

    def discarded(self, reason: str) -> float | None:
        return self.registry.get_sample_value("disco_discarded_tokens_total", {"reason": reason})


def test_a_whole_answer_discards_nothing() -> None:
    books = Books()
    books.ledger.begin("a", 0)
    books.step(3)
    books.step(2, ends=True)
    books.ledger.settle("a", 5, "stop_string")
    assert books.generated == 5 and books.ledger.open == 0
    assert [books.discarded(reason) for reason in ("stop_string", "best_of", "aborted", "error")] == [0] * 4


def test_a_step_that_had_begun_before_the_cut_is_discarded_too() -> None:
    books = Books()
    books.ledger.begin("a", 0)
    books.step(6)
    books.ledger.settle("a", 4, "stop_string")  # the stop string took two
    assert books.discarded("stop_string") == 2 and books.ledger.open == 1
    books.step(3)
    assert books.discarded("stop_string") == 5
    books.left("a")
    assert books.ledger.open == 0 and books.generated == 9


def test_an_end_on_its_way_closes_the_account() -> None:
    books = Books()
    books.ledger.begin("a", 0)
    books.step(2)
    books.ledger.settle("a", 0, "aborted")
    books.step(1, ends=True)
    assert books.discarded("aborted") == 3 and books.ledger.open == 0
    books.left("a")  # the engine knew nothing of it any more
    assert books.discarded("aborted") == 3


def test_a_sequence_that_ended_waits_for_its_answer() -> None:
    books = Books()
    books.ledger.begin("a", 0)
    books.step(4, ends=True)
    assert books.ledger.open == 1  # another choice of the same answer still runs
    books.ledger.settle("a", 0, "error")
    assert books.discarded("error") == 4 and books.ledger.open == 0


def test_a_refused_sequence_and_one_never_begun_leave_nothing() -> None:
    books = Books()
    books.ledger.begin("a", 0)
    books.ledger.over("a")
    books.ledger.settle("a", 0, "error")
    books.ledger.settle("b", 0, "aborted")
    assert books.ledger.open == 0 and books.generated == 0


def test_a_dead_engine_gives_nothing_more() -> None:
    books = Books()
    for name in ("a", "b"):
        books.ledger.begin(name, 0)
        books.step(2, name=name)
    books.ledger.settle("a", 1, "stop_string")  # the engine dies before it has let go
    books.ledger.begin("c", 1)  # and a new one is asked
    books.step(3, name="c", life=1)
    assert books.ledger.open == 2
    books.ledger.settle("b", 0, "error")
    books.ledger.settle("c", 0, "aborted")
    books.step(1, name="c", life=1)
    books.left("c", life=1)
    assert books.ledger.open == 0
    assert (books.discarded("stop_string"), books.discarded("error"), books.discarded("aborted")) == (1, 2, 4)
    assert books.generated == 8


def test_candidates_that_lose() -> None:
    books = Books()
    books.ledger.discard(5, "best_of")
    assert books.discarded("best_of") == 5
