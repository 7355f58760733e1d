"""A prompt's tokens as the target reads them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


class TemplateRefusal(ValueError):
    """What the target's chat template says against a conversation."""


def prompt_ids(
    messages: Seq[Mapping[str, str]], text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Messages through the chat template; without any, or without a template, `text` with the tokenizer's own
    special tokens. May be none. Raises TemplateRefusal."""
    chat = bool(messages) and bool(tokenizer.chat_template)
    if chat:
        asked = [dict(message) for message in messages]
        try:
            text = str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateRefusal(str(error)) from error
    return tuple(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])
