"""The draft before training: its shape, and where its weights begin."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from classifiers.distill.options import DistillError, DistillOptions
from engine.models.draft import DraftConfig, DraftForCausalLM, FactoredEmbedding, ReducedHead
from engine.models.load import keep_layers

_EMBEDDING_STD = 0.1  # of an embedding row's entries: small beside the layers' later outputs
_HEAD_STD = 0.02  # logits of about a third of a nat at the start
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")


def new_student(
    options: DistillOptions, target: PreTrainedModel, tokenizer_sha256: str, head_ids: Tensor | None
) -> PreTrainedModel:
    """A float32 draft on the target's device, begun as `options.init` says. `head_ids` None: a full head."""
    torch.manual_seed(options.seed)
    numbers = options.layer_numbers()
    student = (
        _fresh(options, target, tokenizer_sha256, head_ids)
        if numbers is None
        else _of_layers(target, numbers)
    )
    moved: nn.Module = student
    moved.to(device=target.device, dtype=torch.float32)
    return student


def _fresh(
    options: DistillOptions, target: PreTrainedModel, tokenizer_sha256: str, head_ids: Tensor | None
) -> PreTrainedModel:
    text = target.config.get_text_config()
    shape = dict(
        vocab_size=text.vocab_size,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=text.max_position_embeddings,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        tie_word_embeddings=options.embed_rank is None and head_ids is None,
        use_cache=False,
    )
    if shape["tie_word_embeddings"]:
        student: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        config = DraftConfig(
            **shape,
            embed_rank=options.embed_rank,
            draft_vocab_size=None if head_ids is None else len(head_ids),
            tokenizer_sha256=tokenizer_sha256,
        )
        student = DraftForCausalLM(config)
    _begin_embeddings(student, target, head_ids)
    student.generation_config = copy.deepcopy(target.generation_config)
    return student


@torch.no_grad()
def _begin_embeddings(student: PreTrainedModel, target: PreTrainedModel, head_ids: Tensor | None) -> None:
    """Embedding and head from the target's principal components: its geometry at a smaller width."""
    embedding = _weight(target.get_input_embeddings())
    head = _weight(target.get_output_embeddings())
    moved: nn.Module = student
    moved.to(embedding.device)
    own = student.model.embed_tokens
    if isinstance(own, FactoredEmbedding):
        rank, width = own.tokens.weight.shape[1], own.project.weight.shape[0]
        own.tokens.weight.copy_(_scaled(components(embedding, rank), _EMBEDDING_STD))
        nn.init.orthogonal_(own.project.weight, gain=(width / rank) ** 0.5 if width < rank else 1.0)
    else:
        assert isinstance(own, nn.Embedding)
        own.weight.copy_(_scaled(components(embedding, own.weight.shape[1]), _EMBEDDING_STD))
    if student.config.tie_word_embeddings:
        return
    linear = head_linear(student)
    if isinstance(student.lm_head, ReducedHead):
        assert head_ids is not None and isinstance(student.lm_head.ids, Tensor)
        student.lm_head.ids.copy_(head_ids)
        head = head[head_ids.to(head.device)]
    linear.weight.copy_(_scaled(components(head, linear.weight.shape[1]), _HEAD_STD))


def head_linear(student: PreTrainedModel) -> nn.Linear:
    """The head's linear layer, over the tokens that it knows."""
    out = student.lm_head
    linear = out.linear if isinstance(out, ReducedHead) else out
    assert isinstance(linear, nn.Linear)
    return linear


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.float()


def components(matrix: Tensor, rank: int) -> Tensor:
    """float32[V, rank]: the rows of a [V, H] matrix on its first principal components, zeros past H."""
    centred = matrix - matrix.mean(0)
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())  # ascending
    best = vectors.flip(1)[:, :rank].to(matrix.dtype)
    out = matrix.new_zeros(matrix.shape[0], rank)
    out[:, : best.shape[1]] = centred @ best
    return out


def _scaled(matrix: Tensor, std: float) -> Tensor:
    return matrix * (std / matrix.std())


def check_layers(target: PreTrainedModel, numbers: tuple[int, ...]) -> None:
    """Raises DistillError if these layers cannot be copied."""
    total = int(target.config.get_text_config().num_hidden_layers)
    if any(number >= total for number in numbers) or list(numbers) != sorted(set(numbers)):
        raise DistillError(f"--init layers: ascending numbers from 0 to {total - 1}, each once")
    found = {int(match[2]) for name in target.state_dict() if (match := _LAYER.match(name))}
    if found != set(range(total)):
        raise DistillError(f"--init layers: {type(target).__name__} does not keep its layers in model.layers")


def _of_layers(target: PreTrainedModel, numbers: tuple[int, ...]) -> PreTrainedModel:
    """A copy of these layers of the target, with its embedding, norm and head."""
    check_layers(target, numbers)
    student: PreTrainedModel = type(target)(keep_layers(target.config, numbers))
    place = {number: i for i, number in enumerate(numbers)}
    state: dict[str, Tensor] = {}
    for name, tensor in target.state_dict().items():
        if (match := _LAYER.match(name)) is None:
            state[name] = tensor
        elif int(match[2]) in place:
            state[f"{match[1]}{place[int(match[2])]}{match[3]}"] = tensor
    if missing := student.load_state_dict(state, strict=False).missing_keys:
        raise DistillError(
            f"--init layers: {type(target).__name__} keeps its layers elsewhere ({missing[0]})"
        )
    student.generation_config = copy.deepcopy(target.generation_config)
    return student
