"""The draft judged on held-out prompts while it learns: how often it chooses what the target chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifiers.acceptance import Iterations, greedy_match, overlap, static
from classifiers.distill.documents import Beginnings, chat_frame, encode
from classifiers.distill.generate import FRESH, SAMPLED, Wave, Writer
from classifiers.distill.options import DistillError, DistillOptions
from classifiers.distill.text import layout
from classifiers.heldout import Prompt, prompts

LOOKAHEADS = range(1, 9)
_ROWS = 8  # of a pass: whole laws are held


@dataclass(frozen=True)
class CategoryMarks:
    """`match`: share of positions where the draft's greedy choice is the target's; `overlap`: mean of
    1 - TV at temperature 1; `acceptance[k-1]`: accepted over drafted at static SL k, greedy."""

    positions: int
    match: float
    overlap: float
    acceptance: tuple[float, ...]


Marks = dict[str, CategoryMarks]


class Examiner:
    """Holds the target's own answers to the held-out prompts: greedy ones, and sampled at temperature 1."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: DistillOptions,
        eos_ids: tuple[int, ...],
        vocab: int,
    ) -> None:
        self._model, self._vocab = model, vocab
        self._prompts = prompts(options.eval_per_category)
        ids, length = held_out(options, tokenizer, model)
        self._waves = {
            temperature: self._write(ids, temperature, length, options.eval_tokens, eos_ids)
            for temperature in (0.0, 1.0)
        }

    def _write(
        self, ids: list[list[int]], temperature: float, length: int, tokens: int, eos_ids: tuple[int, ...]
    ) -> Wave:
        device = self._model.device
        width = max(map(len, ids))
        documents = Beginnings(
            tokens=torch.tensor([each + [0] * (width - len(each)) for each in ids], device=device),
            lengths=torch.tensor([len(each) for each in ids], device=device),
            open=torch.zeros(len(ids), dtype=torch.bool, device=device),
            temperature=torch.full((len(ids),), temperature, device=device),
            answer=torch.zeros(1, dtype=torch.int64, device=device),
            kinds={},
        )
        writer = Writer(
            self._model,
            documents,
            rows=len(ids),
            length=length,
            answer_tokens=tokens,
            eos_ids=eos_ids,
            vocab=self._vocab,
        )
        wave = writer.write(0, 0)
        writer.close()
        return Wave(_first_document(wave.tokens, wave.flags), _first_document(wave.flags, wave.flags))

    @torch.no_grad()
    def examine(self, student: PreTrainedModel) -> Marks:
        """Marks by category, in the order of the prompts."""
        matches = self._per_row(student, 0.0)
        overlaps = self._per_row(student, 1.0)
        marks: Marks = {}
        for category in dict.fromkeys(prompt.category for prompt in self._prompts):
            rows = [i for i, prompt in enumerate(self._prompts) if prompt.category == category]
            match = [matches[i] > 0 for i in rows]
            outcomes = [sum((static(each, k) for each in match), Iterations()) for k in LOOKAHEADS]
            marks[category] = CategoryMarks(
                positions=sum(map(len, match)),
                match=float(torch.cat(match).float().mean()),
                overlap=float(torch.cat([overlaps[i] for i in rows]).mean()),
                acceptance=tuple(each.acceptance or 0.0 for each in outcomes),
            )
        return marks

    def _per_row(self, student: PreTrainedModel, temperature: float) -> list[Tensor]:
        """float32[T] a prompt: whether the choice matches at temperature 0, 1 - TV at temperature 1."""
        wave, device = self._waves[temperature], self._model.device
        found: list[Tensor] = []
        for start in range(0, len(wave.tokens), _ROWS):
            ids = wave.tokens[start : start + _ROWS].to(device).long()
            flags = wave.flags[start : start + _ROWS].to(device)
            positions, mask = layout(flags)
            given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
            drafted = student(**given).logits[:, :-1, : self._vocab].float()
            if temperature:
                wanted = self._model(**given).logits[:, :-1, : self._vocab].float()
                values = overlap(wanted, drafted)
            else:
                values = greedy_match(drafted, ids[:, 1:]).float()
            at = (flags[:, :-1] & SAMPLED).bool()
            found += [value[own].cpu() for value, own in zip(values, at, strict=True)]
        return found


def held_out(
    options: DistillOptions, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[list[list[int]], int]:
    """The held-out prompts' ids, and the longest with its answer. Raises DistillError if that is too long."""
    ids = _encode(prompts(options.eval_per_category), tokenizer)
    length = max(map(len, ids)) + options.eval_tokens
    context = int(model.config.get_text_config().max_position_embeddings)
    if length > context:
        raise DistillError(
            f"held-out prompts and --eval-tokens need {length} tokens, the target has {context}"
        )
    return ids, length


def line(step: int, marks: Marks) -> str:
    """One line of marks: match and overlap, and acceptance at SL 1-8, by category."""
    parts = [
        f"{name} {each.match:.3f}/{each.overlap:.3f} [{' '.join(f'{a:.2f}' for a in each.acceptance)}]"
        for name, each in marks.items()
    ]
    return f"step {step}: " + ", ".join(parts)


def _encode(chosen: list[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    frame = chat_frame(tokenizer)
    texts = [
        frame[0] + prompt.text + frame[1] if frame is not None and prompt.chat else prompt.text
        for prompt in chosen
    ]
    return encode(texts, tokenizer)


def _first_document(values: Tensor, flags: Tensor) -> Tensor:
    """`values` with everything from a row's second document on set to 0: not an answer, not attended."""
    later = (flags & FRESH).bool().int().cumsum(1) > 1
    return values.masked_fill(later, 0)
