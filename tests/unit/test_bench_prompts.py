"""What `disco-serve bench` sends: data sets in their forms, and words drawn by a seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench.prompts import DataError, on_the_wire, read_dataset, synthetic


def test_synthetic_prompts_are_a_function_of_the_seed() -> None:
    first = synthetic(20, 12, seed=1)
    assert first == synthetic(20, 12, seed=1) and first.texts[:5] == synthetic(5, 12, seed=1).texts
    assert first.texts != synthetic(20, 12, seed=2).texts
    assert len(set(first.texts)) == 20
    assert (first.unit, first.shortest, first.longest) == ("words", 12, 12)


def test_a_length_that_words_do_not_meet_is_missed_by_little() -> None:
    found = synthetic(4, 9, seed=1, tokens_of=lambda text: 2 * len(text.split()))
    assert found.unit == "tokens" and {found.shortest, found.longest} <= {8, 10}


ENTRIES = [
    {"prompt": "Name three rivers.", "category": "x"},
    {"text": "Once upon a time", "name": "y"},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}], "more": 1},
    {
        "id": "z",
        "conversations": [
            {"from": "gpt", "value": "cut off before"},
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": "Then"},
            {"from": "human", "value": "Go on"},
        ],
    },
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_datasets(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    lines = "\n\n".join(json.dumps(entry) for entry in ENTRIES)
    path.write_text(lines if suffix == ".jsonl" else json.dumps(ENTRIES))

    found = read_dataset(path)

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    assert found == [
        [user("Name three rivers.")],
        "Once upon a time",
        [{"role": "system", "content": "Be short."}, user("Hi")],
        [user("And then?")],
    ]
    assert on_the_wire(found, chat=True)[1] == [user("Once upon a time")]
    assert on_the_wire(found, chat=False)[1:3] == ("Once upon a time", "Be short.\n\nHi")


def test_our_own_tasks_can_be_sent() -> None:
    tasks = read_dataset(Path(__file__).parents[2] / "benchmarks" / "data" / "tasks.jsonl")
    assert len(tasks) > 100 and all(tasks)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path, text = tmp_path / "a.jsonl", "one\u2028two\u0085three"
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps({"text": text}, ensure_ascii=False) + "\r\n").encode() * 2)
    assert read_dataset(path) == [text, text]


def test_a_server_that_counts_oddly_makes_no_prompt_long() -> None:
    (text,) = synthetic(1, 9, seed=1, tokens_of=lambda _: 0).texts
    assert len(text.split()) <= 16 * 9


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", "wanted is .jsonl or .json"),
        ("a.jsonl", "\n", "no entry"),
        ("a.jsonl", "{", "line 1"),
        ("a.json", "{}", "list of objects"),
        ("a.jsonl", "3", "entry 1: an object is wanted"),
        ("a.jsonl", '{"question": "x"}', "it has question"),
        ("a.jsonl", '{"text": "x", "prompt": "y"}', "prompt and text"),
        ("a.jsonl", '{"text": " "}', "empty"),
        ("a.jsonl", '{"messages": []}', "messages"),
        ("a.jsonl", '{"messages": [5]}', "something else"),
        ("a.jsonl", '{"conversations": ["x"]}', "something else"),
        ("a.jsonl", '{"conversations": [{"from": []}]}', "entry 1"),
        ("a.jsonl", '{"text": "\\ud800"}', "half a character"),
        ("a.jsonl", "[" * 100_000, "line 1"),
        ("a.json", "[" * 100_000, "line 1"),
        ("a.jsonl", '{"\x1b": 1}', "line 1"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "content"),
        ("a.jsonl", '{"conversations": [{"from": "cat", "value": "x"}]}', "cat"),
        ("a.jsonl", '{"conversations": [{"from": "gpt", "value": "x"}]}', "no question"),
    ],
)
def test_datasets_that_cannot_be_used(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_dataset(path)
    assert str(raised.value).isprintable()
