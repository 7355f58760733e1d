"""Checkpoints that were saved quantized: whether transformers can load one here, and how.

Loading is transformers' own; what a method needs is asked of it, without reading any weights.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer
from transformers.utils.import_utils import is_kernels_available

from engine.models.folder import first_line
from engine.models.references import quiet
from engine.types import CannotLoad

# What transformers needs to load a method's checkpoints: packages, by the name they are imported by.
_PACKAGES = {
    "awq": ("gptqmodel",),
    "gptq": ("optimum", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
    "fbgemm_fp8": ("fbgemm_gpu",),
    "bitsandbytes": ("bitsandbytes",),
}
_REFUSALS = (ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, NotImplementedError)


def check_quantization_config(
    config: PreTrainedConfig | Mapping[str, Any], device: torch.device | None = None
) -> None:
    """Whether transformers can load a checkpoint saved quantized onto `device`; None: a GPU if there is one.

    A config without `quantization_config` passes. Raises CannotLoad, in one line, with the method
    and the package or the hardware that is missing.
    """
    found = _quantization_of(config)
    if found is None:
        return
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = str(
        found.get("quant_method") or ("bitsandbytes" if _is_bitsandbytes(found) else "no named method")
    )
    if method == "fbgemm_fp8" and device.type != "cuda":
        raise CannotLoad(f"weights quantized by {method!r} need a CUDA device of compute capability 9.0")
    if missing := [name for name in _PACKAGES.get(method, ()) if importlib.util.find_spec(name) is None]:
        raise CannotLoad(f"weights quantized by {method!r} need what is not installed: {', '.join(missing)}")
    try:
        with quiet(progress=False):
            if not AutoHfQuantizer.supports_quant_method(found):
                raise ValueError(f"transformers {transformers_version} does not know it")
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(found), pre_quantized=True)
            quantizer.validate_environment(device_map={"": device}, weights_only=True)
    except _REFUSALS as error:
        raise CannotLoad(f"weights quantized by {method!r}: {first_line(error)}") from error
    if method in ("fp8", "mxfp8") and not quantizer.quantization_config.dequantize:
        # Else it would load, and fail in its first forward: the products are fetched kernels.
        if device.type != "cuda":
            raise CannotLoad(f"weights quantized by {method!r} are dequantized on a CPU only where no GPU is")
        if not is_kernels_available():
            raise CannotLoad(f"weights quantized by {method!r} need what is not installed: kernels")


def dequantize_at_load(config: PreTrainedConfig) -> bool:
    """Has transformers turn a quantized checkpoint into plain weights as it loads it, where it can, by
    the config given to `from_pretrained`. Returns whether it will. The result is as any model's:
    it needs no hub's kernels, fits the packed and the paged runners, and can be quantized anew."""
    found = _quantization_of(config)
    kind = None if found is None else AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(found.get("quant_method")))
    if found is None or kind is None or "dequantize" not in inspect.signature(kind).parameters:
        return False
    config.quantization_config = {**found, "dequantize": True}
    return True


def _quantization_of(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any] | None:
    if isinstance(config, Mapping):
        found = config.get("quantization_config")
    else:
        found = getattr(config, "quantization_config", None)
        found = found or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    if not hasattr(found, "to_dict"):
        raise CannotLoad(f"quantization_config is {found!r}, which is no table of settings")
    settings = dict(found.to_dict())
    method = settings.get("quant_method")
    return {
        **settings,
        "quant_method": getattr(method, "value", method),
    }  # an enum's name is not the method's


def _is_bitsandbytes(found: Mapping[str, Any]) -> bool:
    return bool(found.get("load_in_8bit") or found.get("load_in_4bit"))
