"""Heads: small trained networks that say how likely a draft token is accepted.

A head is two files, `<name>.json` (what it is, of which pair, how good) and `<name>.safetensors`
(its weights, named in the JSON by their SHA-256). It is taught by `disco-serve classifier train`
for one draft and one meaning of the features; `Head.check` refuses any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from engine.speculation.features import VERSION
from engine.speculation.policy import Equipment, Need, State
from engine.speculation.scoring import INPUTS, needs_of, width_of
from engine.types import CannotLoad

log = logging.getLogger(__name__)

FORMAT = 1
Kind = Literal["disco", "specdec_pp", "c2t", "logistic"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INPUTS_OF: dict[Kind, tuple[str, ...]] = {
    "disco": ("top", "entropy", "position"),
    "specdec_pp": ("hidden",),
    "c2t": ("top", "entropy", "position", "prob", "joint", "step"),
    "logistic": ("logit_largest", "logit_prob", "entropy", "log_joint", "step", "log_position"),
}
"""In this order. DISCO's and SpecDec++'s are fixed by their papers; C2T reads DISCO's besides its own."""
BUILTIN = Path(__file__).parents[1] / "builtin"


class HeadError(CannotLoad):
    """A head cannot be read, or is not for this draft."""


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model: how it was called, and `engine.models.fingerprint` of its files."""

    name: str
    fingerprint: Annotated[str, msgspec.Meta(min_length=1)]


class HeadOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chosen on validation for time. `threshold`: DISCO's tau or SpecDec++'s h."""

    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)]
    max_sl: Annotated[int, msgspec.Meta(ge=1, le=64)]
    min_sl: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The log-odds z becomes z / temperature + bias."""

    method: Literal["none", "temperature", "platt"]
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    bias: float = 0.0


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, eq=False):
    """One head. `judges`: the probability is of the token just drafted, or of the one fed before it.

    `hidden`: width of the draft's state, 0 if it is not read; `depth`: residual blocks. `seen`: digests
    of the prompts that it was taught or tuned on, which must not judge it.
    """

    format: int
    kind: Kind
    feature_version: int
    inputs: tuple[str, ...]
    judges: Literal["drafted", "fed"]
    hidden: Annotated[int, msgspec.Meta(ge=0)]
    depth: Annotated[int, msgspec.Meta(ge=0, le=16)]
    options: HeadOptions
    calibration: Calibration
    draft: Identity
    target: Identity
    data: dict[str, Any]
    scores: dict[str, Any]
    versions: dict[str, str]
    seen: tuple[str, ...] = ()
    weights_sha256: str = ""
    weights: dict[str, Tensor] = {}

    @property
    def needs(self) -> frozenset[Need]:
        """The signals that it reads."""
        return needs_of(self.inputs)

    def check(
        self, draft_fingerprint: str, feature_version: int = VERSION, hidden: int | None = None
    ) -> None:
        """Raises HeadError if this head was taught for another draft or other features.

        `hidden`: width of the draft's state; None: the draft does not tell it.
        """
        if self.draft.fingerprint != draft_fingerprint:
            raise HeadError(
                f"head {self.kind!r} was trained for the draft {self.draft.name!r} "
                f"(fingerprint {self.draft.fingerprint[:12]}), this draft is {draft_fingerprint[:12]}"
            )
        if self.feature_version != feature_version:
            raise HeadError(
                f"head {self.kind!r} reads features of version {self.feature_version}, "
                f"this installation computes version {feature_version}"
            )
        if self.hidden and hidden != self.hidden:
            has = "does not tell its state" if hidden is None else f"has one of width {hidden}"
            raise HeadError(
                f"head {self.kind!r} reads a hidden state of width {self.hidden}, the draft {has}"
            )

    def validate(self) -> None:
        """Raises HeadError for what does not belong together: format, inputs, shapes, NaN."""
        if self.format != FORMAT:
            raise HeadError(f"format {self.format} is not known, only {FORMAT}")
        unknown = [name for name in self.inputs if name not in INPUTS]
        if unknown or not self.inputs:
            raise HeadError(f"inputs: {unknown or 'none'}; known are {', '.join(INPUTS)}")
        if self.kind != "logistic" and self.inputs != INPUTS_OF[self.kind]:
            raise HeadError(
                f"inputs of kind {self.kind!r} are {', '.join(INPUTS_OF[self.kind])} in this order, "
                f"not {', '.join(self.inputs)}"
            )
        if ("hidden" in self.inputs) != (self.hidden > 0):
            raise HeadError(f"hidden is {self.hidden}, inputs are {', '.join(self.inputs)}")
        if self.judges == "fed" and self.kind != "specdec_pp":
            raise HeadError(f"kind {self.kind!r} judges the drafted token")
        if (self.kind == "specdec_pp") != (self.depth > 0):
            raise HeadError(f"depth {self.depth} does not fit kind {self.kind!r}")
        if not (math.isfinite(self.calibration.temperature) and math.isfinite(self.calibration.bias)):
            raise HeadError("calibration is not finite")
        self._check_weights()

    def _check_weights(self) -> None:
        features = width_of(self.inputs, self.hidden)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "std", "low", "high"), (features,))
        if self.kind in ("disco", "c2t"):
            width = self.weights["b1"].numel() if "b1" in self.weights else 0
            shapes |= {"w1": (width, features), "b1": (width,), "w2": (width,), "b2": (1,)}
        else:
            shapes |= {"w2": (features,), "b2": (1,)}
        if self.kind == "specdec_pp":
            shapes |= {"block": (features, features), "bias": (features,)}
        if self.weights.keys() != shapes.keys():
            odd = ", ".join(sorted(self.weights.keys() ^ shapes.keys()))
            raise HeadError(f"weights missing or not of kind {self.kind!r}: {odd}")
        for name, shape in shapes.items():
            value = self.weights[name]
            if value.dtype != torch.float32 or value.shape != shape or value.numel() == 0:
                dtype = str(value.dtype).removeprefix("torch.")
                raise HeadError(f"{name} is {dtype}{list(value.shape)}, wanted is float32{list(shape)}")
            if not bool(value.isfinite().all()):
                raise HeadError(f"{name} holds NaN or infinity")
        if not bool((self.weights["std"] > 0).all()) or bool(
            (self.weights["low"] > self.weights["high"]).any()
        ):
            raise HeadError("std must be positive and low at most high")

    def folded(self, device: torch.device) -> dict[str, Tensor]:
        """The weights as `engine.speculation.scoring.score` takes them: scaling and calibration folded in."""
        own = {name: value.double() for name, value in self.weights.items()}
        scale, shift = 1 / own["std"], -own["mean"] / own["std"]
        temperature, bias = self.calibration.temperature, self.calibration.bias
        found = {"low": own["low"], "high": own["high"], "w2": own["w2"] / temperature}
        found["b2"] = own["b2"] / temperature + bias
        if "w1" in own:
            found |= {"w1": (own["w1"] * scale).T, "b1": own["b1"] + own["w1"] @ shift}
        elif "block" in own:
            found |= {"scale": scale, "shift": shift, "bias": own["bias"]}
        else:
            found["b2"] = found["b2"] + (found["w2"] @ shift)
            found["w2"] = found["w2"] * scale
        ready = {name: value.to(device, torch.float32).contiguous() for name, value in found.items()}
        if "block" in own:  # a view: the blocks share one weight
            block = own["block"].T.to(device, torch.float32).contiguous()
            ready["blocks"] = block.expand(self.depth, -1, -1)
        return ready


def save_head(head: Head, path: Path) -> Path:
    """Writes `<path>.json` and `<path>.safetensors` and gives the JSON's path. Raises HeadError, OSError."""
    head.validate()
    stem = _stem(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    weights = tensor_bytes({name: value.contiguous() for name, value in head.weights.items()})
    told = {name: getattr(head, name) for name in head.__struct_fields__ if name != "weights"}
    told["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    for suffix, content in (
        (".safetensors", weights),
        (".json", msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n"),
    ):
        part = stem.with_name(stem.name + suffix + ".part")
        part.write_bytes(content)
        part.rename(stem.with_name(stem.name + suffix))
    return stem.with_name(stem.name + ".json")


def load_head(path: Path) -> Head:
    """The head at `path`: its JSON, its safetensors, or their common name. Raises HeadError."""
    stem = _stem(path)
    try:
        told = json.loads(stem.with_name(stem.name + ".json").read_bytes())
        raw = stem.with_name(stem.name + ".safetensors").read_bytes()
        head = msgspec.convert(told, Head)
        if hashlib.sha256(raw).hexdigest() != head.weights_sha256:
            raise HeadError("the weights are not those that the JSON names (SHA-256)")
        head = msgspec.structs.replace(head, weights=read_tensors(raw))
        head.validate()
    except HeadError as error:
        raise HeadError(f"head {str(path)!r}: {error}") from error
    except (OSError, ValueError, SafetensorError, msgspec.ValidationError) as error:
        raise HeadError(f"head {str(path)!r}: {' '.join(str(error).split())}") from error
    return head


def builtin_heads(draft: str, target: str, root: Path = BUILTIN) -> Mapping[str, Head]:
    """The shipped heads of a pair, by kind, found by the models' fingerprints; none if it has none.

    A damaged one is left out, with a warning: heads change speed alone. Raises HeadError for two of a kind.
    """
    found: dict[str, Head] = {}
    for path in sorted(root.glob("*/heads/*.json")):
        try:
            head = load_head(path)
        except HeadError as error:
            log.warning("a shipped head is damaged, its policy goes without: %s", error)
            continue
        if (head.draft.fingerprint, head.target.fingerprint) == (draft, target):
            if head.kind in found:
                raise HeadError(f"head {str(path)!r}: the pair has another of kind {head.kind!r}")
            if head.feature_version == VERSION:
                found[head.kind] = head
    return found


def _stem(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path


class HeadState(State):
    """A policy's state and its head's weights, which are fixed."""

    def __init__(self, tensors: Mapping[str, Tensor], head: Head, device: torch.device) -> None:
        super().__init__(tensors)
        self.head, self.weights = head, head.folded(device)


def missing_head(equipment: Equipment, kind: Kind) -> str | None:
    """Why a policy that needs a head of this kind cannot be served, or None."""
    head = equipment.heads.get(kind)
    if head is None and equipment.hidden is None:
        return f"it is for drafts of a model, with a head of kind {kind!r} trained for it"
    if head is None:
        return f"needs a head of kind {kind!r} trained for this draft (--head PATH)"
    if head.hidden and head.hidden != equipment.hidden:
        has = "does not tell it" if equipment.hidden is None else f"has {equipment.hidden}"
        return f"its head reads a hidden state of width {head.hidden}, the draft {has}"
    return None
