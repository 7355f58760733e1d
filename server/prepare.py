"""What is checked here, before an engine is started: wrong names are then told in one line."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from engine.config import EngineConfig
from engine.models.builtin import NAME, builtin_draft
from engine.models.load import ModelError, load_config, load_tokenizer
from engine.pairing import default_options
from server.chat_template import check_template
from server.logprobs import fast_tokenizer


def prepare(config: EngineConfig) -> PreTrainedTokenizerBase:
    """The target's tokenizer. Models that are not here yet are fetched, with progress.

    Raises InvalidRequest for the drafter, the policy and the options, ModelNotFound or another ModelError for
    target and draft.
    """
    default_options(config)
    if config.draft not in ("none", "ngram", NAME) and not config.draft.startswith("self:"):
        load_config(config.draft, config.trust_remote_code)
    load_config(config.target, config.trust_remote_code)
    tokenizer = load_tokenizer(config.target, config.trust_remote_code)
    if config.draft == NAME:
        builtin_draft(config.target, tokenizer)
    try:
        fast_tokenizer(tokenizer)
        check_template(tokenizer)
    except ValueError as error:
        raise ModelError(f"model {config.target!r}: {error}") from error
    return tokenizer
