"""The engine's settings, apart from requests. Plain data: crosses the process border."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Quantization = Literal["none", "int8", "fp8", "int4"]
RunnerKind = Literal["auto", "fused", "reference"]
Offload = Literal["none", "target"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One engine process.

    `target`: a model reference (`engine.models.load`). `draft`: "none", "ngram", "default" (the one
    that ships for the target), "self:N" or a model reference. `drafter`, `policy` and `policy_options` are
    the default of requests that name none; without a `drafter` the best that there is drafts chains, and
    one that drafts trees takes the options itself. `heads` are files of trained heads for policies; those
    that ship for the pair are found by themselves. `policy_state` is a file for what policies learn over
    all requests; it is read at start and written now and then.
    `kv_blocks` None takes `memory_fraction` of what the models leave; `max_model_len` None is the
    target's own context. `token_budget` bounds the tokens of one target pass, so that a long
    prompt does not hold up the others. `memory_fraction` None: 0.9 on a GPU, 0.25 on a CPU.
    """

    target: str
    draft: str = "ngram"
    drafter: str | None = None
    policy: str = "goodput"
    policy_options: dict[str, Any] = {}
    heads: tuple[str, ...] = ()
    policy_state: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    max_model_len: int | None = None
    kv_blocks: int | None = None
    memory_fraction: float | None = None
    max_num_seqs: int = 64
    token_budget: int | None = None  # None: 2048 on a GPU, 256 on a CPU
    max_sl: int = 16
    prefix_cache: bool = True
    threads: int | None = None
    trust_remote_code: bool = False
    quantization: Quantization = "none"  # of the target's weights: another model, in the end
    draft_quantization: Quantization = "none"  # of the draft's: changes only what is accepted
    runner: RunnerKind = "auto"  # "auto": fused on a GPU where the model is of the Llama family
    offload: Offload = "none"  # "target": its layers are in pinned host memory and streamed in every pass
    resident_layers: int | None = None  # of an offloaded target, on the GPU; None: as many as fit
    offload_buffers: int = 2  # on the GPU, a layer each

    block_size: int = 16
