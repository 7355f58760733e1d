"""What all tests share: tiny models and tokenizers made here, the default model, and the GPU's absence."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter: to be chosen before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.models.load import resolve

SPECIAL = ("<unk>", "<s>", "</s>")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own DISCO_* must not change what a test sees; where models are cached may stay."""
    for name in list(os.environ):
        if name.startswith("DISCO_") and name != "DISCO_CACHE":
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that are run in a test set up logging to a stderr that ends with them."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in before and not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the default model; fetched and converted if it is not there."""
    return Path(resolve("smollm2"))


def byte_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), added: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: three special tokens, 256 bytes, one token per merge, then `added` ones."""
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for token in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]:
        vocab[token] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if added:
        tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`byte_tokenizer`, for tests that need several."""
    return byte_tokenizer


def random_llama(directory: Path, tokenizer: PreTrainedTokenizerFast, *, layers: int, context: int) -> Path:
    """A random Llama and the tokenizer, saved in the directory; its vocabulary has padding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """`random_llama`, for tests that need another."""
    return random_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random four-layer Llama and a byte tokenizer."""
    return random_llama(tmp_path_factory.mktemp("tiny-llama"), byte_tokenizer(), layers=4, context=256)
