"""Prompts from files and from the hub, in our form and in those of well-known task sets."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from classifiers import heldout
from classifiers.data_files import DataError, Prompt, encode, read_data

HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "assert f(1) == 1",
}
MBPP = {"task_id": 9, "text": "Write f.", "code": "def f(): ...", "test_list": ["assert f(1)", "assert f(2)"]}
GSM8K = {"question": "What is 1 + 1?", "answer": "It is 2. #### 2"}
ALPACA = {"instruction": "Say hello.", "input": "", "output": "Hello."}
CNN = {"article": "It rained.", "highlights": "Rain.", "id": "0f3a"}
OURS = {"prompt": "Why?", "name": "why", "category": "questions"}


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def write(path: Path, *rows: Any) -> Path:
    """Rows as the suffix has them; text as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    inner = path.name.removesuffix(".gz")
    text = "\n".join(lines) if inner.endswith(".jsonl") else f"[{', '.join(lines)}]"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


FORMS: dict[str, tuple[dict[str, Any], Prompt]] = {
    "prompt": (OURS, Prompt("questions", "why", user("Why?"))),
    "text": ({"text": "Once upon"}, Prompt("some", "some/1", (), "Once upon")),
    "messages": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
        Prompt("some", "some/1", ({"role": "system", "content": "Be brief."}, *user("Why?"))),
    ),
    "other keys": ({"prompt": "Why?", "expected": "18", "n": 3}, Prompt("some", "some/1", user("Why?"))),
    "null": ({"prompt": "Why?", "text": None, "name": ""}, Prompt("some", "some/1", user("Why?"))),
    "humaneval": (HUMANEVAL, Prompt("humaneval", "HumanEval/7", (), "def f(x):\n")),
    "mbpp": (
        MBPP,
        Prompt(
            "mbpp",
            "9",
            user("Write f.\nYour code should pass these tests:\n\nassert f(1)\nassert f(2)"),
        ),
    ),
    "mbpp, sanitized": (
        {"prompt": "Write f.", "task_id": 2, "test_list": ["assert f(1)"], "test_imports": []},
        Prompt("mbpp", "2", user("Write f.\nYour code should pass these tests:\n\nassert f(1)")),
    ),
    "gsm8k": (GSM8K, Prompt("gsm8k", "some/1", user("What is 1 + 1?"))),
    "alpaca": (ALPACA, Prompt("alpaca", "some/1", user("Say hello."))),
    "alpaca, input": (
        ALPACA | {"input": "To Ida."},
        Prompt("alpaca", "some/1", user("Say hello.\n\nTo Ida.")),
    ),
    "cnn": (
        CNN,
        Prompt(
            "cnn_dailymail",
            "0f3a",
            user("Summarize the following article in three sentences.\n\nIt rained."),
        ),
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_told_by_their_keys(tmp_path: Path, form: str, suffix: str) -> None:
    row, expected = FORMS[form]
    path = write(tmp_path / f"some{suffix}", row)
    prompts, (source,) = read_data([str(path)])
    assert prompts == [expected]
    assert (source.name, source.prompts) == (f"some{suffix}", 1)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_one_after_the_other_and_the_first_of_each_category(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"text": "1"}, "", {"text": "2"}, {"text": "3", "category": "b"})
    b = write(tmp_path / "b.json", {"text": "4"}, {"text": "5\u20286"})
    prompts, sources = read_data([str(a), str(b)])
    assert [(each.name, each.text) for each in prompts] == [
        ("a/1", "1"), ("a/3", "2"), ("a/4", "3"), ("b/1", "4"), ("b/2", "5\u20286"),
    ]  # fmt: skip
    few, sources = read_data([str(a), str(b)], per_category=1)
    assert [each.text for each in few] == ["1", "3"]
    assert [source.prompts for source in sources] == [2, 0]


BAD: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "no json": ("x.jsonl", ({"text": "1"}, "{"), "line 2"),
    "no list": ("x.json.gz", (), "no entry"),
    "a number": ("x.jsonl", (7,), "entry 1: an object is wanted"),
    "two": ("x.jsonl", ({"text": "1", "prompt": "2"},), "it has prompt and text"),
    "none": ("x.jsonl", ({"txt": "1"},), "it has txt"),
    "nothing": ("x.jsonl", ({},), "it has nothing"),
    "empty": ("x.jsonl", ({"prompt": ""},), "entry 1: 'prompt' is empty"),
    "number for text": ("x.jsonl", ({"text": 5},), "entry 1: 'text' is empty or no text"),
    "messages": ("x.jsonl", ({"messages": [{"role": "user"}]},), "'content' is empty or no text"),
    "strings for messages": ("x.jsonl", ({"messages": ["Why?"]},), '"role" and "content"'),
    "no messages": ("x.jsonl", ({"messages": []},), "a list of objects"),
    "category": ("x.jsonl", ({"text": "1", "category": 3},), "'category' is empty or no text"),
    "mbpp": ("x.jsonl", ({"test_list": ["assert f(1)"]},), "'text' is empty or no text"),
    "article": ("x.jsonl", ({"article": ""},), "'article' is empty"),
    "suffix": ("x.csv", ("a",), "wanted is one of .jsonl"),
    "blank": ("x.jsonl", ("",), "no entry in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path: Path, case: str) -> None:
    name, rows, message = BAD[case]
    path = write(tmp_path / name, *rows)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read_data([str(path)])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.jsonl", b'{"text": "\xff"}'), ("x.jsonl.gz", b"no gzip"), ("x.json", b'{"text": "1"}')],
)
def test_bytes_that_are_no_data_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"data .*{re.escape(name)}"):
        read_data([str(path)])


def test_a_cut_gzip_and_a_missing_file_are_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.jsonl.gz", *[{"text": str(i) * 50} for i in range(999)]).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:50] + b"\0" * 40 + whole[90:]):
        (tmp_path / "x.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.jsonl\.gz"):
            read_data([str(tmp_path / "x.jsonl.gz")])
    with pytest.raises(DataError, match=r"nowhere\.jsonl: .*No such file"):
        read_data([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(DataError, match="no file is given"):
        read_data([])


# ---- the hub


class Hub(ModuleType):
    """Stands in for `datasets`; remembers what was asked of it."""

    def __init__(self, rows: list[Any], error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.error, self.asked, self.read = rows, error, (), 0

    def load_dataset(self, path: str, name: str | None = None, *, split: str, streaming: bool) -> Any:
        self.asked = (path, name, split)
        assert streaming
        if self.error:
            raise self.error
        for row in self.rows:
            self.read += 1
            yield row


PLACES = {
    "hub:openai_humaneval": ("openai/openai_humaneval", None, "test"),
    "hub:mbpp": ("google-research-datasets/mbpp", "full", "test"),
    "hub:mbpp:sanitized:train": ("google-research-datasets/mbpp", "sanitized", "train"),
    "hub:gsm8k": ("openai/gsm8k", "main", "test"),
    "hub:alpaca": ("tatsu-lab/alpaca", None, "train"),
    "hub:cnn_dailymail::validation": ("abisee/cnn_dailymail", "3.0.0", "validation"),
    "hub:someone/gsm8k": ("someone/gsm8k", "main", "test"),
    "hub:someone/else": ("someone/else", None, "train"),
}


@pytest.mark.parametrize("name", PLACES)
def test_hub_sets_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hub = Hub([GSM8K, GSM8K | {"question": "What is 2 + 2?"}, GSM8K])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    prompts, (source,) = read_data([name], per_category=2)
    assert hub.asked == PLACES[name]
    assert [each.messages[0]["content"] for each in prompts] == ["What is 1 + 1?", "What is 2 + 2?"]
    assert hub.read == 2  # no more is fetched than wanted
    assert (source.name, source.prompts, len(source.sha256)) == (name, 2, 64)
    hub.rows[0] = GSM8K | {"question": "What?"}
    _, (other,) = read_data([name], per_category=2)
    assert other.sha256 != source.sha256


def test_what_the_hub_refuses_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="--per-category"):
        read_data(["hub:gsm8k"])
    with pytest.raises(DataError, match="hub:NAME"):
        read_data(["hub:"], 1)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(DataError, match=r"pip install -e '.\[data\]'"):
        read_data(["hub:gsm8k"], 1)
    monkeypatch.setitem(sys.modules, "datasets", Hub([], ConnectionError("no route\nto it")))
    with pytest.raises(DataError, match=r"hub:gsm8k: ConnectionError: no route$"):
        read_data(["hub:gsm8k"], 1)
    monkeypatch.setitem(sys.modules, "datasets", Hub([]))
    with pytest.raises(DataError, match="no entry"):
        read_data(["hub:gsm8k"], 1)
    monkeypatch.setitem(sys.modules, "datasets", Hub([{"label": 1}]))
    with pytest.raises(DataError, match="hub:gsm8k, entry 1"):
        read_data(["hub:gsm8k"], 1)


# ---- as the target reads them


def test_messages_go_through_the_template_and_text_does_not(make_tokenizer: Any) -> None:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    messages = Prompt("a", "a/1", ({"role": "system", "content": "Be brief."}, *user("Why?")))
    text = Prompt("a", "a/2", (), "Once upon")
    assert tokenizer.decode(encode(messages, tokenizer)) == "Be brief.\n\nWhy?"
    loop = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = loop + "{% if add_generation_prompt %}[>]{% endif %}"
    assert tokenizer.decode(encode(messages, tokenizer)) == "[system]Be brief.[user]Why?[>]"
    assert tokenizer.decode(encode(text, tokenizer)) == "Once upon"
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(DataError, match="a/1: the target's chat template refuses it: no system"):
        encode(messages, tokenizer)


# ---- what ships


def test_the_examples_are_four_kinds_of_ten() -> None:
    prompts, (source,) = read_data(["examples"])
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.category, []).append(prompt)
    sizes = {name: len(some) for name, some in kinds.items()}
    assert sizes == dict.fromkeys(("code", "instructions", "summaries", "prose"), 10)
    assert source.name == "examples.jsonl"
    assert len({each.name for each in prompts}) == len(prompts)
    assert all(each.name.startswith(f"{each.category}/") for each in prompts)
    texts = {each.text or each.messages[0]["content"] for each in prompts}
    assert len(texts) == len(prompts)
    assert not texts & {each.text for each in heldout.prompts()}
