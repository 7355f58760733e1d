"""What a model's folder may hold: readable files, weights in safetensors, and nothing from elsewhere."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from engine.types import CannotLoad

_MODEL_FILES = (
    *("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.safetensors", "*.py"),
    "additional_chat_templates/*.jinja",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INDEX = ".safetensors.index.json"


class ModelError(CannotLoad):
    """A model cannot be served; the message says which and why."""


class ModelNotFound(ModelError):
    """Nothing answers to the reference; the message names what was tried."""


class UnsafeWeights(ModelError):
    """The weights are pickles, which run code when loaded; only safetensors are read."""


def check_folder(path: Path) -> None:
    """Raises ModelNotFound, UnsafeWeights or ModelError unless `from_pretrained` may read this folder."""
    for pattern in _MODEL_FILES:
        for file in path.glob(pattern):
            _check_file(file)
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"model directory {str(path)!r} has no config.json{_hint(path)}")
    if not any(path.glob("*.safetensors")):
        if any(found := sorted(f.name for pattern in _PICKLES for f in path.glob(pattern))):
            raise UnsafeWeights(
                f"model directory {str(path)!r} has no safetensors, only {', '.join(found)}: pickles can run "
                "code and are not loaded; convert them to safetensors first"
            )
        raise ModelNotFound(f"model directory {str(path)!r} has no *.safetensors{_hint(path)}")
    for index in sorted(path.glob(f"*{_INDEX}")):
        check_index(index)


def _check_file(file: Path) -> None:
    """transformers goes on without what is no file, and waits for whoever may write into a pipe."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ModelError(f"{str(file)!r} is no regular file")
    if not os.access(file, os.R_OK):
        raise ModelError(f"{str(file)!r} cannot be read: permission denied")


def check_index(index: Path) -> None:
    """transformers opens whatever file an index names, and unpickles it unless its name says safetensors.
    Raises UnsafeWeights for one that may not be opened, ModelError for an index that cannot be read."""
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{str(index)!r} is no index of weights: {why}") from error
    for name in sorted(named, key=str):
        check_weights_name(name, str(index))


def check_weights_name(name: object, by: str) -> None:
    """Raises UnsafeWeights unless the name, given in the file `by`, is of safetensors (or an index of them)
    in the model's own folder."""
    if isinstance(name, str) and name.endswith((".safetensors", _INDEX)) and name == Path(name).name:
        return
    raise UnsafeWeights(
        f"{by!r} names {name!r} as weights: only *.safetensors in the model's own folder are loaded"
    )


def _hint(path: Path) -> str:
    found = sorted(f.name for f in path.glob("*.gguf"))
    return f"; to load a GGUF name the file itself: {path / found[0]}" if found else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one if it only announces that; its type where
    there is no message."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    told = next((line.strip() for line in more if line.strip()), "")
    return f"{first.strip()} {told}" if told and first.rstrip().endswith(":") else first
