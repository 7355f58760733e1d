"""Tiny drafts: a Llama whose input embedding may be of low rank and whose head may know fewer tokens.

A small draft is mostly vocabulary. The embedding is read one row at a time and costs only memory,
so a low rank makes it small; the head is read whole at every step, so fewer tokens make it fast.
The law q is exactly 0 at every token the head does not know.

On disk: `config.json` and `model.safetensors`, in bfloat16, float32, or int8 with one float32
scale for each row of a matrix. No tokenizer: the config has the digest of the target's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from engine.models.references import ModelError, first_line

MODEL_TYPE = "disco_draft"
Weights = Literal["int8", "bfloat16", "float32"]
_WEIGHTS_FILE = "model.safetensors"


class DraftConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's config, and what is reduced. `embed_rank` None: a full embedding; `draft_vocab_size`
    None: a full head; `tokenizer_sha256`: of the tokenizer whose ids it reads and proposes."""

    model_type = MODEL_TYPE
    embed_rank: int | None = None
    draft_vocab_size: int | None = None
    tokenizer_sha256: str = ""
    weights: str = "bfloat16"


class FactoredEmbedding(nn.Module):
    """ids [...] -> [..., hidden]: a row of [vocab, rank], then rank x hidden."""

    def __init__(self, vocab: int, rank: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, rank)
        self.project = nn.Linear(rank, hidden, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.project(self.tokens(ids))
        return out


class ReducedHead(nn.Module):
    """hidden [..., H] -> logits [..., vocab], -inf but at `ids` int64[V']; `linear` gives these alone."""

    def __init__(self, hidden: int, known: int, vocab: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, known, bias=False)
        self.vocab = vocab
        self.register_buffer("ids", torch.arange(known))

    def forward(self, hidden: Tensor) -> Tensor:
        known = self.linear(hidden)
        out: Tensor = known.new_full((*known.shape[:-1], self.vocab), float("-inf"))
        return out.index_copy_(-1, self.ids, known)  # type: ignore[arg-type]


class DraftForCausalLM(LlamaForCausalLM):
    """A Llama with the reductions of its DraftConfig."""

    config_class = DraftConfig

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        if config.embed_rank is not None:
            self.model.embed_tokens = FactoredEmbedding(
                config.vocab_size, config.embed_rank, config.hidden_size
            )
        if config.draft_vocab_size is not None:
            self.lm_head = ReducedHead(config.hidden_size, config.draft_vocab_size, config.vocab_size)


def save_draft(
    model: PreTrainedModel,
    directory: Path,
    weights: Weights = "bfloat16",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes a draft. What is a plain model is saved as transformers does, with its tokenizer, unless int8."""
    directory.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, DraftForCausalLM):
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        if weights == "int8":
            raise ModelError(f"a draft of type {type(model).__name__} cannot be saved as int8")
        before = model.dtype
        model.to(dtype).save_pretrained(directory)
        model.to(before)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().to("cpu", copy=True).contiguous()
        if weights == "int8" and value.is_floating_point() and value.ndim == 2:
            tensors[name], tensors[f"{name}.scale"] = quantize(value)
        elif value.is_floating_point():
            tensors[name] = value.to(torch.bfloat16 if weights == "bfloat16" else torch.float32)
        else:
            tensors[name] = value.to(torch.int32)
    config = {**model.config.to_dict(), "weights": weights, "architectures": [type(model).__name__]}
    save_file(tensors, directory / _WEIGHTS_FILE)
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [R, C] and float32 scale [R]: symmetric, by row."""
    scale = matrix.float().abs().amax(1).clamp(min=1e-12) / 127
    return (matrix.float() / scale[:, None]).round().to(torch.int8), scale


def is_draft(directory: Path) -> bool:
    """Whether a model directory is in this format."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def read_config(directory: Path) -> DraftConfig:
    """Raises ModelError."""
    try:
        config = DraftConfig.from_dict(json.loads((directory / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"draft {str(directory)!r}: config.json: {first_line(error)}") from error
    if config.weights not in get_args(Weights):
        known = ", ".join(get_args(Weights))
        raise ModelError(f"draft {str(directory)!r}: weights {config.weights!r}: known are {known}")
    return config


def load_draft(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The draft on `device`, in eval mode, without gradients. Raises ModelError."""
    config = read_config(directory)
    try:
        stored = load_file(directory / _WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"draft {str(directory)!r}: {_WEIGHTS_FILE}: {first_line(error)}") from error
    model = DraftForCausalLM(config)
    state = {}
    for name, wanted in model.state_dict().items():
        if name not in stored or stored[name].shape != wanted.shape:
            got = f"has shape {tuple(stored[name].shape)}" if name in stored else "is missing"
            raise ModelError(f"draft {str(directory)!r}: {name} {got}, not {tuple(wanted.shape)}")
        value = stored[name]
        if value.dtype == torch.int8:
            scale = stored.get(f"{name}.scale")
            if scale is None or scale.shape != value.shape[:1]:
                raise ModelError(f"draft {str(directory)!r}: {name} has no scale for each row")
            value = value.float() * scale[:, None]
        state[name] = value.to(wanted.dtype)
    model.load_state_dict(state)
    if isinstance(model.lm_head, ReducedHead):
        _check_ids(directory, model.lm_head.ids, config.vocab_size)  # type: ignore[arg-type]
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    loaded: PreTrainedModel = model.to(dtype=dtype, device=device)
    loaded.requires_grad_(False)
    loaded.eval()
    return loaded


def _check_ids(directory: Path, ids: Tensor, vocab: int) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) < len(ids):
        raise ModelError(f"draft {str(directory)!r}: the head's ids are not different ones below {vocab}")
