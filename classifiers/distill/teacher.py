"""The target as a teacher: its last hidden states, made once and kept where memory allows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from classifiers.distill.options import DistillError
from classifiers.distill.text import Text, layout
from engine.free_memory import free_memory

_SHARE = 0.7  # of the free memory, for hidden states
_ROWS = 64  # of a pass


class Teacher:
    """`weight` [V, H] and `bias` [V] of the target's head, rows in the order `ids` first, the rest after.

    Keeping a hidden state (H numbers) costs far less than a law (V numbers) and far less time than
    running the target again at every pass over the text.
    """

    def __init__(self, model: PreTrainedModel, text: Text, ids: Tensor | None, vocab: int) -> None:
        self._model, self._text = model, text
        head = model.get_output_embeddings()
        order = torch.arange(vocab) if ids is None else _first(ids, vocab)
        self.weight = head.weight.detach()[order.to(head.weight.device)]
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias.detach()[order.to(bias.device)]
        rows, length = text.tokens.shape
        size = rows * length * self.weight.shape[1] * self.weight.element_size()
        self._kept: Tensor | None = None
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if size <= _SHARE * free_memory(model.device):
            self._kept = self.weight.new_empty(rows, length, self.weight.shape[1])
            for start in range(0, rows, _ROWS):
                at = torch.arange(start, min(rows, start + _ROWS), device=model.device)
                self._kept[at] = self._run(at)

    @property
    def keeps(self) -> bool:
        """Whether the hidden states are kept rather than made again at every pass."""
        return self._kept is not None

    def hidden(self, rows: Tensor) -> Tensor:
        """[B, L, H] of the text's rows int64[B]."""
        return self._run(rows) if self._kept is None else self._kept[rows]

    @torch.no_grad()
    def _run(self, rows: Tensor) -> Tensor:
        positions, mask = layout(self._text.flags[rows])
        return hidden_states(self._model, self._text.tokens[rows].long(), positions, mask)


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """[B, L, H] after the final norm."""
    output = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _first(ids: Tensor, vocab: int) -> Tensor:
    rest = torch.ones(vocab, dtype=torch.bool)
    rest[ids] = False
    return torch.cat([ids, rest.nonzero()[:, 0]])


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """The logits must be the head over the last hidden state, and nothing more."""
    ids = torch.arange(8, device=model.device)[None] % int(model.config.get_text_config().vocab_size)
    whole = model(input_ids=ids, use_cache=False).logits.float()
    parts = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, parts.float(), rtol=1e-2, atol=1e-2):
        raise DistillError(
            f"{type(model).__name__} changes its logits after the head; it cannot teach a draft"
        )
