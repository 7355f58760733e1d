"""Quantized weights are what their definitions say, kernels and layers compute with exactly these, and
a checkpoint that cannot be loaded is refused by what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from engine.models import quantize as module
from engine.models.draft import DraftConfig, DraftForCausalLM
from engine.models.load import early_exit, load_model
from engine.models.quantize import (
    Kind,
    QuantizedLinear,
    QuantizedWeight,
    check_quantization_config,
    dequantize_at_load,
    quantize,
    quantize_linears,
    shared_weights,
    weight_only_linear,
)
from engine.models.reference import ReferenceRunner
from engine.models.runner import Batch, Chunk
from engine.types import CannotLoad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # kernels are interpreted; read where they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
KINDS: tuple[Kind, ...] = ("int8", "fp8", "int4")
SIZE: dict[str, Any] = dict(
    vocab_size=61, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
)  # fmt: skip
IDS = [(7 * i + 3) % 61 for i in range(40)]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from engine.models.kernels import weight_only

    return weight_only


def matrix(rows: int, width: int, seed: int = 0) -> Tensor:
    """Normal weights of very different rows, one of them zero and one with an outlier."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random) * torch.logspace(-6, 2, rows)[:, None]
    weight[rows // 2] = 0
    weight[-1, 0] = 900
    return weight


# Definitions


def test_int8_by_hand() -> None:
    made = quantize(torch.tensor([[2.54, -1.0, 0.03], [0.0, 0.0, 0.0]]), "int8")
    assert made.data.tolist() == [[127, -50, 2], [0, 0, 0]]  # scale 0.02; -50 and 1.5, ties to even
    assert torch.allclose(made.scale, torch.tensor([0.02, 1.0]))
    assert made.shape == (2, 3)


def test_fp8_by_hand() -> None:
    made = quantize(torch.tensor([[448.0, -17.0, 0.3, 2.0**-9]]), "fp8")
    assert made.scale.tolist() == [1.0]
    assert made.data.float().tolist() == [[448.0, -16.0, 0.3125, 2.0**-9]]


def test_int4_by_hand() -> None:
    weight = torch.zeros(1, 64)
    weight[0, [0, 16, 32, 48, 1]] = torch.tensor([-5.0, 10.0, 1.0, 2.0, -0.5])
    made = quantize(weight, "int4")  # step 1, zero point 5: levels 0, 15, 6, 7; -0.5 ties to -0, level 5
    assert made.data.shape == (1, 1, 16)
    assert made.data[0, 0, 0].item() & 0xFFFF == 0x76F0
    assert made.data[0, 0, 1].item() == 0x5555
    assert made.scale.item() == 0x3F800000 | 5
    assert made.dequantize()[0, [0, 16, 32, 48, 1]].tolist() == [-5.0, 10.0, 1.0, 2.0, 0.0]
    even = quantize(weight * 0.7, "int4", symmetric=True)  # step 7 / 7
    assert even.scale.item() == 0x3F800000 | 8
    assert even.dequantize()[0, [0, 16, 32, 48]].tolist() == [-4.0, 7.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_errors_are_half_a_level(kind: Kind, seed: int) -> None:
    weight = matrix(33, 256, seed)
    made = quantize(weight, kind)
    error = (made.dequantize() - weight).abs()
    if kind == "int8":
        bound = 0.5 * made.scale[:, None]
    elif kind == "fp8":  # 3 bits of mantissa, or the spacing of subnormals
        bound = torch.maximum(weight.abs() / 16, made.scale[:, None] / 1024)
    else:  # 15 steps, themselves rounded to 8 bits
        step = (made.scale & -65536).view(torch.float32)  # [K / group, N]
        bound = 0.54 * step.T.repeat_interleave(128, 1)
        ranges = weight.view(33, 2, 128).clamp(min=0).amax(-1) - weight.view(33, 2, 128).clamp(max=0).amin(-1)
        some = ranges > 0
        assert torch.allclose(step.T[some] * 15, ranges[some], rtol=1 / 256)
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert float((error / bound).max()) > 0.9  # the bound is no larger than it must be


@pytest.mark.parametrize("group", [64, 128])
def test_symmetric_int4_errors(group: int) -> None:
    weight = matrix(17, 256)
    made = quantize(weight, "int4", group=group, symmetric=True)
    step = weight.view(17, -1, group).abs().amax(-1) / 7
    bound = 0.54 * step.repeat_interleave(group, 1)
    assert bool(((made.dequantize() - weight).abs() <= bound).all())
    assert bool(((made.scale & 0xFFFF) == 8).all())


def test_asymmetric_groups_fit_better() -> None:
    weight = torch.rand(8, 256, generator=torch.Generator().manual_seed(0))  # one-sided
    errors = [
        float((quantize(weight, "int4", symmetric=even).dequantize() - weight).square().mean())
        for even in (True, False)
    ]
    assert errors[1] < 0.3 * errors[0]


def test_sizes() -> None:
    weight = torch.randn(96, 256)
    assert quantize(weight, "int8").nbytes == 96 * 256 + 96 * 4
    assert quantize(weight, "fp8").nbytes == 96 * 256 + 96 * 4
    assert quantize(weight, "int4").nbytes == 96 * 256 // 2 + 96 * 2 * 4
    assert quantize(weight, "int4", group=64).nbytes == 96 * 256 // 2 + 96 * 4 * 4
    assert all(quantize(weight, kind).shape == (96, 256) for kind in KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_weights_are_rounded_once(kind: Kind, dtype: torch.dtype) -> None:
    made = quantize(torch.randn(5, 192), kind)
    found = made.dequantize(dtype)
    assert found.dtype == dtype and found.shape == (5, 192) and found.is_contiguous()
    assert torch.equal(found, made.dequantize().to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_any_layout_and_dtype_is_read(kind: Kind) -> None:
    weight = torch.randn(192, 24).to(torch.bfloat16)
    expected = quantize(weight.T.contiguous().float(), kind).dequantize()
    assert torch.equal(quantize(weight.T, kind).dequantize(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_matrix_is_quantized_in_parts(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(19, 128)
    whole = quantize(weight, kind)
    monkeypatch.setattr(module, "_AT_ONCE", 400)
    parts = quantize(weight, kind)
    assert torch.equal(parts.data.view(torch.int8), whole.data.view(torch.int8))
    assert torch.equal(parts.scale, whole.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_rows_are_those_of_the_parts(kind: Kind) -> None:
    parts = [matrix(rows, 192, seed) for seed, rows in enumerate((8, 3, 5))]
    joined = QuantizedWeight.cat([quantize(part, kind) for part in parts])
    whole = quantize(torch.cat(parts), kind)
    assert joined.shape == (16, 192)
    assert torch.equal(joined.data.view(torch.int8), whole.data.view(torch.int8))
    assert torch.equal(joined.scale, whole.scale)


def test_what_differs_is_not_joined() -> None:
    weight = torch.randn(4, 128)
    for other in (
        quantize(weight, "fp8"),
        quantize(weight[:, :64], "int8"),
        quantize(weight, "int4"),
    ):
        with pytest.raises(ValueError, match="cannot be joined"):
            QuantizedWeight.cat([quantize(weight, "int8"), other])
    with pytest.raises(ValueError, match="cannot be joined"):
        QuantizedWeight.cat([quantize(weight, "int4"), quantize(weight, "int4", group=64)])
    with pytest.raises(ValueError, match="cannot be joined"):
        QuantizedWeight.cat([])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_odd_shapes(kind: Kind) -> None:
    weight = torch.randn(7, 33)
    assert torch.allclose(quantize(weight, kind).dequantize(), weight, atol=0.15)


@pytest.mark.parametrize(
    ("weight", "kind", "options", "message"),
    [
        (torch.ones(4, 96), "int4", {}, r"\(128, 64\).* divide 96"),
        (torch.ones(4, 64), "int4", {"group": 128}, "groups of 128"),
        (torch.ones(4, 64), "int4", {"group": 32}, "groups of 32"),
        (torch.ones(4, 64), "int3", {}, "'int3': known are int8, fp8, int4"),
        (torch.ones(4, 64, dtype=torch.int64), "int8", {}, "int64"),
        (torch.ones(4, 64).to(torch.float8_e4m3fn), "int8", {}, "float8"),
        (torch.ones(64), "int8", {}, r"\(64,\)"),
        (torch.ones(0, 64), "int8", {}, r"\(0, 64\)"),
        (torch.tensor([[1.0, float("nan")]]), "int8", {}, "finite"),
        (torch.tensor([[1.0, float("inf")]]), "fp8", {}, "finite"),
        (torch.full((2, 64), float("-inf")), "int4", {}, "finite"),
    ],
)
def test_refusals(weight: Tensor, kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, kind, **options)


def test_tensors_that_kernels_would_misread_are_refused() -> None:
    made = quantize(torch.randn(8, 8), "int8")
    with pytest.raises(ValueError, match="contiguous"):
        QuantizedWeight("int8", made.data.T, made.scale)


# Products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (70,), (2, 3), (0,)])
def test_products_without_a_gpu_are_those_of_the_dequantized(kind: Kind, shape: tuple[int, ...]) -> None:
    made, x, bias = quantize(torch.randn(9, 64), kind), torch.randn(*shape, 64), torch.randn(9)
    assert torch.equal(weight_only_linear(x, made, bias), F.linear(x, made.dequantize(), bias))
    with pytest.raises(ValueError, match="width 65"):
        weight_only_linear(torch.randn(1, 65), made)


# The interpreter has no products of bfloat16: tests/gpu has them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [(1, 64, 128), (3, 37, 192), (16, 1, 64), (17, 70, 320), (64, 33, 128)],
)
def test_a_kernel_multiplies_by_the_dequantized_weight(
    kernels: ModuleType, kind: Kind, rows: int, outputs: int, width: int, dtype: torch.dtype
) -> None:
    made = on_device(quantize(torch.randn(outputs, width), kind))
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    for bias in (None, torch.randn(outputs, device=DEVICE).to(dtype)):
        out = torch.full((rows, outputs), float("nan"), device=DEVICE, dtype=dtype)
        kernels.few_rows_into(out, x, made, bias)
        exact = F.linear(x.double(), made.dequantize().double(), None if bias is None else bias.double())
        torch.testing.assert_close(
            out.double(), exact, rtol=tolerance(dtype), atol=tolerance(dtype) * width**0.5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_matrix_has_larger_programs(
    kernels: ModuleType, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_WIDE", 100)
    for outputs in (99, 100, 131):
        made = on_device(quantize(torch.randn(outputs, 128), kind))
        x = torch.randn(2, 128, device=DEVICE)
        out = torch.full((2, outputs), float("nan"), device=DEVICE)
        kernels.few_rows_into(out, x, made)
        torch.testing.assert_close(out, F.linear(x, made.dequantize()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("outputs", "width"), [(5, 33), (40, 129), (31, 7)])
def test_a_kernel_serves_odd_widths(kernels: ModuleType, kind: Kind, outputs: int, width: int) -> None:
    made = on_device(quantize(torch.randn(outputs, width), kind))
    x = torch.randn(width, 3, device=DEVICE).T  # not contiguous
    out = kernels.few_rows(x, made)
    torch.testing.assert_close(out, F.linear(x, made.dequantize()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [64, 128])
def test_a_kernel_reads_every_level_of_int4(kernels: ModuleType, group: int, symmetric: bool) -> None:
    """Rows of the identity read the weight out: every group, position, level and zero point."""
    weight = torch.randn(33, 128) + torch.linspace(-3, 3, 33)[:, None]
    made = on_device(quantize(weight, "int4", group=group, symmetric=symmetric))
    rows = torch.eye(128, device=DEVICE)
    found = torch.cat([kernels.few_rows(part, made) for part in rows.split(64)])
    assert torch.equal(found.T, made.dequantize())


def test_a_kernel_reads_every_value_of_e4m3(kernels: ModuleType) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[~values.isnan()]  # 254 of them, zero twice
    made = on_device(quantize(values[None], "fp8"))
    assert torch.equal(made.dequantize().cpu()[0], values)
    found = torch.cat([kernels.few_rows(part, made) for part in torch.eye(254, device=DEVICE).split(64)])
    assert torch.equal(found[:, 0].cpu(), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ptx_adds_levels_to_its_offset(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Interpreted line by line, since without a GPU nothing else runs it."""
    ptx, offset = kernels._WIDEN[dtype]
    words = torch.arange(1 << 16)
    packed = words | words.flip(0) << 16  # two int16 in a register
    registers = {"$4": packed}
    for line in ptx.removeprefix("{ .reg .b32 t; ").removesuffix(" }").rstrip(";").split("; "):
        operation, *operands = line.replace(",", "").split()
        into, first, second, *rest = operands
        if operation == "shr.u32":
            registers[into] = registers[first] >> int(second)
        else:
            assert operation == "lop3.b32" and rest[1] == "0xEA"  # (a & b) | c
            registers[into] = registers[first] & int(second, 16) | int(rest[0], 16)
    for i in range(4):
        for lane in (0, 16):
            level = packed >> (lane + 4 * i) & 15
            found = (registers[f"${i}"] >> lane & 0xFFFF).to(torch.int16).view(dtype)
            assert torch.equal(found.float(), (level + offset).float())


def test_a_kernel_refuses_what_it_does_not_serve(kernels: ModuleType) -> None:
    made = on_device(quantize(torch.randn(8, 64), "int8"))
    for rows, width, dtype, message in (
        (0, 64, torch.float32, "1 to 64 rows"),
        (65, 64, torch.float32, "1 to 64 rows"),
        (1, 63, torch.float32, "width 64"),
        (1, 64, torch.float64, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.few_rows(torch.zeros(rows, width, dtype=dtype, device=DEVICE), made)
    with pytest.raises(ValueError, match="meta"):
        kernels.few_rows(torch.zeros(1, 64, device="meta"), made)


def on_device(made: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(made.kind, made.data.to(DEVICE), made.scale.to(DEVICE), made.group)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-3


# Models


def llama(**change: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE | change)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    return model


def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(input_ids=torch.tensor([IDS])).logits[0]
    return out


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights again as plain layers."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(layer.weight.dequantize()), layer.bias
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_a_quantized_model_is_the_model_nearly(kind: Kind, change: dict[str, Any]) -> None:
    model = llama(**change)
    own = logits(model)
    quantize_linears(model, kind)
    found = logits(model)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 3 * 7 + 1
    assert not any(type(layer) is nn.Linear for layer in model.modules())
    worst = {"int8": 0.06, "fp8": 0.25, "int4": 0.8}[kind]
    assert 0 < float((found - own).norm() / own.norm()) < worst
    assert torch.allclose(found, logits(dequantized(model)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_paged_runner_serves_it(kind: Kind) -> None:
    model = llama()
    quantize_linears(model, kind)
    own = logits(model)
    runner = ReferenceRunner(model, 16, {})
    runner.allocate(8)
    batch = Batch.pack([Chunk(IDS, 0, [5, 1, 7], len(IDS))], 16)
    assert torch.allclose(runner.forward(batch), own, atol=1e-4)


def test_a_tied_head_is_quantized_and_its_embedding_is_not() -> None:
    model = llama(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    quantize_linears(model, "int4")
    assert isinstance(model.lm_head, QuantizedLinear) and model.lm_head.weight.kind == "int8"
    assert model.get_input_embeddings().weight is embedding and torch.equal(embedding, before)
    assert model.model.layers[0].mlp.up_proj.weight.kind == "int4"
    assert bool(logits(model).isfinite().all())


def test_layers_that_are_left_alone() -> None:
    model = llama(tie_word_embeddings=True)
    quantize_linears(model, "int8", head=False, skip=("o_proj", "layers.1.mlp"))
    plain = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    outputs = {f"model.layers.{i}.self_attn.o_proj" for i in range(3)}
    assert plain == {
        "lm_head",
        *outputs,
        *(f"model.layers.1.mlp.{each}_proj" for each in ("gate", "up", "down")),
    }
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_reduced_head_is_a_head() -> None:
    model = DraftForCausalLM(DraftConfig(**SIZE, draft_vocab_size=50, tie_word_embeddings=False))
    quantize_linears(model, "int4", head=False)
    assert type(model.lm_head.linear) is nn.Linear
    quantize_linears(model, "int4", skip=("layers",))
    assert model.lm_head.linear.weight.kind == "int8"


def test_memory_never_holds_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(tie_word_embeddings=False)
    weights = [weakref.ref(layer.weight) for layer in model.modules() if type(layer) is nn.Linear]
    alive: list[int] = []

    def counting(weight: Tensor, *args: Any, **options: Any) -> QuantizedWeight:
        alive.append(sum(each() is not None for each in weights))
        return quantize(weight, *args, **options)

    monkeypatch.setattr(module, "quantize", counting)
    quantize_linears(model, "int8")
    assert alive == list(range(22, 0, -1))


def test_an_early_exit_shares_the_targets_quantized_weights() -> None:
    model = llama()
    draft = early_exit(model, 2)
    shared = shared_weights()
    quantize_linears(model, "int8", shared=shared)
    quantize_linears(draft, "int8", shared=shared)
    assert draft.model.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    assert draft.lm_head.weight is model.lm_head.weight
    assert len(shared) == 0  # nothing is held for weights that are gone


def test_another_kind_is_not_shared() -> None:
    model = llama()
    draft, shared = early_exit(model, 2), shared_weights()
    quantize_linears(model, "int8", shared=shared)
    quantize_linears(draft, "int4", shared=shared)
    assert draft.model.layers[1].mlp.up_proj.weight.kind == "int4"
    assert model.model.layers[1].mlp.up_proj.weight.kind == "int8"


def test_a_model_is_refused_whole() -> None:
    model = llama(intermediate_size=96)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.down_proj: int4 .* 96 inputs"):
        quantize_linears(model, "int4")
    with pytest.raises(ValueError, match="'int5'"):
        quantize_linears(model, "int5")  # type: ignore[arg-type]
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    model.is_quantized = True  # as transformers marks checkpoints that it keeps quantized
    with pytest.raises(ValueError, match="already"):
        quantize_linears(model, "int8")
    other = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers"):
        quantize_linears(other, "int8", head=False)


# Checkpoints


@pytest.mark.parametrize(
    ("method", "missing"),
    [
        ({"quant_method": "awq", "bits": 4}, ("gptqmodel",)),
        ({"quant_method": "gptq", "bits": 4}, ("optimum", "gptqmodel")),
        ({"quant_method": "compressed-tensors"}, ("compressed_tensors",)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes",)),
        ({"load_in_8bit": True}, ("bitsandbytes",)),
    ],
    ids=lambda each: str(each)[:40],
)
def test_missing_packages_are_named(method: dict[str, Any], missing: tuple[str, ...]) -> None:
    if any(importlib.util.find_spec(name) for name in missing):
        pytest.skip("installed here")
    with pytest.raises(CannotLoad) as caught:
        check_quantization_config({"quantization_config": method})
    message = str(caught.value)
    assert method.get("quant_method", "bitsandbytes") in message and "\n" not in message
    assert all(name in message for name in missing)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8.*CUDA"),
        ({"quant_method": "no_such"}, "'no_such'.*does not know"),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "'fp8'.*odd"),
        ({"quant_method": "nvfp4"}, "nvfp4"),
        ({}, "quant_method"),
        ("fp8", "'fp8', which is no table"),
    ],
    ids=str,
)
def test_other_reasons_are_given(method: Any, message: str) -> None:
    with pytest.raises(CannotLoad, match=message) as caught:
        check_quantization_config({"quantization_config": method}, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_what_can_be_loaded_passes() -> None:
    plain = LlamaConfig(**SIZE)
    check_quantization_config(plain)
    check_quantization_config({})
    assert not dequantize_at_load(plain)
    config = LlamaConfig(**SIZE, quantization_config={"quant_method": "fp8"})
    if DEVICE == "cpu":
        check_quantization_config(config)
    assert dequantize_at_load(config)
    check_quantization_config(config)
    assert config.quantization_config == {"quant_method": "fp8", "dequantize": True}
    assert not dequantize_at_load(LlamaConfig(**SIZE, quantization_config={"quant_method": "awq"}))
    as_object = LlamaConfig(**SIZE)
    as_object.quantization_config = FineGrainedFP8Config()
    assert dequantize_at_load(as_object)
    check_quantization_config(as_object)


def test_fp8_on_a_gpu_needs_kernels_unless_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept in fp8 it would load, and fail in its first forward."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    config = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(CannotLoad, match="CPU only where no GPU"):
        check_quantization_config(config, torch.device("cpu"))
    if importlib.util.find_spec("kernels") is None:
        with pytest.raises(CannotLoad, match=r"'fp8'.*kernels"):
            check_quantization_config(config)
    config["quantization_config"]["dequantize"] = True  # type: ignore[assignment]
    check_quantization_config(config)
    check_quantization_config(config, torch.device("cpu"))


def test_an_fp8_checkpoint_loads_dequantized(tmp_path: Path) -> None:
    model, block = llama(), 32
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if "proj" in name]:
        height, width = stored[name].shape
        tiles = stored[name].view(height // block, block, width // block, block)
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        tiles = (tiles / scale).to(torch.float8_e4m3fn)
        stored[name] = tiles.view(height, width)
        stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        model.get_parameter(name).copy_((tiles.float() * scale).view(height, width))
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    read = AutoConfig.from_pretrained(tmp_path)
    assert dequantize_at_load(read)
    check_quantization_config(read)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=read, dtype=torch.float32)
    loaded.requires_grad_(False)
    assert torch.equal(logits(loaded), logits(model))
    if DEVICE == "cpu":  # there it is transformers' own choice
        check_quantization_config(AutoConfig.from_pretrained(tmp_path))
        assert torch.equal(logits(load_model(str(tmp_path), device="cpu")), logits(model))
    quantize_linears(loaded, "fp8")  # and can be quantized anew
    assert float((logits(loaded) - logits(model)).norm() / logits(model).norm()) < 0.25
