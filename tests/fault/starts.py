"""Faults that a start meets: damaged files, what does not belong together, too little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Start:
    """`harm` damages the model's folder and gives flags; `says`: what the last line must hold."""

    name: str
    what: str
    harm: Callable[[Path], list[str]]
    says: str


@dataclass
class Started:
    """What came of it."""

    name: str
    what: str
    exit_code: int | None
    seconds: float
    line: str
    wrong: list[str] = field(default_factory=list)


def _weights(model: Path) -> Path:
    return model / "model.safetensors"


def _truncated(model: Path) -> list[str]:
    os.truncate(_weights(model), _weights(model).stat().st_size // 2)
    return []


def _garbage(model: Path) -> list[str]:
    with _weights(model).open("r+b") as file:
        file.write(os.urandom(64))
    return []


def _missing(model: Path) -> list[str]:
    _weights(model).unlink()
    return []


def _lacking(model: Path) -> list[str]:
    from safetensors.torch import load_file, save_file

    held = load_file(_weights(model))
    held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, _weights(model), metadata={"format": "pt"})
    return []


def _config(model: Path) -> list[str]:
    (model / "config.json").write_text('{"model_type": "lla')
    return []


def _said(name: str, **values: Any) -> Callable[[Path], list[str]]:
    """One of the model's JSON files says something else."""

    def harm(model: Path) -> list[str]:
        said = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(said | values))
        return []

    return harm


def _written(name: str, content: str) -> Callable[[Path], list[str]]:
    def harm(model: Path) -> list[str]:
        (model / name).write_text(content)
        return []

    return harm


def _no_tokenizer(model: Path) -> list[str]:
    (model / "tokenizer.json").unlink()
    return []


def _draft(harm: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """A draft so damaged beside a sound target."""

    def harmed(model: Path) -> list[str]:
        draft = model.with_name("draft")
        shutil.copytree(model, draft)
        harm(draft)
        return ["--draft", str(draft)]

    return harmed


def _memory(model: Path) -> list[str]:
    return ["--kv-blocks", str(2**45)]


def _other_tokenizer(model: Path) -> list[str]:
    draft = model.with_name("draft")
    shutil.copytree(model, draft)
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ["--draft", str(draft)]


def _foreign_head(model: Path) -> list[str]:
    head = next((HERE.parents[1] / "engine/builtin").glob("*/heads/disco*.json"))
    return ["--draft", "self:1", "--head", str(head)]


def _damaged_head(model: Path) -> list[str]:
    head = next((HERE.parents[1] / "engine/builtin").glob("*/heads/disco*.json"))
    for suffix in (".json", ".safetensors"):
        shutil.copy(head.with_suffix(suffix), model.parent)
    os.truncate(model.parent / head.with_suffix(".safetensors").name, 100)
    return ["--draft", "self:1", "--head", str(model.parent / head.name)]


_CONFIG, _GENERATION = "config.json", "generation_config.json"
_ROPE = {"rope_type": "zzz", "rope_theta": 10000.0}
STARTS = (
    Start("truncated", "weights cut in half", _truncated, "cannot be loaded"),
    Start("garbage_weights", "weights overwritten with noise", _garbage, "cannot be loaded"),
    Start("missing", "no weights at all", _missing, "safetensors"),
    Start("lacking", "a weight is missing from the file", _lacking, "lack 1 weights"),
    Start("config", "config.json cut off", _config, "config"),
    Start("empty", "an empty file of weights", _written("model.safetensors", ""), "cannot be loaded"),
    Start("layers", "a config of fewer layers", _said(_CONFIG, num_hidden_layers=1), "hold 9 weights"),
    Start(
        "shapes", "a config of other shapes", _said(_CONFIG, num_key_value_heads=4), "k_proj.weight: (16, 32)"
    ),
    Start("context", "a config without a context", _said(_CONFIG, max_position_embeddings=0), "is 0"),
    Start("heads", "a config without heads", _said(_CONFIG, num_attention_heads=0), "num_attention_heads"),
    Start("rope", "a config with an unknown rope", _said(_CONFIG, rope_parameters=_ROPE), "self.rope_type"),
    Start("eos_kind", "an end that is no token id", _said(_CONFIG, eos_token_id="x"), "'eos_token_id'"),
    Start("eos", "an end outside the vocabulary", _said(_GENERATION, eos_token_id=9999), "eos_token_id 9999"),
    Start("generation", "generation_config.json is no JSON", _written(_GENERATION, "{"), _GENERATION),
    Start("no_tokenizer", "no tokenizer.json", _no_tokenizer, "tokenizer of"),
    Start("tokens", "tokenizer.json is no JSON", _written("tokenizer.json", "no"), "tokenizer.json"),
    Start("template", "a template that is none", _written("chat_template.jinja", "{{"), "does not compile"),
    Start("draft_truncated", "a draft's weights cut in half", _draft(_truncated), "cannot be loaded"),
    Start(
        "draft_layers",
        "a draft of fewer layers",
        _draft(_said(_CONFIG, num_hidden_layers=1)),
        "hold 9 weights",
    ),
    Start("draft_heads", "a draft without heads", _draft(_said(_CONFIG, num_attention_heads=0)), "heads"),
    Start("start_memory", "a KV pool larger than memory", _memory, "out of memory"),
    Start("tokenizer", "a draft with another tokenizer", _other_tokenizer, "does not share the tokenizer"),
    Start("foreign_head", "--head for another draft", _foreign_head, "was trained for the draft"),
    Start("damaged_head", "--head with damaged weights", _damaged_head, "SHA-256"),
)


def started(start: Start, device: str = "cpu") -> Started:
    """Runs `disco-serve serve` on it: it must end by itself, with code 1 and one line that says why."""
    with tempfile.TemporaryDirectory(prefix="disco-starts-") as folder:
        model = Path(folder, "tiny")
        subprocess.run(
            [sys.executable, str(HERE.parent / "suites" / "tiny_model.py"), str(model)],
            check=True, capture_output=True,
        )  # fmt: skip
        flags = start.harm(model)
        command = [sys.executable, "-m", "server", "serve", "--target", str(model), "--port", "0"]
        command += ["--device", device, *([] if "--draft" in flags else ["--draft", "none"]), *flags]
        begin = time.monotonic()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DISCO_")}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
            code, lines = done.returncode, done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            code, lines = None, ["it goes on"]
    line = lines[-1].replace(f"{folder}/", "") if lines else ""
    told = Started(start.name, start.what, code, time.monotonic() - begin, line)
    if code != 1:
        told.wrong.append(f"exit code {code}")
    if start.says not in told.line:
        told.wrong.append(f"it does not say {start.says!r}")
    if "Traceback" in "\n".join(lines) or "started again" in "\n".join(lines):
        told.wrong.append("\n".join(lines))
    print(
        f"{told.name:16} exit code {code}, {told.seconds:.1f} s, {len(lines)} lines; {told.line[:150]}",
        flush=True,
    )
    for wrong in told.wrong:
        print("  WRONG:", wrong, flush=True)
    return told
