"""The drafts that ship with the package: `--draft default`.

Each lies in `engine/builtin/<alias>`, in the format of `engine.models.draft`, made for the target of
that alias; it fits any target with the same tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.models.draft import read_config
from engine.models.folder import ModelError
from engine.models.load import tokenizer_sha256
from engine.models.references import ALIASES

NAME = "default"
ROOT = Path(__file__).parents[1] / "builtin"
_FILES = ("config.json", "model.safetensors")


class NoBuiltinDraft(ModelError):
    """No shipped draft reads the target's tokens; the message names the targets that have one."""


def default_draft(target: str) -> str:
    """The draft of a target for which none is named: its shipped one, else "ngram"."""
    for alias in _here():
        if target in (alias, ALIASES[alias].hub_id):
            return NAME
    return "ngram"


def builtin_draft(target: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The directory of the shipped draft that reads this tokenizer's ids. Raises NoBuiltinDraft."""
    here = _here()
    digest = tokenizer_sha256(tokenizer)
    for alias in here:
        if read_config(ROOT / alias).tokenizer_sha256 == digest:
            return ROOT / alias
    fits = f"those with the tokenizer of {', '.join(here)}" if here else "none: this installation ships none"
    raise NoBuiltinDraft(f"draft {NAME!r} does not fit target {target!r}: targets that have one are {fits}")


def _here() -> list[str]:
    return [alias for alias in ALIASES if all((ROOT / alias / name).is_file() for name in _FILES)]
