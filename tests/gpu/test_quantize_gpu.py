"""The kernels on a GPU, where they are compiled, against products with the dequantized weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.models import quantize as module
from engine.models.quantize import (
    KERNEL_ROWS,
    Kind,
    QuantizedLinear,
    QuantizedWeight,
    quantize,
    quantize_linears,
    weight_only_linear,
)

pytestmark = pytest.mark.gpu

KINDS: tuple[Kind, ...] = ("int8", "fp8", "int4")
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def compiled() -> None:
    from engine.models.kernels import weight_only

    assert not weight_only._INTERPRETED, "TRITON_INTERPRET is set: this would test another thing"


@pytest.fixture
def no_dequantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is tested is the kernel."""

    def refuse(self: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(QuantizedWeight, "dequantize", refuse)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [
        (1, 2048, 2048),
        (3, 1000, 576),
        (8, 6144, 4096),
        (16, 4096, 14336),
        (17, 49152, 576),
        (64, 16387, 1024),
        (2, 16385, 128),
    ],
)
def test_kernels_multiply_by_the_dequantized_weight(
    kind: Kind, rows: int, outputs: int, width: int, dtype: torch.dtype
) -> None:
    from engine.models.kernels.weight_only import few_rows_into

    made = quantize(random(outputs, width) / width**0.5, kind)
    x, bias = random(rows, width, dtype=dtype, seed=1), random(outputs, dtype=dtype, seed=2)
    for each in (bias, None):
        out = torch.full((rows, outputs), float("nan"), device="cuda", dtype=dtype)
        few_rows_into(out, x, made, each)
        wanted = exact(x, made.dequantize(), each)
        torch.testing.assert_close(out.double(), wanted, rtol=ROUNDING[dtype], atol=2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [64, 128])
def test_every_level_of_int4_is_read(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Rows of the identity read the weight out, bit by bit."""
    from engine.models.kernels.weight_only import few_rows

    weight = random(70, 256) + torch.linspace(-3, 3, 70, device="cuda")[:, None]
    made = quantize(weight, "int4", group=group, symmetric=symmetric)
    rows = torch.eye(256, device="cuda", dtype=dtype)
    for step in (16, 64):  # both programs
        found = torch.cat([few_rows(part, made) for part in rows.split(step)])
        assert torch.equal(found.T, made.dequantize(dtype))


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_byte_is_read(kind: Kind, dtype: torch.dtype) -> None:
    from engine.models.kernels.weight_only import few_rows

    if kind == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[~values.isnan()].cuda()
    else:
        values = torch.arange(-127, 128, device="cuda").float()
    made = quantize(values[None].repeat(3, 1), kind)
    rows = torch.eye(len(values), device="cuda", dtype=dtype)
    for step in (16, 64):
        found = torch.cat([few_rows(part, made) for part in rows.split(step)])
        assert torch.equal(found.float(), values[:, None].expand(-1, 3))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("outputs", "width"), [(5, 33), (333, 1025), (31, 7)])
def test_odd_widths(kind: Kind, outputs: int, width: int) -> None:
    made = quantize(random(outputs, width), kind)
    x = random(width, 3, dtype=torch.bfloat16).T  # not contiguous
    wanted = exact(x, made.dequantize(), None)
    torch.testing.assert_close(
        weight_only_linear(x, made).double(), wanted, rtol=1.6e-2, atol=2e-3 * width**0.5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_go_to_the_kernel(kind: Kind, no_dequantizing: None) -> None:
    made = quantize(random(64, 128), kind)
    for shape in ((1,), (1, KERNEL_ROWS), (2, 3)):
        assert weight_only_linear(random(*shape, 128, dtype=torch.bfloat16), made).shape == (*shape, 64)
    with pytest.raises(AssertionError, match="dequantized"):
        weight_only_linear(random(KERNEL_ROWS + 1, 128, dtype=torch.bfloat16), made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_know_how_many_there_are(kind: Kind) -> None:
    """Within a program of 16 rows: what speculation needs of a batch."""
    made = quantize(random(4096, 1024), kind)
    x = random(16, 1024, dtype=torch.bfloat16)
    whole = weight_only_linear(x, made)
    for rows in (1, 2, 7):
        assert torch.equal(weight_only_linear(x[:rows], made), whole[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_replays(kind: Kind) -> None:
    made, x = quantize(random(512, 256), kind), random(4, 256, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weight_only_linear(x, made)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight_only_linear(x, made)
    x.copy_(random(4, 256, dtype=torch.bfloat16, seed=5))
    graph.replay()
    assert torch.equal(out, weight_only_linear(x, made))


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_on_a_gpu_is_as_on_a_cpu(kind: Kind) -> None:
    weight = random(300, 256)
    here, there = quantize(weight, kind), quantize(weight.cpu(), kind)
    step = {"int8": 1 / 127, "fp8": 1 / 14, "int4": 1 / 7}[kind] * float(weight.abs().max())
    differ = (here.dequantize().cpu() - there.dequantize()).abs()
    assert float(differ.max()) <= step and float((differ > 1e-6).float().mean()) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_logits(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = dict(vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=3)
    config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to("cuda", torch.bfloat16)
    quantize_linears(model, kind)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 22
    ids = torch.arange(40, device="cuda")[None]
    found = model(input_ids=ids).logits.float()
    monkeypatch.setattr(module, "KERNEL_ROWS", 0)
    wanted = model(input_ids=ids).logits.float()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.02
