"""The identity of a checkpoint: which weights something was measured with or taught on.

A head is taught on one draft; with another its probabilities mean nothing. Reading gigabytes at every
start would be slow, so large files are sampled: any retraining changes every part of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from engine.models import builtin
from engine.models.folder import ModelNotFound
from engine.models.load import load_tokenizer
from engine.models.references import resolve

_SAMPLES, _SAMPLE = 64, 1 << 16
_WEIGHTS = "*.safetensors"


def fingerprint(directory: Path) -> str:
    """SHA-256, in hex, of config.json and of every weight file's name, size and content.

    Of a file over 4 MiB, 64 evenly spaced pieces of 64 KiB are read, the first and the last among
    them. Raises ModelNotFound if config.json or weights are missing, OSError if they cannot be read.
    """
    config, weights = directory / "config.json", sorted(directory.glob(_WEIGHTS))
    if not config.is_file() or not weights:
        missing = _WEIGHTS if config.is_file() else config.name
        raise ModelNotFound(f"model {str(directory)!r} has no {missing}")
    digest = hashlib.sha256(hashlib.sha256(config.read_bytes()).digest())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in _starts(size):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    """Where the pieces begin: the whole file without gaps, if it is small."""
    if size <= _SAMPLES * _SAMPLE:
        return list(range(0, size, _SAMPLE))
    return [(size - _SAMPLE) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]


def of_model(reference: str) -> str:
    """`fingerprint` of what a reference names; a hub's model must be in its cache, as it is once loaded.

    Raises ModelNotFound or ModelError.
    """
    where = resolve(reference)
    if isinstance(where, Path):
        return fingerprint(where)
    try:
        found = snapshot_download(where, local_files_only=True, allow_patterns=["config.json", _WEIGHTS])
    except (LocalEntryNotFoundError, ValueError) as error:
        cache = constants.HF_HUB_CACHE
        raise ModelNotFound(f"model {reference!r} is not in the hub's cache ({cache})") from error
    return fingerprint(Path(found))


def of_draft(draft: str, target: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
    """The fingerprint of a target's draft as `EngineConfig.draft` names it; None if it is no model.

    "self:N" is the target's fingerprint and ":self:N". `tokenizer`: the target's, if it is loaded
    already. Raises ModelNotFound or ModelError.
    """
    if draft in ("none", "ngram"):
        return None
    if draft.startswith("self:"):
        return f"{of_model(target)}:{draft}"
    if draft == builtin.NAME:
        tokenizer = load_tokenizer(target) if tokenizer is None else tokenizer
        return fingerprint(builtin.builtin_draft(target, tokenizer))
    return of_model(draft)
