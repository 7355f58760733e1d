"""Loads models and tokenizers, cuts early-exit drafts and compares tokenizers.

`resolve` and the errors are those of `engine.models.references`, which says what a reference is.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from engine.memory_faults import is_out_of_memory
from engine.models.damage import check_ends, check_weights, ends_within, load_config, reason
from engine.models.draft import is_draft, load_draft
from engine.models.folder import ModelError, ModelNotFound, UnsafeWeights, check_index, first_line
from engine.models.prequantized import check_quantization_config, dequantize_at_load
from engine.models.references import quiet, resolve
from engine.types import CannotLoad

__all__ = [
    "ModelError",
    "ModelNotFound",
    "UnsafeWeights",
    "early_exit",
    "ends_within",
    "eos_token_ids",
    "keep_layers",
    "load_config",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "real_vocab_size",
    "resolve",
    "same_tokenizer",
    "tokenizer_sha256",
]

# Encoded by both tokenizers: merges, digits, spaces and other scripts show a different behaviour.
_PROBE = "The quick  brown fox's 12345 jumps!\n\tdef f(x): return x**2  # naïve café — 你好, привет 🙂"


def pick_device(name: str) -> torch.device:
    """The device "auto" stands for, or the named one. Raises ModelError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r}: {first_line(error)}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r}: only cpu and cuda are supported")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype "auto" stands for (bfloat16 on a GPU, float32 on a CPU), or the named one."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"dtype {name!r}: known are auto, {', '.join(known)}")
    return known[name]


def load_model(
    reference: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The causal LM of a reference, on `device`, in eval mode, without gradients.

    Raises ModelNotFound, UnsafeWeights (no safetensors) or ModelError (any other reason, for
    example weights missing from the checkpoint, which transformers would make up at random, or
    weights that the model does not have: the config is then of another one).
    """
    where = resolve(reference)
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if isinstance(dtype, str) else dtype
    config = load_config(reference, trust_remote_code)
    if isinstance(where, Path) and is_draft(where):
        return load_draft(where, dtype, device)
    attention: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with quiet(progress=True):
        try:
            dequantize_at_load(config)
            check_quantization_config(config, device)
            if isinstance(where, str):
                _check_hub_index(where, config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below: the error would name none
                **attention,
            )
        except CannotLoad as error:
            raise ModelError(f"model {reference!r}: {error}") from error
        except Exception as error:  # a broken file breaks its readers in many ways
            if is_out_of_memory(error):
                raise
            raise _load_error(reference, error) from error
    model: PreTrainedModel = loaded[0]
    check_weights(reference, config, model, loaded[1])
    check_ends(reference, model.generation_config)
    model.requires_grad_(False)
    model.eval()
    return model


def _check_hub_index(hub_id: str, config: PreTrainedConfig) -> None:
    """Does for the index that `from_pretrained` will fetch what `resolve` does for those of a directory."""
    name = getattr(config, "transformers_weights", None) or SAFE_WEIGHTS_INDEX_NAME
    found = cached_file(
        hub_id,
        name,
        _raise_exceptions_for_gated_repo=False,  # `from_pretrained` will tell it
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None and name.endswith(".index.json"):
        check_index(Path(found))


def load_tokenizer(reference: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a reference. Raises ModelNotFound or ModelError."""
    where = resolve(reference)
    with quiet(progress=False):
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
            _try_out(tokenizer)
        except Exception as error:  # a broken file breaks its readers in many ways
            raise ModelError(f"tokenizer of {reference!r}: {reason(error)}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Does with it what requests will: much that its files say is taken as it is until it is used."""
    ids = tokenizer.encode(_PROBE)
    tokenizer.decode([*ids, *tokenizer.all_special_ids], skip_special_tokens=True)
    _ = real_vocab_size(tokenizer), tokenizer.special_tokens_map, tokenizer.added_tokens_decoder


def _load_error(reference: str, error: Exception) -> ModelError:
    message = first_line(error)
    if isinstance(error, OSError) and "safetensors" in message:
        return UnsafeWeights(
            f"model {reference!r} has no safetensors; pickles can run code and are not loaded"
        )
    return ModelError(f"model {reference!r} cannot be loaded: {reason(error)}")


def early_exit(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model's first `layers` layers, with its own final norm and head, sharing its very parameters.

    Costs no memory for weights. Raises ValueError unless 1 <= layers <= the model's layers, and
    ModelError if the architecture keeps something that cannot be cut so.
    """
    total = int(model.config.get_text_config().num_hidden_layers)
    if not 1 <= layers <= total:
        raise ValueError(f"early exit after {layers} layers: the model has {total}, so 1 to {total}")
    config = keep_layers(model.config, range(layers))
    with quiet(progress=False), torch.device("meta"):
        draft: PreTrainedModel = type(model)(config)
    source = model.state_dict(keep_vars=True)
    wanted = draft.state_dict().keys()
    if absent := sorted(wanted - source.keys()):
        raise ModelError(f"early exit of {type(model).__name__}: the target has no {absent[0]}")
    draft.load_state_dict({name: source[name] for name in wanted}, assign=True)
    _share_plain_tensors(draft, model)
    draft.generation_config = copy.deepcopy(model.generation_config)
    draft.eval()
    return draft


def keep_layers(config: PreTrainedConfig, numbers: Seq[int]) -> PreTrainedConfig:
    """A copy of the config for a model of these layers alone, in this order."""
    kept = copy.deepcopy(config)
    text = kept.get_text_config()
    total = int(text.num_hidden_layers)
    for name, value in vars(text).items():  # layer_types and its like: one entry per layer
        if "layer" in name and isinstance(value, list | tuple) and len(value) == total:
            setattr(text, name, type(value)(value[i] for i in numbers))
    text.num_hidden_layers = len(numbers)
    return kept


def _share_plain_tensors(draft: nn.Module, model: nn.Module) -> None:
    """Takes over what no state dict holds: non-persistent buffers (rotary frequencies) and attributes."""
    for path, module in draft.named_modules():
        twin = model.get_submodule(path)
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, getattr(twin, name))
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, name, getattr(twin, name))
    left = [name for name, each in (*draft.named_parameters(), *draft.named_buffers()) if each.is_meta]
    if left:
        raise ModelError(f"early exit of {type(model).__name__}: nothing gives {left[0]} its values")


def real_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest token id + 1. Rows of a model's vocabulary from there on are padding, never to be sampled."""
    return max(tokenizer.get_vocab().values()) + 1


def eos_token_ids(
    source: PreTrainedModel | GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every id that ends a sequence: the generation config's, as transformers' generate has it, else the
    tokenizer's own."""
    config = source if isinstance(source, GenerationConfig) else source.generation_config
    named = None if config is None else config.eos_token_id
    ids = [] if named is None else [named] if isinstance(named, int) else list(named)
    own = tokenizer.eos_token_id
    if not ids and isinstance(own, int):
        ids.append(own)
    return tuple(dict.fromkeys(int(each) for each in ids))


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """None if every id of the draft's tokenizer `b` means what it means to the target's `a`.

    Otherwise a message naming the first difference, in the vocabulary (added and special tokens
    are part of it), in the merges, or in how a text that tries both is encoded.
    """
    tokens_a, tokens_b = _by_id(a), _by_id(b)
    for i in sorted(tokens_a.keys() | tokens_b.keys()):
        if tokens_a.get(i) != tokens_b.get(i):
            of_a, of_b = (repr(t[i]) if i in t else "no token" for t in (tokens_a, tokens_b))
            return f"token id {i} is {of_a} in the target's tokenizer and {of_b} in the draft's"
    if a.is_fast and b.is_fast:
        merges_a, merges_b = _merges(a), _merges(b)
        if len(merges_a) != len(merges_b):
            return f"the target's tokenizer has {len(merges_a)} merges and the draft's {len(merges_b)}"
        for rank, (of_a, of_b) in enumerate(zip(merges_a, merges_b, strict=True)):
            if of_a != of_b:
                return f"merge {rank} is {of_a!r} in the target's tokenizer and {of_b!r} in the draft's"
    ids_a = a.encode(_PROBE, add_special_tokens=False)
    ids_b = b.encode(_PROBE, add_special_tokens=False)
    return None if ids_a == ids_b else f"the tokenizers encode {_PROBE!r} differently: {ids_a} and {ids_b}"


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of what `same_tokenizer` compares: vocabulary, merges, and how a probe is encoded."""
    facts = [
        sorted(_by_id(tokenizer).items()),
        _merges(tokenizer) if tokenizer.is_fast else [],
        tokenizer.encode(_PROBE, add_special_tokens=False),
    ]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The merges in rank order; none for models without them (Unigram, WordPiece)."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    return [each.split(" ", 1) if isinstance(each, str) else list(each) for each in merges]
