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
from collections.abc import Sequence as Seq
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
    "7b": Shape(3584, 18944, 28, 28, 4, 128, 152064),  # Qwen2.5-7B
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256),  # Llama-3.2-1B
    "0.5b": Shape(896, 4864, 24, 14, 2, 64, 151936),  # Qwen2.5-0.5B
}


@dataclass(frozen=True)
class Axis:
    """Where a source's entries lie along one axis of a wider weight: entry `of[i]` at `to[i]`."""

    to: Tensor  # int64[n], without repeats
    of: Tensor  # int64[n]


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
    if type(model) not in FAMILY:
        raise ValueError(f"cannot widen a {type(model).__name__}, only {[each.__name__ for each in FAMILY]}")
    source = shape_of(model.config)
    shape = replace(shape, vocab=max(shape.vocab, source.vocab))
    _refuse(model, source, shape)
    config = _config(model.config, source, shape)
    with torch.device("meta"):
        wide: PreTrainedModel = type(model)(config)
    place = torch.device(device) if device is not None else model.device
    new = torch.empty(0, device=place, dtype=dtype or model.dtype)
    filler = _Filler(model, source, shape, new, seed)
    weights: dict[str, Tensor] = {}
    for name, meta in wide.state_dict().items():
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        weights[name] = weights["model.embed_tokens.weight"] if tied else filler.weight(name, meta)
    wide.load_state_dict(weights, assign=True)
    wide.tie_weights()
    with torch.device(place):  # its frequencies are in no state dict
        wide.model.rotary_emb = type(model.model.rotary_emb)(config)
    config.dtype = wide.dtype
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.requires_grad_(False).eval()


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


def _dims(head_dim: int, wide: int) -> Tensor:
    """int64[head_dim]: where a head's dimensions lie in a wider head. Rotary pairs (i, i + d/2) turn by
    theta^(-2i/d): at d' = m d that is pair m i."""
    half = torch.arange(head_dim // 2) * (wide // head_dim)
    return torch.cat([half, half + wide // 2])


class _Filler:
    """Makes the wide model's weights, one by one."""

    def __init__(self, model: PreTrainedModel, source: Shape, shape: Shape, new: Tensor, seed: int) -> None:
        """`new`: of the device and dtype to make."""
        self._weights, self._new = model.state_dict(), new
        self._source, self._shape = source, shape
        self._std = float(model.config.initializer_range)
        self._random = torch.Generator(new.device).manual_seed(seed)
        places, kv_of = _heads(source, shape)
        self._hidden, self._vocab = self._first(source.hidden), self._first(source.vocab)
        self._units, self._one = self._first(source.intermediate), self._first(source.head_dim)
        self._queries = self._per_head(places, range(source.heads))
        self._keys = self._per_head(range(len(kv_of)), kv_of)
        rows = torch.arange(len(kv_of) * shape.head_dim, device=new.device)
        self._still = rows[~torch.isin(rows, self._keys.to)]
        # Norms divide by a mean over more dimensions; attention, by the root of a larger head_dim.
        self._shrink = math.sqrt(source.hidden / shape.hidden)
        self._query_scale, self._key_scale = math.sqrt(shape.head_dim / source.head_dim), 1.0
        if isinstance(model, Qwen3ForCausalLM):  # its norms of heads have the same eps, now smaller
            self._query_scale = self._key_scale = self._shrink

    def weight(self, name: str, meta: Tensor) -> Tensor:
        """The weight or bias of this name in the wide model, of `meta`'s shape."""
        kind = name.split(".")[-2]
        axes, spare, scale = self._rule(kind)
        made = self._new.new_zeros(meta.shape)
        if spare:
            made.normal_(0, self._std, generator=self._random)
        if name not in self._weights:
            return made  # of a spare layer
        live = self._weights[name].to(self._new.device, torch.float32)
        for axis in range(meta.ndim):  # a bias has the rows of its weight
            live = live.index_select(axis, axes[axis].of)
        live = (live * scale).to(self._new.dtype)
        if kind == "k_proj":  # new dimensions of live keys meet random queries
            made[self._still] = 0
        made[axes[0].to if meta.ndim == 1 else (axes[0].to[:, None], axes[1].to)] = live
        if kind in ("embed_tokens", "lm_head"):
            made[self._source.vocab :, : self._source.hidden] = live.mean(0, dtype=torch.float32).to(live)
        return made

    def _rule(self, kind: str) -> tuple[tuple[Axis, ...], bool, float]:
        """Of a kind of weight: its axes, whether what is new in it is random or 0, and a factor."""
        hidden, queries, keys, units = self._hidden, self._queries, self._keys, self._units
        return {
            "embed_tokens": ((self._vocab, hidden), False, 1.0),
            "lm_head": ((self._vocab, hidden), True, 1.0),
            "q_proj": ((queries, hidden), True, self._query_scale),
            "k_proj": ((keys, hidden), True, self._key_scale),
            "v_proj": ((keys, hidden), True, 1.0),
            "o_proj": ((hidden, queries), False, 1.0),
            "gate_proj": ((units, hidden), True, 1.0),
            "up_proj": ((units, hidden), True, 1.0),
            "down_proj": ((hidden, units), False, 1.0),
            "q_norm": ((self._one,), True, 1.0),
            "k_norm": ((self._one,), True, 1.0),
        }.get(kind, ((hidden,), True, self._shrink))

    def _first(self, count: int) -> Axis:
        at = torch.arange(count, device=self._new.device)
        return Axis(at, at)

    def _per_head(self, to: Seq[int], of: Seq[int]) -> Axis:
        """Source heads `of`, whole, at the heads `to`."""
        dim, wide = self._source.head_dim, self._shape.head_dim
        new = torch.tensor(list(to))[:, None] * wide + _dims(dim, wide)
        old = torch.tensor(list(of))[:, None] * dim + torch.arange(dim)
        return Axis(new.flatten().to(self._new.device), old.flatten().to(self._new.device))


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
