"""The reference runner: any causal LM of transformers over the paged KV. The oracle of every test.

The model's own modules do everything but attention, which is `engine.models.attention`. At start
the runner proves itself against the model's own eager forward, or refuses the model by name.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from engine.kv.pool import KVPool, LayerShape
from engine.models import attention, selfcheck
from engine.models.packed import PackedWeights, can_pack, pack_linears
from engine.models.packed_llama import int8_layers, pack_llama_layers
from engine.models.runner import Batch
from engine.models.selfcheck import UnsupportedModel

AttentionInterface.register(attention.NAME, attention.paged_attention)

_IGNORED = {
    "dropout",
    "position_ids",
    "cache",
    "use_cache",
    "is_causal",
    "position_embeddings",
    "cache_position",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "past_key_values",
    "num_items_in_batch",
    "token_type_ids",
}
"""Keywords that change nothing in inference over a causal row. Any other that is set is refused."""


class ReferenceRunner:
    """Runs a transformers model over the paged KV.

    Built in two steps, so that memory can be measured between them: the constructor probes and
    checks the model, `allocate` makes the pool.
    """

    def __init__(self, model: PreTrainedModel, block_size: int, packed: PackedWeights | None = None) -> None:
        """`packed` not None packs the linear layers for the CPU. Raises UnsupportedModel."""
        self.model, self.block_size = model, block_size
        self.name = type(model).__name__
        self.shapes: dict[int, LayerShape] = {}
        self._pool: KVPool | None = None
        self.hidden: Tensor | None = None
        self._slots = torch.empty(0, dtype=torch.int64)  # of the batch at hand, as are the groups
        self._groups: list[attention.Group] = []
        if not getattr(model, "_supports_attention_backend", False):
            raise UnsupportedModel(f"{self.name} does not support attention functions in transformers")
        if (reason := selfcheck.batch_dependence(model)) is not None:
            raise UnsupportedModel(reason)
        expected = selfcheck.own_logits(model)
        model.config._attn_implementation = attention.NAME
        self._int8 = packed is not None and can_pack() and int8_layers(model)
        if packed is not None and can_pack():
            pack_llama_layers(model, packed)
            pack_linears(model, packed)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.__dict__["paged"] = self._attend
        self.hidden_size = self._watch_head()
        self._probe()
        exact = self.dtype in (torch.float32, torch.float64) and not self._int8
        selfcheck.check(self, self.name, block_size, expected, exact)
        self._pool = None

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def context(self) -> int:
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def allocate(self, blocks: int) -> None:
        """Makes the KV pool."""
        self._pool = KVPool(self.shapes, blocks, self.block_size, self.dtype, self.device)

    def warm(self, rows: int, longest: int) -> None:
        return None

    def move(self, pairs: Seq[tuple[int, int]]) -> None:
        assert self._pool is not None
        self._pool.move(pairs)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        inputs = batch.on_device(self.device)
        self._slots, self._groups = inputs.slots, attention.plan(batch, inputs, self.block_size)
        output = self.model(
            input_ids=inputs.ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            logits_to_keep=inputs.logits_at,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **rest: Any,
    ) -> Tensor:
        odd = sorted(name for name, given in rest.items() if given is not None and name not in _IGNORED)
        if odd or attention_mask is not None:
            raise UnsupportedModel(f"{self.name} asks its attention for {', '.join(odd) or 'a mask'}")
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self._pool is None:  # the probe: no KV yet, only its shape is wanted
            if layer in self.shapes:
                raise UnsupportedModel(f"{self.name} attends twice in layer {layer}")
            self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        self._pool.write(layer, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention.attend(self._groups, self._pool, layer, query[0], scale, sliding_window, softcap)[
            None
        ]

    def _watch_head(self) -> int | None:
        """Keeps the head's input of every pass in `hidden`; its width."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None

        def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self.hidden = given[0].reshape(-1, given[0].shape[-1])

        head.register_forward_pre_hook(keep)
        return int(self.model.config.get_text_config().hidden_size)

    def _probe(self) -> None:
        """Learns the KV shape of every layer from a pass without a pool."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            self.model(input_ids=ids, position_ids=ids, use_cache=False)
        if not self.shapes:
            raise UnsupportedModel(f"{self.name} has no attention layer that a paged KV could serve")
