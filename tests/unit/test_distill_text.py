"""The target's own text: every document is what the target would say alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, PreTrainedModel

from classifiers.distill.documents import Beginnings, beginnings, chat_frame, read_prompts
from classifiers.distill.generate import FRESH, QUESTION_TOKENS, SAMPLED, Wave, Writer
from classifiers.distill.options import DistillError
from classifiers.distill.text import Text, layout, save_wave

EOS = 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def documents(temperature: float = 0.0, opens: bool = False) -> Beginnings:
    ids = [[1, 40, 41], [1, 90], [1, 7, 8, 9, 10], [1, 200, 30, 31], [1, 60, 61]]
    return Beginnings(
        tokens=torch.tensor([each + [0] * (5 - len(each)) for each in ids]),
        lengths=torch.tensor([len(each) for each in ids]),
        open=torch.full((5,), opens),
        temperature=torch.full((5,), temperature),
        answer=torch.tensor([EOS, 11, 12]),
        kinds={},
    )


def write(
    model: PreTrainedModel,
    found: Beginnings,
    rows: int = 3,
    length: int = 40,
    answer: int = 9,
    waves: tuple[int, ...] = (0,),
    eos: int = EOS,
) -> list[Wave]:
    writer = Writer(model, found, rows=rows, length=length, answer_tokens=answer, eos_ids=(eos,), vocab=259)
    out = [writer.write(wave, seed=5) for wave in waves]
    writer.close()
    return out


def cut_documents(wave: Wave) -> list[tuple[list[int], list[int]]]:
    """Tokens and answer flags of every document."""
    found = []
    for tokens, flags in zip(wave.tokens.tolist(), wave.flags.tolist(), strict=True):
        starts = [i for i, flag in enumerate(flags) if flag & FRESH] + [len(tokens)]
        assert starts[0] == 0
        for a, b in itertools.pairwise(starts):
            found.append((tokens[a:b], [flag & SAMPLED for flag in flags[a:b]]))
    return found


def test_greedy_documents_are_the_targets_own(model: PreTrainedModel) -> None:
    """Each document, whatever stood before it in its row, continues its beginning as generate does."""
    (wave,) = write(model, documents())
    whole = cut_documents(wave)
    assert len(whole) > 6
    for tokens, flags in whole:
        begin = next((i for i, flag in enumerate(flags) if flag), None)
        if begin is None:
            continue
        prompt = torch.tensor([tokens[: begin + 1]])
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=EOS,
            suppress_tokens=list(range(259, 272)),
        )[0].tolist()
        assert tokens == expected[: len(tokens)]
        assert len(tokens) - begin - 1 <= 9


def test_answers_are_flagged_and_nothing_forced_is(model: PreTrainedModel) -> None:
    (wave,) = write(model, documents())
    for tokens, flags in cut_documents(wave)[:3]:
        begun = [each for each in documents().tokens.tolist() if each[:2] == tokens[:2]]
        assert begun
        assert not any(flags[: flags.index(SAMPLED)]) if SAMPLED in flags else True
    assert (wave.flags & SAMPLED).bool().any()


def test_a_document_ends_at_its_end_token(model: PreTrainedModel) -> None:
    """With the token that greedy text begins with as end token, answers are one token long."""
    first = cut_documents(write(model, documents())[0])[0]
    at = first[1].index(SAMPLED)
    end = first[0][at + 1]
    (wave,) = write(model, documents(), eos=end)
    tokens, flags = cut_documents(wave)[0]
    assert tokens == [*first[0][: at + 1], end]
    assert flags[at:] == [SAMPLED, 0]


def test_an_open_question_is_ended_and_answered(model: PreTrainedModel) -> None:
    found = documents(opens=True)
    (wave,) = write(model, found, length=QUESTION_TOKENS + 30, eos=258)
    for tokens, flags in cut_documents(wave):
        if SAMPLED not in flags:
            continue
        at = flags.index(SAMPLED)
        assert tokens[at - 2 : at + 1] == [EOS, 11, 12]
        assert not any(flags[:at])


def test_the_same_seed_writes_the_same_wave_alone_or_after_another(model: PreTrainedModel) -> None:
    found = documents(temperature=1.0)
    both = write(model, found, waves=(0, 1))
    (again,) = write(model, found, waves=(1,))
    assert torch.equal(both[1].tokens, again.tokens)
    assert torch.equal(both[1].flags, again.flags)
    assert not torch.equal(both[0].tokens, both[1].tokens)


def test_sampled_text_has_the_targets_law(model: PreTrainedModel) -> None:
    """The first answer token of one beginning, on many rows."""
    one = documents(temperature=0.7)
    same = Beginnings(
        one.tokens[:1].repeat(1500, 1), one.lengths[:1].repeat(1500), one.open[:1].repeat(1500),
        one.temperature[:1].repeat(1500), one.answer, {},
    )  # fmt: skip
    (wave,) = write(model, same, rows=1500, length=4)
    with torch.no_grad():
        law = (model(input_ids=one.tokens[:1, :3]).logits[0, -1, :259].double() / 0.7).softmax(-1)
    counts = torch.bincount(wave.tokens[:, 3].long(), minlength=259)
    likely = law > 0.005
    seen = [*counts[likely].tolist(), int(counts[~likely].sum())]
    expected = [*(law[likely] * 1500).tolist(), float(law[~likely].sum() * 1500)]
    assert chisquare(seen, expected).pvalue > 1e-4


def test_layout_separates_documents() -> None:
    flags = torch.tensor([[FRESH, 0, SAMPLED, FRESH, 0]], dtype=torch.uint8)
    positions, mask = layout(flags)
    assert positions.tolist() == [[0, 1, 2, 0, 1]]
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_text_counts_its_answers_and_takes_every_row_once(tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 5, 5, 6], [1, 7, 5, 9]], dtype=torch.int32)
    flags = torch.tensor([[FRESH, SAMPLED, SAMPLED, SAMPLED], [FRESH, 0, SAMPLED, 0]], dtype=torch.uint8)
    save_wave(tmp_path, 0, Wave(tokens, flags))
    save_wave(tmp_path, 1, Wave(tokens, flags))
    text = Text(tmp_path, 2, CPU)
    assert text.answered() == 6
    assert text.frequent(2, 10, (2,)).tolist() == [2, 5]  # 5 twice in each; 2 always
    assert text.covered(torch.tensor([5, 6]), 10) == pytest.approx(4 / 6)
    batches = [text.batch(step, 2, 0).tolist() for step in range(2)]
    assert sorted(row for batch in batches for row in batch) == [0, 1, 2, 3]
    assert batches == [text.batch(step, 2, 0).tolist() for step in range(2)]


def test_chats_show_the_template_and_open_ones_stop_inside(make_tokenizer: Callable[..., object]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (  # type: ignore[attr-defined]
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chat_frame(tokenizer) == ("<user>", "|<assistant>")  # type: ignore[arg-type]
    found = beginnings(tokenizer, 200, 0, (0.0, 1.0), (), CPU)  # type: ignore[arg-type]
    texts = [tokenizer.decode(ids[:n]) for ids, n in zip(found.tokens, found.lengths, strict=True)]  # type: ignore[attr-defined]
    assert any(found.open)
    for text, is_open in zip(texts, found.open, strict=True):
        if is_open:
            assert text.startswith("<user>")
            assert not text.endswith("<assistant>")
    assert set(found.temperature.tolist()) == {0.0, 1.0}
    assert tokenizer.decode(found.answer) == "|<assistant>"  # type: ignore[attr-defined]


def test_prompt_files_are_half_of_the_documents(make_tokenizer: Callable[..., object]) -> None:
    found = beginnings(make_tokenizer(), 400, 0, (0.0,), ("MINE",), CPU)  # type: ignore[arg-type]
    assert 140 < found.kinds["prompt file"] < 260


def test_prompt_files_are_read_or_refused_by_line(tmp_path: Path) -> None:
    lines, objects = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\n\ntwo\n")
    objects.write_text('{"prompt": "three"}\n')
    assert read_prompts([lines, objects]) == ["one", "two", "three"]
    objects.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_prompts([objects]) == ["a\u2028b"]
    lines.write_bytes(b"\xe9\n")
    with pytest.raises(DistillError, match=r"a.txt: not UTF-8"):
        read_prompts([lines])
    objects.write_text('{"prompt": "\\ud800"}\n')
    with pytest.raises(DistillError, match="surrogate"):
        read_prompts([objects])
    objects.write_text('{"prompt": "three"}\n{"text": 1}\n')
    with pytest.raises(DistillError, match=r"b.jsonl:2"):
        read_prompts([objects])
    lines.write_text("\n")
    with pytest.raises(DistillError, match="no prompt"):
        read_prompts([lines])
