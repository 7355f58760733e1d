"""Where a sequence ends: EOS, stop tokens, max_tokens, the context."""

from functools import cache
from typing import Any

import pytest
from tiny_engine import CONTEXT, MIN_BLOCKS, ask, make_engine, plain_greedy, prompt, run, static

from engine.types import InvalidRequest


@cache
def long_text() -> list[int]:
    return plain_greedy(prompt(10), 40)


def first_seen(after: int) -> int:
    """An index > after at which long_text has a token that it did not have before."""
    text = long_text()
    return next(i for i in range(after + 1, len(text)) if text[i] not in text[:i])


@pytest.mark.parametrize("kind", ["eos", "stop_token_ids"])
@pytest.mark.parametrize("sl", [0, 1, 3, 7])
def test_eos_inside_an_accepted_block_cuts_there(kind: str, sl: int):
    at = first_seen(2)
    stop = long_text()[at]
    engine = make_engine("same", eos=(stop,) if kind == "eos" else ())
    params: dict[str, Any] = {"max_tokens": 40} | ({} if kind == "eos" else {"stop_token_ids": (stop,)})
    result = run(engine, [ask("r", prompt(10), static(sl), logprobs=0, **params)])["r"]
    assert result.tokens == long_text()[: at + 1]
    assert (result.finish, result.events[-1].stop_token_id) == ("stop", stop)
    assert len(result.logprobs) == at + 1
    emitted, drafted = 1, []
    while emitted < at + 1:  # the draft is the target: everything stands, up to the end
        drafted.append(min(sl, at + 1 - emitted))
        emitted += sl + 1
    assert [event.accepted for event in result.events[1:]] == drafted
    assert [event.drafted for event in result.events[1:]] == [sl] * len(drafted)


@pytest.mark.parametrize("sl", [0, 3, 7])
def test_ignore_eos_goes_on(sl: int):
    stop = long_text()[first_seen(2)]
    engine = make_engine("same", eos=(stop,))
    result = run(engine, [ask("r", prompt(10), static(sl), max_tokens=30, ignore_eos=True)])["r"]
    assert (result.tokens, result.finish) == (long_text()[:30], "length")
    assert result.events[-1].stop_token_id is None


@pytest.mark.parametrize("draft", ["same", "near", "other"])
@pytest.mark.parametrize("sl", [0, 1, 5])
def test_min_tokens_keeps_eos_and_stop_ids_away(draft: str, sl: int):
    ends = [long_text()[0], long_text()[first_seen(2)], long_text()[first_seen(8)]]
    engine = make_engine(draft, eos=ends[:2])
    request = ask("r", prompt(10), static(sl), max_tokens=25, min_tokens=9, stop_token_ids=(ends[2],))
    result = run(engine, [request])["r"]
    expected = plain_greedy(prompt(10), 25, lambda n: ends if n < 9 else ())
    cut = next((i + 1 for i, token in enumerate(expected) if token in ends), 25)
    assert cut > 9
    assert result.tokens == expected[:cut]


@pytest.mark.parametrize("draft", ["same", "other", None])
def test_max_tokens_is_exact_at_every_lookahead(draft: str | None):
    engine = make_engine(draft)
    requests = [
        ask(f"{sl}/{most}", prompt(10), static(sl), max_tokens=most)
        for sl in (0, 1, 2, 5, 8)
        for most in (0, 1, 2, 3, 8, 9, 20)
    ]
    for name, result in run(engine, requests).items():
        most = int(name.partition("/")[2])
        assert (result.tokens, result.finish) == (long_text()[:most], "length"), name
        assert result.total("accepted") + result.total("iterations") + 1 == max(most, 1), name
        assert all(len(event.token_ids) >= 1 for event in result.events if most), name


@pytest.mark.parametrize("draft", ["same", "near", None])
@pytest.mark.parametrize("length", [1, 31, 32, 33, CONTEXT - 1])
def test_the_context_can_be_filled_to_its_last_place(draft: str | None, length: int):
    engine = make_engine(draft, blocks=MIN_BLOCKS)
    room = CONTEXT - length
    request = ask("r", prompt(length), static(7), max_tokens=room)
    result = run(engine, [request])["r"]
    assert (len(result.tokens), result.finish) == (room, "length")
    assert result.tokens == plain_greedy(prompt(length), room)
    with pytest.raises(InvalidRequest, match="context"):
        engine.add(ask("r", prompt(length), static(7), max_tokens=room + 1))
