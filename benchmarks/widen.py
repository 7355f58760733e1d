"""Widens a small checkpoint to a larger shape that computes the same function: real text at real cost.

    python benchmarks/widen.py SOURCE OUT --shape 7b [--layers N] [--hidden N] [--dtype bfloat16]

The text, and with it every acceptance, is the small model's; weights, KV and arithmetic are the large
shape's. What is new is read and multiplied, and adds exactly nothing: spare hidden dimensions are 0 all
along the residual stream, spare heads, units and layers end in zero columns of o_proj and down_proj.
Everything else that is new is random, so that no skipping of zeros makes the cost unreal; but the zero
blocks of o_proj, down_proj and the embedding stay, and a chip may draw less power over them. Results
differ by rounding alone: in bfloat16 the weights of norms (and of queries, if heads widen) once more.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from widen_weights import Filler

from engine.models.load import keep_layers, load_model, load_tokenizer
from engine.types import CannotLoad

FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_SAME_ANGLES = ("default", "linear", "llama3")  # what they do to a frequency depends on it alone


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Llama family. `vocab`: padded to this; a larger source's stays."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),  # Llama-3-70B
    "7b": Shape(3584, 18944, 28, 28, 4, 128, 152064),  # Qwen2.5-7B
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256),  # Llama-3.2-1B
    "0.5b": Shape(896, 4864, 24, 14, 2, 64, 151936),  # Qwen2.5-0.5B
}


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape that a config describes."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads, head_dim
    widths = config.hidden_size, config.intermediate_size
    return Shape(*widths, config.num_hidden_layers, *heads, config.vocab_size)


@torch.no_grad()
def widen(
    model: PreTrainedModel,
    shape: Shape,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of the same class and of `shape`, with the logits of `model`, which is left as it is.

    Built on `device` in `dtype` (default: the source's); `seed` is of what is random. Ids beyond the
    source's vocabulary are padding: their logit is the mean of all others, so never the largest. A wider
    hidden size unties the head. Raises ValueError if the model is not of the family or does not fit.
    """
    place = torch.device(device) if device is not None else model.device
    wide, filler = hollow(model, shape, place, dtype or model.dtype, seed)
    weights: dict[str, Tensor] = {}
    for name, meta in wide.state_dict().items():
        tied = name == "lm_head.weight" and wide.config.tie_word_embeddings
        weights[name] = weights["model.embed_tokens.weight"] if tied else filler.weight(name, meta)
    wide.load_state_dict(weights, assign=True)
    wide.tie_weights()
    return wide.requires_grad_(False)


def hollow(
    model: PreTrainedModel, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[PreTrainedModel, Filler]:
    """The widened model with weights on "meta", and what makes each of them, on `device` in `dtype`.

    Raises ValueError as `widen` does.
    """
    if type(model) not in FAMILY:
        raise ValueError(f"cannot widen a {type(model).__name__}, only {[each.__name__ for each in FAMILY]}")
    source = shape_of(model.config)
    shape = replace(shape, vocab=max(shape.vocab, source.vocab))
    _refuse(model, source, shape)
    config = _config(model.config, source, shape)
    heads, new = _heads(source, shape), torch.empty(0, device=device, dtype=dtype)
    with torch.device("meta"):
        wide: PreTrainedModel = type(model)(config).to(dtype)
    with torch.device(device):  # its frequencies are in no state dict
        wide.model.rotary_emb = type(model.model.rotary_emb)(config)
    config.dtype = dtype
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.eval(), Filler(model, source, shape, heads, new, seed)


def _refuse(model: PreTrainedModel, source: Shape, shape: Shape) -> None:
    """Raises ValueError if the model does not fit into the shape (query heads: see `_heads`)."""
    for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim"):
        have, want = getattr(source, name), getattr(shape, name)
        if want < have:
            raise ValueError(f"{name}: the source has {have}, more than the {want} of the shape")
    if shape.heads % shape.kv_heads:
        raise ValueError(f"heads: {shape.heads} is not a multiple of the {shape.kv_heads} KV heads")
    if shape.head_dim == source.head_dim:
        return
    if shape.head_dim % source.head_dim:
        raise ValueError(f"head_dim: {shape.head_dim} is not a multiple of the source's {source.head_dim}")
    if isinstance(model, Qwen3ForCausalLM):
        raise ValueError("head_dim: queries and keys are normalised over it, so it cannot change")
    if (kind := model.config.rope_parameters["rope_type"]) not in _SAME_ANGLES:
        raise ValueError(f"head_dim: frequencies of rope type {kind!r} would not stay the same")


def _config(source: PreTrainedConfig, old: Shape, shape: Shape) -> PreTrainedConfig:
    """The source's config at another shape. Raises ValueError where the architecture forbids it."""
    numbers = [*range(old.layers), *[old.layers - 1] * (shape.layers - old.layers)]
    config = keep_layers(source, numbers)
    config.hidden_size, config.intermediate_size = shape.hidden, shape.intermediate
    config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
    config.head_dim, config.vocab_size = shape.head_dim, shape.vocab
    # The mean of squares is over more dimensions, of which the new are 0.
    config.rms_norm_eps = source.rms_norm_eps * old.hidden / shape.hidden
    config.tie_word_embeddings = source.tie_word_embeddings and shape.hidden == old.hidden
    try:
        config.validate()
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(config).__name__} does not allow this shape: {reason}") from error
    return config


def _heads(source: Shape, shape: Shape) -> tuple[list[int], list[int]]:
    """Of every source query head its new place; of every used new KV head the source's that it is.

    A query head must sit under its KV head. Where fewer fit there than in the source, the KV head is
    repeated; where more, the rest are spare. Raises ValueError if that takes too many KV heads.
    """
    fold, new_fold = source.heads // source.kv_heads, shape.heads // shape.kv_heads
    copies = math.ceil(fold / new_fold)
    if source.kv_heads * copies > shape.kv_heads:
        need = f"each of the source's {source.kv_heads} is needed {copies} times, of {shape.kv_heads}"
        raise ValueError(f"kv_heads: with {new_fold} query heads to each instead of {fold}, {need}")
    places = []
    for head in range(source.heads):
        kv, nth = divmod(head, fold)
        places.append((kv * copies + nth // new_fold) * new_fold + nth % new_fold)
    return places, [new // copies for new in range(source.kv_heads * copies)]


@torch.inference_mode()
def difference(source: PreTrainedModel, wide: PreTrainedModel, tokens: int = 32) -> tuple[float, float]:
    """Over `tokens` fixed ids: the largest difference of real logits, and the share of equal argmaxes."""
    vocab = source.config.vocab_size
    ids = (torch.arange(tokens) * 7 + 3)[None] % vocab
    a, b = (each(ids.to(each.device)).logits[0].float().cpu() for each in (source, wide))
    same = (a.argmax(-1) == b.argmax(-1)).float().mean()
    return float((a - b[:, :vocab]).abs().max()), float(same)


def main() -> None:
    args = _arguments()
    try:
        tokenizer = load_tokenizer(args.source)
        source = load_model(args.source, dtype=args.dtype, device="cpu")
        wide = widen(source, _shape(args, source), seed=args.seed)
    except (CannotLoad, ValueError) as error:
        raise SystemExit(f"widen: {error}") from error
    for each in (source, wide):
        print(shape_of(each.config), f"{each.num_parameters():,} parameters")
    largest, same = difference(source, wide)
    print(f"largest difference of logits {largest:.3g}; argmax equal at {same:.0%} of positions")
    wide.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def _shape(args: argparse.Namespace, source: PreTrainedModel) -> Shape:
    given = {each.name: getattr(args, each.name) for each in fields(Shape)}
    named = SHAPES[args.shape] if args.shape else shape_of(source.config)
    return replace(named, **{name: value for name, value in given.items() if value is not None})


def _arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", help="a directory, an alias, a .gguf file or a hub id")
    parser.add_argument("out", type=Path, help="the directory to write: new or empty")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: the source's own")
    for each in fields(Shape):
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, type=int, metavar="N", help=f"instead of the shape's {each.name}")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} is there already")
    return args


if __name__ == "__main__":
    main()
