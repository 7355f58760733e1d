"""What is wrong with a model's files, told in one line that names the model, the file or the weight."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from engine.models.draft import is_draft, read_config
from engine.models.folder import ModelError, check_weights_name, first_line
from engine.models.references import quiet, resolve
from engine.types import CannotLoad

log = logging.getLogger(__name__)

_JSON = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
# Errors whose message is a name or a number at most: the line of code that met it says more.
_BARE = (LookupError, ArithmeticError, AttributeError, AssertionError, TypeError)
_READERS = ("configuration_", "modeling_", "tokenization_")
# Beside what transformers itself lists: tables that old versions saved, layers that predict several tokens.
_HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(masked_)?bias$"
    r"|(^|\.)position_ids$|(^|\.)mtp([._]|$)"
)
_TOWERS = re.compile(r"vision|visual|image|audio|speech|multi_modal|mm_|projector|talker|token2wav|code2wav")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def reason(error: Exception) -> str:
    """The error's type and message in one line, and where it was met if these do not say what is wrong."""
    told = f"{type(error).__name__}: {first_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, _BARE) or not frames:
        return told
    readers = [each for each in frames if Path(each.filename).name.startswith(_READERS)]
    frame = (readers or frames)[-1]
    if (frame.line or "").startswith("raise "):  # it was put into words
        return told
    return f"{told}, at `{frame.line}` in {Path(frame.filename).name}"


def load_config(reference: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a reference, checked as far as that needs no weights.

    Raises ModelNotFound, UnsafeWeights or ModelError, which names the file.
    """
    where = resolve(reference)
    if isinstance(where, Path):
        _check_json(reference, where)
    config: PreTrainedConfig
    with quiet(progress=False):
        try:
            if isinstance(where, Path) and is_draft(where):
                config = read_config(where)
            else:
                config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
            context = getattr(config.get_text_config(), "max_position_embeddings", None)
        except CannotLoad:
            raise
        except Exception as error:  # a broken file breaks its readers in many ways
            raise ModelError(f"model {reference!r}: config.json: {reason(error)}") from error
    if (weights := getattr(config, "transformers_weights", None)) is not None:
        check_weights_name(weights, f"config.json of {reference}")
    if isinstance(context, int) and context < 1:
        raise ModelError(
            f"model {reference!r}: config.json: max_position_embeddings is {context}: no prompt could fit"
        )
    return config


def _check_json(reference: str, directory: Path) -> None:
    """transformers goes on without some of these files if it cannot read them."""
    for name in _JSON:
        try:
            found = json.loads((directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"model {reference!r}: {name}: {first_line(error)}") from error
        if not isinstance(found, dict):
            raise ModelError(f"model {reference!r}: {name} holds no JSON object")


def check_weights(
    reference: str, config: PreTrainedConfig, model: nn.Module, report: Mapping[str, Any]
) -> None:
    """Raises ModelError unless the files hold the weights that the model has, and no others.

    `config`: of the files. `report`: transformers' loading info, with shapes that differ not yet refused.
    """
    if wrong := sorted(report["mismatched_keys"]):
        name, stored, wanted = wrong[0]
        raise ModelError(
            f"model {reference!r}: {len(wrong)} weights have another shape than config.json gives them, "
            f"first {name}: {tuple(stored)} in its files, {tuple(wanted)} by the config"
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"model {reference!r}: its files lack {len(missing)} weights, first {missing[0]}")
    strangers = sorted(name for name in report["unexpected_keys"] if not _harmless(name, config, model))
    if strangers:
        raise ModelError(
            f"model {reference!r}: its files hold {len(strangers)} weights that the model of its config.json "
            f"does not have, first {strangers[0]}"
        )


def _harmless(name: str, config: PreTrainedConfig, model: nn.Module) -> bool:
    """Whether the model is the same without this weight of its files."""
    text = config.get_text_config()
    if _HARMLESS.search(name) or (text is not config and _TOWERS.search(name)):
        return True
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    ahead = int(getattr(text, "num_nextn_predict_layers", 0) or 0)
    if (layer := _LAYER.search(name)) and layers <= int(layer[1]) < layers + ahead:
        return True
    # Scales and the like, of a layer that the model has.
    quantized = any(getattr(each, "quantization_config", None) is not None for each in (config, text))
    return quantized and _has(model, name.rpartition(".")[0])


def _has(model: nn.Module, path: str) -> bool:
    try:
        return bool(path) and model.get_submodule(path) is not None
    except AttributeError:
        return False


def check_ends(reference: str, config: GenerationConfig | None) -> None:
    """Raises ModelError if what the generation config names as ends of a sequence are no token ids."""
    named = None if config is None else config.eos_token_id
    for each in named if isinstance(named, list | tuple) else [named]:
        if each is not None and type(each) is not int:
            raise ModelError(
                f"model {reference!r}: generation_config.json: eos_token_id {each!r} is no token id"
            )


def ends_within(reference: str, ids: Seq[int], vocab: int) -> tuple[int, ...]:
    """The ids below `vocab`, with a warning about others. Raises ModelError if none of several is left:
    no answer would ever end by itself, which no model is made for."""
    inside = tuple(each for each in ids if 0 <= each < vocab)
    outside = ", ".join(str(each) for each in ids if each not in inside)
    what = f"model {reference!r}: eos_token_id {outside} is outside its vocabulary of {vocab} tokens"
    if outside and not inside:
        raise ModelError(f"{what}, and it has no other: no answer would ever end by itself")
    if outside:
        log.warning("%s: only %s end a sequence", what, ", ".join(map(str, inside)))
    return inside
