"""Decodes many rows in step, one token each, over a plain KV cache: for making text by the million.

Serving has the engine; here nothing is scheduled, paged or streamed: every row takes a token at
every step, and a row whose document ended begins another at the same column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from classifiers.distill.options import DistillError
from engine.models.attention import attend_dense

_NAME = "disco_lockstep"
_IGNORED = {"dropout", "position_ids", "cache", "use_cache", "is_causal"}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    decoder: LockstepDecoder = module.__dict__["lockstep"]
    return decoder.attend(module, query, key, value, mask, **kwargs), None


AttentionInterface.register(_NAME, _attention)


class LockstepDecoder:
    """A model whose rows all stand at one column. While in use, the model serves it alone."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        if not getattr(model, "_supports_attention_backend", False):
            name = type(model).__name__
            raise DistillError(f"{name} does not support attention functions in transformers")
        self.model, self.length = model, length
        self._attention_before = model.config._attn_implementation
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # [B, kv_heads, length, D] each
        self._column = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._columns = torch.arange(length, device=model.device)
        self._width = length
        model.config._attn_implementation = _NAME
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.__dict__["lockstep"] = self

    def close(self) -> None:
        """Gives the model back as it was."""
        self.model.config._attn_implementation = self._attention_before
        for module in self.model.modules():
            module.__dict__.pop("lockstep", None)
        self._cache.clear()

    @torch.inference_mode()
    def __call__(self, ids: Tensor, starts: Tensor, column: Tensor, width: int) -> Tensor:
        """Logits [B, V] after `ids` int64[B] at `column` int64[1], of documents begun at `starts` int64[B].

        `width` > column bounds the columns that are read.
        """
        self._column, self._width = column, width
        columns = self._columns[:width]
        mask = (columns >= starts[:, None]) & (columns <= column)
        logits: Tensor = self.model(
            input_ids=ids[:, None],
            position_ids=(column - starts)[:, None],
            attention_mask=mask[:, None, None, :],
            use_cache=False,
        ).logits
        return logits[:, -1]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **rest: Any,
    ) -> Tensor:
        """[B, heads, 1, D] over the cache -> [B, 1, heads, D]."""
        odd = sorted(name for name, given in rest.items() if given is not None and name not in _IGNORED)
        if odd or mask is None:
            raise DistillError(
                f"{type(self.model).__name__} asks its attention for {', '.join(odd) or 'no mask'}"
            )
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer not in self._cache:
            self._cache[layer] = self._empty(key), self._empty(value)
        keys, values = self._cache[layer]
        keys.index_copy_(2, self._column, key)
        values.index_copy_(2, self._column, value)
        if sliding_window is not None:
            mask = mask & (self._columns[: self._width] > self._column - sliding_window)
        rows, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        folded = query.view(rows, kv_heads, heads // kv_heads, dim)
        scale = dim**-0.5 if scaling is None else scaling
        keys, values = keys[:, :, : self._width], values[:, :, : self._width]
        return attend_dense(folded, keys, values, mask, scale, softcap).reshape(rows, 1, heads, -1)

    def _empty(self, like: Tensor) -> Tensor:
        rows, heads, _, dim = like.shape
        return like.new_zeros(rows, heads, self.length, dim)
