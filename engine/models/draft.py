"""Tiny drafts: a Llama whose input embedding may be of low rank and whose head may know fewer tokens.

A small draft is mostly vocabulary. The embedding is read one row at a time and costs only memory,
so a low rank makes it small; the head is read whole at every step, so fewer tokens make it fast.
The law q is exactly 0 at every token the head does not know.

On disk: `config.json` and `model.safetensors`, in bfloat16, float32, or int8 with one float32
scale for each row of a matrix. No tokenizer: the config has the digest of the target's.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from engine.models.folder import ModelError, first_line
from engine.models.packed import quantize

MODEL_TYPE = "disco_draft"
Weights = Literal["int8", "bfloat16", "float32"]
_WEIGHTS_FILE = "model.safetensors"


class DraftConfig(LlamaConfig):
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
        """Raises ValueError for a reduction of an embedding that is also the head."""
        reduced = config.embed_rank is not None or config.draft_vocab_size is not None
        if reduced and config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: a reduced embedding or head cannot be shared")
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
    """Writes a draft, `model` unchanged. A plain model is saved as transformers does, with its tokenizer.

    Raises ModelError for int8 weights of a plain model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    if not isinstance(model, DraftForCausalLM):
        if weights == "int8":
            raise ModelError(f"a draft of type {type(model).__name__} cannot be saved as int8")
        plain: nn.Module = copy.deepcopy(model)
        plain.to(dtype)
        assert isinstance(plain, PreTrainedModel)
        plain.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().to("cpu", copy=True).contiguous()
        if weights == "int8" and value.is_floating_point() and value.ndim == 2:
            tensors[name], tensors[f"{name}.scale"] = quantize(value)
        elif value.is_floating_point():
            tensors[name] = value.to(torch.float32 if weights == "int8" else dtype)
        else:
            tensors[name] = value.to(torch.int32)
    config = {**model.config.to_dict(), "weights": weights, "architectures": [type(model).__name__]}
    save_file(tensors, directory / _WEIGHTS_FILE)
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


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
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"draft {str(directory)!r}: config.json: {first_line(error)}") from error
    if config.weights not in get_args(Weights):
        known = ", ".join(get_args(Weights))
        raise ModelError(f"draft {str(directory)!r}: weights {config.weights!r}: known are {known}")
    return config


def load_draft(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The draft on `device`, in eval mode, without gradients. Raises ModelError."""
    config = read_config(directory)
    try:
        model = DraftForCausalLM(config)
    except (  # a shape or a name that cannot be
        *(ValueError, TypeError, RuntimeError, ArithmeticError),
        *(LookupError, AttributeError, AssertionError, ImportError),
    ) as error:
        raise ModelError(f"draft {str(directory)!r}: config.json: {first_line(error)}") from error
    try:
        stored = load_file(directory / _WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"draft {str(directory)!r}: {_WEIGHTS_FILE}: {first_line(error)}") from error
    wanted = model.state_dict()
    try:
        model.load_state_dict({name: _take(stored, name, like) for name, like in wanted.items()})
        if stored:
            raise ValueError(f"{min(stored)} belongs to no part of it")
        if isinstance(model.lm_head, ReducedHead):
            _check_ids(wanted["lm_head.ids"], config.vocab_size)
    except ValueError as error:
        raise ModelError(f"draft {str(directory)!r}: {error}") from error
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.to(dtype)
    nn.Module.to(model, device=device)
    model.requires_grad_(False)
    model.train(False)
    return model


def _take(stored: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Takes a tensor out of the file's, with its scale, as one of `like`'s shape and dtype."""
    value = stored.pop(name, None)
    if value is None or value.shape != like.shape:
        got = "is missing" if value is None else f"has shape {tuple(value.shape)}"
        raise ValueError(f"{name} {got}, wanted is {tuple(like.shape)}")
    if like.is_floating_point() and value.dtype == torch.int8:
        scale = stored.pop(f"{name}.scale", None)
        if scale is None or scale.shape != value.shape[:1]:
            raise ValueError(f"{name} is int8 and has no scale for each row")
        return value.to(scale.dtype) * scale[:, None]
    if value.is_floating_point() != like.is_floating_point():
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}")
    return value.to(like.dtype)


def _check_ids(ids: Tensor, vocab: int) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(set(ids.tolist())) < len(ids):
        raise ValueError(f"lm_head.ids are not different ids below {vocab}")
