"""Puts an engine together from its config: models, KV pools, drafters, verifier."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from transformers import PreTrainedModel

from engine.config import EngineConfig
from engine.free_memory import free_memory
from engine.grammar import Grammars, vocabulary
from engine.kv.blocks import BlockManager
from engine.kv.pool import LayerShape, bytes_per_block
from engine.models import fingerprint, load
from engine.models.decoder import unsupported
from engine.models.offload import LayerStream
from engine.models.packed import PackedWeights
from engine.models.quantize import quantize_linears, shared_weights
from engine.models.reference import ReferenceRunner
from engine.models.runner import Runner
from engine.offloading import host_memory, offloaded, refuse
from engine.pairing import (
    ConfigError,
    default_drafter,
    default_options,
    draft_of,
    heads_of,
    load_draft_model,
    named_heads,
    refuse_strangers,
    shown,
)
from engine.speculation.drafters.base import Drafter
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.drafters.ngram import NgramDrafter
from engine.speculation.drafters.tree import TreeDrafter
from engine.speculation.heads import Head
from engine.speculation.load import Load
from engine.speculation.noise import CounterDraws, GumbelNoise, RandomSource
from engine.speculation.policy import Equipment, refusals
from engine.speculation.tree import rules
from engine.speculation.verifier import Verifier
from engine.types import ModelInfo

if TYPE_CHECKING:
    from engine.speculation.target_lane import TargetLane

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What `Engine` works with."""

    target: Runner
    drafters: dict[str, Drafter]
    verifier: Verifier
    blocks: BlockManager
    info: ModelInfo
    token_budget: int
    equipment: dict[str, Equipment]  # of policies, by drafter
    grammars: Grammars | None = None  # None: no structured output
    pair: dict[str, str] = field(default_factory=dict)  # fingerprints of target and draft


def build(config: EngineConfig) -> Parts:
    """Loads the models and makes the pools. Raises ConfigError, UnsupportedModel or load.ModelError."""
    device = load.pick_device(config.device)
    dtype = load.pick_dtype(config.dtype, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    refuse(config, device)
    offload, free_on_host = config.offload == "target", host_memory()
    named = named_heads(config)
    tokenizer = load.load_tokenizer(config.target, config.trust_remote_code)
    draft_of(config, tokenizer)  # before minutes of loading
    refuse_strangers(named, config, tokenizer)
    model = load.load_model(
        config.target,
        dtype=dtype,
        device="cpu" if offload else device,
        trust_remote_code=config.trust_remote_code,
    )
    vocab = min(load.real_vocab_size(tokenizer), int(model.config.get_text_config().vocab_size))
    eos_ids = load.ends_within(config.target, load.eos_token_ids(model, tokenizer), vocab)
    draft_model = load_draft_model(config, model, tokenizer, dtype, device)
    _quantize(config, model, draft_model)
    stream = offloaded(config, model, device, free_on_host) if offload else None
    packed: PackedWeights | None = {} if device.type == "cpu" and dtype == torch.float32 else None
    target = _runner(config, model, packed, stream)
    draft = None if draft_model is None else _runner(config, draft_model, packed)
    pair = {"target": fingerprint.of_model(config.target)}
    pair["draft"] = fingerprint.of_draft(config.draft, config.target, tokenizer) or config.draft
    heads = heads_of(named, pair, draft)
    runners = [target] if draft is None else [target, draft]
    max_model_len = config.max_model_len or target.context
    if max_model_len > target.context:
        raise ConfigError(f"max_model_len {max_model_len} is over the target's context of {target.context}")
    blocks = _count_blocks(config, runners, max_model_len, device)
    for runner in runners:
        runner.allocate(blocks)
    parts = assemble(
        config,
        target,
        draft,
        blocks=blocks,
        max_model_len=max_model_len,
        vocab=vocab,
        eos_ids=eos_ids,
        bos_id=tokenizer.bos_token_id,
        dtype=str(dtype).removeprefix("torch."),
        heads=heads,
    )
    parts.pair = pair
    try:
        parts.grammars = Grammars(vocabulary(tokenizer, vocab), eos_ids)
    except ValueError as error:
        log.warning("no structured output: %s", error)
    return parts


def _quantize(config: EngineConfig, target: PreTrainedModel, draft: PreTrainedModel | None) -> None:
    """Weight-only, in place. An early exit has its target's weights: it is quantized with it."""
    shared = shared_weights()
    of_draft = config.draft_quantization
    if of_draft != "none" and draft is None:
        raise ConfigError(f"draft_quantization {of_draft!r}: draft {config.draft!r} is no model")
    if of_draft == "none" and config.draft.startswith("self:"):
        of_draft = config.quantization
    for flag, model, kind in (
        ("quantization", target, config.quantization),
        ("draft_quantization", draft, of_draft),
    ):
        if model is None or kind == "none":
            continue
        if model.device.type == "cpu":
            log.warning("%s %s saves memory on a CPU, but every pass unpacks the weights: slow", flag, kind)
        try:  # a reduced embedding is read a row at a time: nothing is gained there
            quantize_linears(model, kind, skip=("embed_tokens",), shared=shared)
        except ValueError as error:
            raise ConfigError(f"{flag} {kind!r}: {error}") from error


class AnyRunner(Runner, Protocol):
    """A runner whose pool is still to be made."""

    shapes: dict[int, LayerShape]

    @property
    def dtype(self) -> torch.dtype: ...

    def allocate(self, blocks: int) -> None: ...


def _runner(
    config: EngineConfig,
    model: PreTrainedModel,
    packed: PackedWeights | None,
    stream: LayerStream | None = None,
) -> AnyRunner:
    """The fused runner where it can, the reference runner elsewhere. `stream`: of an offloaded model."""
    if config.runner != "reference":
        refused = _not_fused(model)
        if refused is None:
            from engine.models.fused import FusedRunner  # imports triton

            return FusedRunner(model, config.block_size, stream)
        if config.runner == "fused":
            raise ConfigError(f"runner 'fused': {refused}")
        if model.device.type == "cuda":
            log.warning("the reference runner serves %s: %s", type(model).__name__, refused)
    return ReferenceRunner(model, config.block_size, packed)


def _not_fused(model: PreTrainedModel) -> str | None:
    """Why the fused runner cannot run the model, or None."""
    if model.device.type != "cuda":
        return "it needs a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return unsupported(model)


def assemble(
    config: EngineConfig,
    target: Runner,
    draft: Runner | None,
    *,
    blocks: int,
    max_model_len: int,
    vocab: int,
    eos_ids: Seq[int],
    bos_id: int | None = None,
    dtype: str = "float32",
    random: RandomSource | None = None,
    heads: Mapping[str, Head] | None = None,
) -> Parts:
    """Parts around runners whose pools have `blocks` blocks. `random` replaces rejection sampling's draws.

    `heads`: of the policies that were taught for this pair, by policy.
    """
    manager = BlockManager(blocks, config.block_size, config.prefix_cache)
    noise = GumbelNoise(vocab, target.device)
    random = random or CounterDraws()
    drafters: dict[str, Drafter] = {}
    equipment: dict[str, Equipment] = {}
    absent: dict[str, str] = {}
    if config.draft != "none":
        drafters["ngram"] = NgramDrafter(target.device)
        equipment["ngram"] = Equipment(Load(target.device))
    if draft is not None:
        model = ModelDrafter(draft, manager, vocab, eos_ids, noise, random, config.max_sl)
        drafters["model"] = model
        equipment["model"] = own = Equipment(Load(target.device, model.loops), heads or {}, draft.hidden_size)
        lacking = {name: each.missing(own) for name, each in rules().items()}
        absent = {name: reason for name, reason in lacking.items() if reason is not None}
        drafters |= {
            name: TreeDrafter(each.equipped(own), model, max_model_len)
            for name, each in rules().items()
            if name not in absent
        }
        if draft.vocab_size < vocab:
            raise ConfigError(
                f"the vocabulary of draft {config.draft!r} has {draft.vocab_size} ids, the target's {vocab}: "
                "the draft could not read every token"
            )
    options, default = default_options(config), default_drafter(config, tuple(drafters), absent)
    refused = {name: refusals(each) for name, each in equipment.items()}
    if (reason := refused.get(default, {}).get(config.policy)) is not None:
        raise ConfigError(f"policy {config.policy!r} cannot govern drafter {default!r}: {reason}")
    info = ModelInfo(
        target=config.target,
        draft=None if draft is None else config.draft,
        vocab_size=vocab,
        max_model_len=max_model_len,
        eos_token_ids=tuple(eos_ids),
        bos_token_id=bos_id,
        dtype=dtype,
        device=str(target.device),
        kv_blocks=blocks,
        block_size=config.block_size,
        drafters=(*sorted(drafters), "none"),
        default_drafter=default,
        default_policy=config.policy,
        default_options={name: getattr(options, name) for name in options.__struct_fields__},
        max_sl=config.max_sl,
        refusals=refused,
        absent=absent,
        heads={kind: shown(head) for kind, head in (heads or {}).items()},
    )
    budget = config.token_budget or (2048 if target.device.type == "cuda" else 256)
    return Parts(target, drafters, Verifier(eos_ids, noise, random), manager, info, budget, equipment)


def target_lane(parts: Parts) -> TargetLane | None:
    """What runs short passes of the target with their verdict in one go; None where its kernel cannot run."""
    if getattr(parts.target, "kernel", None) is None:
        return None
    from engine.speculation.target_lane import TargetLane  # imports triton

    lane = TargetLane(cast(Any, parts.target), parts.info.vocab_size)
    lane.warm()
    return lane


def _count_blocks(
    config: EngineConfig, runners: list[AnyRunner], max_model_len: int, device: torch.device
) -> int:
    """KV blocks: as configured, or the memory fraction of what is free, but no more than rows can use."""
    size = sum(bytes_per_block(runner.shapes, config.block_size, runner.dtype) for runner in runners)
    longest = -(-max_model_len // config.block_size) + 1
    if config.kv_blocks is not None:
        blocks, origin = config.kv_blocks, "as configured"
    else:
        on_gpu = device.type == "cuda"
        free = free_memory(device)
        fraction = config.memory_fraction or (0.9 if on_gpu else 0.25)
        blocks = min(int(free * fraction) // size, config.max_num_seqs * longest)
        origin = (
            f"{fraction:.0%} of {free / 2**30:.1f} GiB free, at most what {config.max_num_seqs} rows can fill"
        )
    if blocks < longest:
        raise ConfigError(
            f"{blocks} KV blocks ({origin}) cannot hold one sequence of max_model_len {max_model_len}: "
            f"{longest} are needed; lower max_model_len or raise kv_blocks or memory_fraction"
        )
    log.info(
        "KV cache: %d blocks of %d tokens, %.2f GiB (%s)",
        blocks,
        config.block_size,
        blocks * size / 2**30,
        origin,
    )
    return blocks
