"""What the flags of quantization do to a pair."""

import logging

import pytest
import torch

from engine.config import EngineConfig
from engine.models.builtin import ROOT
from engine.models.draft import FactoredEmbedding, load_draft
from engine.models.quantize import QuantizedLinear
from engine.parts import ConfigError, _quantize


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_the_shipped_draft_can_be_quantized(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    draft = load_draft(ROOT / "smollm2", torch.float32, torch.device("cpu"))
    config = EngineConfig(target="t", draft="default", draft_quantization=kind)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        _quantize(config, draft, draft)
    assert "slow" in caplog.text  # on a CPU
    assert isinstance(draft.model.layers[0].mlp.down_proj, QuantizedLinear)  # type: ignore[union-attr]
    embedding = draft.get_input_embeddings()
    assert isinstance(embedding, FactoredEmbedding) and isinstance(embedding.project, torch.nn.Linear)


def test_the_flag_is_named_where_there_is_nothing_to_quantize() -> None:
    draft = load_draft(ROOT / "smollm2", torch.float32, torch.device("cpu"))
    config = EngineConfig(target="t", draft="ngram", draft_quantization="int8")
    with pytest.raises(ConfigError, match="draft_quantization 'int8': draft 'ngram' is no model"):
        _quantize(config, draft, None)
