"""What must hold after a soak, each with what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from suites.compared import Line, Samples, lines, total

from soaking.load import GONE, Outcome
from soaking.processes import Slope, Standing
from soaking.questions import KINDS, Question

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


@dataclass(frozen=True)
class Held:
    """One thing that must hold. `limit` says where it ends."""

    what: str
    found: str
    limit: str
    holds: bool


def books(outcome: Outcome, counted: Samples, exact: bool) -> list[Line]:
    """Tokens and sequences of the answers, and answers by route and status, as /metrics has them.

    `exact`: every request was of those that `accounts.whole` lets through.
    """
    asks = [question.ask for question in outcome.asked]
    found = lines(asks, outcome.told, counted, exact)
    name = "disco_http_requests_total"
    seen = {key[1:] for key, value in counted.items() if key[0] == name and key[1] in ROUTES and value}
    for route, status in sorted(seen | set(outcome.answers)):
        metrics, least = counted.get((name, route, status), 0), outcome.answers[route, status]
        most = least + (outcome.unsure[route] if status == str(GONE) else 0)
        found.append(Line(f"{route} {status}", min(max(metrics, least), most), metrics))
    return [*found, Line("engine restarts", 0, total(counted, "disco_engine_restarts_total"))]


def agreeing(name: str, found: Sequence[Line]) -> Held:
    """All of the lines."""
    wrong = [line for line in found if not line.agrees]
    said = ", ".join(f"{x.what}: {x.answers:g} by the clients, {x.metrics:g} by /metrics" for x in wrong)
    return Held(f"counts, {name}", said or f"{len(found)} agree", "all agree", not wrong)


def answers(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]]) -> Iterator[Held]:
    """What the clients saw, over all stretches."""
    compared = sum((outcome.compared.total() for outcome in outcomes), 0)
    differing = sum(len(outcome.differing) for outcome in outcomes)
    yield Held(
        "seeded answers that differ from those alone", f"{differing} of {compared}", "0", not differing
    )
    missing = [kind for kind in KINDS if not sum(outcome.compared[kind] for outcome in outcomes)]
    missing += ["/".join(pair) for pair in pairs if not sum(outcome.pairs[pair] for outcome in outcomes)]
    missing += [kind for kind in ("left", "refused") if not sum(outcome.kinds[kind] for outcome in outcomes)]
    said = f"all but {', '.join(missing)}" if missing else f"all, {len(pairs)} pairs"
    yield Held("kinds, drafters and policies that took part", said, "all", not missing)
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    yield Held("unexpected answers", str(len(faults)), "0", not faults)
    errors = sum(outcome.server_errors for outcome in outcomes)
    yield Held("answers of 500 and above", str(errors), "0", not errors)
    late = sum(len(outcome.late) for outcome in outcomes)
    yield Held("requests that hung", str(late), "0", not late)


def flat(role: str, found: Slope, limit: float) -> Held:
    """Memory does not grow: the slope and twice its error are within the limit, in MiB an hour."""
    said = f"{found.per_hour:+.1f} +- {found.error:.1f} MiB/h"
    holds = found.per_hour + 2 * found.error <= limit
    return Held(f"resident memory, {role}", said, f"slope + 2 errors <= {limit:g} MiB/h", holds)


def nothing_kept(before: Standing, after: Standing, slack: int) -> Iterator[Held]:
    """Of files, threads and processes there are no more than before, but for `slack` of each role's."""
    parts: tuple[tuple[str, dict[str, int], dict[str, int], int], ...] = (
        ("file descriptors", before.descriptors, after.descriptors, slack),
        ("threads", before.threads, after.threads, slack),
        ("processes", before.processes, after.processes, 0),
    )
    for what, old, new, more in parts:
        for role in sorted(old | new):
            was, now = old.get(role, 0), new.get(role, 0)
            yield Held(f"{what}, {role}", f"{was} -> {now}", f"<= {was + more}", now <= was + more)


def as_record(question: Question) -> dict[str, Any]:
    """A request for the record: enough to send it again."""
    return {"kind": question.kind, "path": question.ask.path, "body": question.ask.body}
