"""What goes with a target: its draft, checked to speak its tokens, and the trained heads of the pair."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.config import EngineConfig
from engine.models import builtin, fingerprint, load
from engine.models.draft import is_draft, read_config
from engine.models.runner import Runner
from engine.speculation.heads import Head, HeadError, builtin_heads, load_head
from engine.speculation.policy import options_of, policies
from engine.speculation.tree import rules, tree_options
from engine.types import CannotLoad, InvalidRequest

log = logging.getLogger(__name__)


class ConfigError(CannotLoad):
    """Settings that do not fit each other or the models."""


def default_options(config: EngineConfig) -> msgspec.Struct:
    """Those of requests that name nothing, checked: it needs no model. Raises InvalidRequest."""
    drafter, policy = config.drafter, options_of(config.policy, chain_options(config))
    if drafter is None or drafter == "none":
        return policy
    known = ("model", "ngram", "none", *sorted(rules()))
    if drafter not in known:
        raise InvalidRequest(
            f"unknown drafter {drafter[:64]!r}; known: {', '.join(known)}",
            "speculation.drafter",
            "unknown_drafter",
        )
    if config.draft == "none" or config.draft == "ngram" != drafter:
        why = f"drafter {drafter!r} cannot draft here: draft {config.draft!r} is no model"
        raise InvalidRequest(why, "speculation.drafter", "drafter_unavailable")
    return tree_options(drafter, config.policy_options) if drafter in rules() else policy


def chain_options(config: EngineConfig) -> dict[str, Any]:
    """The options that go with the default policy: those of a default drafter of trees are its own."""
    return {} if config.drafter in rules() else config.policy_options


def default_drafter(config: EngineConfig, drafters: Seq[str], absent: Mapping[str, str]) -> str:
    """Of an engine that has these. `absent`: why it has no others. Raises ConfigError."""
    if config.drafter is None:
        return next((name for name in ("model", "ngram") if name in drafters), "none")
    if (why := absent.get(config.drafter)) is not None:
        raise ConfigError(f"drafter {config.drafter!r} cannot draft here: {why}")
    return config.drafter


def named_heads(config: EngineConfig) -> dict[str, Head]:
    """The heads of the config by path, before models are loaded. Raises ConfigError, HeadError."""
    named: dict[str, Head] = {}
    for path in config.heads:
        if config.draft in ("none", "ngram"):
            raise ConfigError(f"head {path!r}: draft {config.draft!r} is no model to be judged")
        head = load_head(Path(path))
        if head.kind not in policies() and head.kind not in rules():
            raise ConfigError(f"head {path!r}: no policy reads a head of kind {head.kind!r}, nor a tree")
        if other := next((each for each, known in named.items() if known.kind == head.kind), None):
            raise ConfigError(f"heads {other!r} and {path!r} are both of kind {head.kind!r}: name one")
        named[path] = head
    return named


def refuse_strangers(
    named: Mapping[str, Head], config: EngineConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ConfigError if a named head was taught for another draft, before any model is loaded.

    A draft of a hub that is not here yet can be judged only once it is.
    """
    try:
        draft = fingerprint.of_draft(config.draft, config.target, tokenizer) if named else None
    except CannotLoad:
        return
    for path, head in named.items():
        try:
            head.check(draft or "", hidden=head.hidden)
        except HeadError as error:
            raise ConfigError(f"{path}: {error}") from error


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
    name = draft_of(config, tokenizer)
    if name is not None:
        return load.load_model(name, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code)
    if not config.draft.startswith("self:"):
        return None
    layers = config.draft.removeprefix("self:")
    if not layers.isdecimal():
        raise ConfigError(f"draft {config.draft!r}: self:N takes a number of layers, for example self:6")
    try:
        return load.early_exit(target, int(layers))
    except ValueError as error:
        raise ConfigError(f"draft {config.draft!r}: {error}") from error


def draft_of(config: EngineConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The reference of the draft that the config names, checked to speak the target's tokens: needs neither
    model. None if it is no model of its own."""
    name = config.draft
    if name in ("none", "ngram") or name.startswith("self:"):
        return None
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
    return name


def _other_digest(draft: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """None if the draft, which brings no tokenizer, was made for this one."""
    made_for, digest = read_config(draft).tokenizer_sha256, load.tokenizer_sha256(tokenizer)
    if made_for == digest:
        return None
    return f"its config names the tokenizer with SHA-256 {made_for or 'of nothing'}, the target's is {digest}"
