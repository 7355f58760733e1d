"""What goes with a target: its draft, checked to speak its tokens, and the trained heads of the pair."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.config import EngineConfig
from engine.models import builtin, load
from engine.models.draft import is_draft, read_config
from engine.models.runner import Runner
from engine.speculation.heads import Head, HeadError, builtin_heads, load_head
from engine.speculation.policy import policies
from engine.types import CannotLoad

log = logging.getLogger(__name__)


class ConfigError(CannotLoad):
    """Settings that do not fit each other or the models."""


def named_heads(config: EngineConfig) -> dict[str, Head]:
    """The heads of the config by path, before models are loaded. Raises ConfigError, HeadError."""
    named: dict[str, Head] = {}
    for path in config.heads:
        if config.draft in ("none", "ngram"):
            raise ConfigError(f"head {path!r}: draft {config.draft!r} is no model to be judged")
        head = load_head(Path(path))
        if head.kind not in policies():
            raise ConfigError(f"head {path!r}: no policy reads a head of kind {head.kind!r}")
        if other := next((each for each, known in named.items() if known.kind == head.kind), None):
            raise ConfigError(f"heads {other!r} and {path!r} are both of kind {head.kind!r}: name one")
        named[path] = head
    return named


def heads_of(named: Mapping[str, Head], pair: Mapping[str, str], draft: Runner | None) -> Mapping[str, Head]:
    """The heads that ship for the pair, and those that were named, which come first: by kind."""
    if draft is None:
        return {}
    found = dict(builtin_heads(pair["draft"], pair["target"]))
    for path, head in named.items():
        try:
            head.check(pair["draft"], hidden=draft.hidden_size)
        except HeadError as error:
            raise ConfigError(f"{path}: {error}") from error
        found[head.kind] = head
    for kind, head in found.items():
        log.info("head for policy %s: taught on %s with %s", kind, head.target.name, head.draft.name)
    return found


def shown(head: Head) -> dict[str, Any]:
    """What the API tells of a head."""
    taught = {"draft": head.draft.name, "target": head.target.name, "data": head.data}
    return {**taught, "options": msgspec.to_builtins(head.options), "scores": head.scores}


def load_draft_model(
    config: EngineConfig,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel | None:
    """The draft that the config names, checked to speak the target's tokens."""
    name = config.draft
    if name in ("none", "ngram"):
        return None
    if name.startswith("self:"):
        layers = name.removeprefix("self:")
        if not layers.isdecimal():
            raise ConfigError(f"draft {name!r}: self:N takes a number of layers, for example self:6")
        try:
            return load.early_exit(target, int(layers))
        except ValueError as error:
            raise ConfigError(f"draft {name!r}: {error}") from error
    if name == builtin.NAME:
        try:
            name = str(builtin.builtin_draft(config.target, tokenizer))
        except builtin.NoBuiltinDraft as error:
            raise ConfigError(str(error)) from error
    where = load.resolve(name)
    if isinstance(where, Path) and is_draft(where):
        difference = _other_digest(where, tokenizer)
    else:
        difference = load.same_tokenizer(load.load_tokenizer(name, config.trust_remote_code), tokenizer)
    if difference is not None:
        raise ConfigError(f"draft {name!r} does not share the tokenizer of {config.target!r}: {difference}")
    return load.load_model(name, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code)


def _other_digest(draft: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """None if the draft, which brings no tokenizer, was made for this one."""
    made_for, digest = read_config(draft).tokenizer_sha256, load.tokenizer_sha256(tokenizer)
    if made_for == digest:
        return None
    return f"its config names the tokenizer with SHA-256 {made_for or 'of nothing'}, the target's is {digest}"
