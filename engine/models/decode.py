"""Host side of `kernels/decode.cu`: one launch for a pass over at most 16 tokens, in bfloat16.

A pass of few tokens is bound by reading the weights. Launched kernel by kernel, the memory idles
while each one starts and ends; this one keeps a ring of weight tiles filling on every
multiprocessor across all products, attentions and synchronisations of the pass. It is CUDA and not
Triton because Triton has no warps with different roles and no barrier over the grid. It is compiled
at start by NVRTC, which comes with torch, for the model's shape.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.kv.pool import KVPool
from engine.models.decode_data import BLOCK, MAP, META, MOST, Layer, Params, checked, tile_map
from engine.models.decoder import Decoder
from engine.models.offload import LayerStream

_SOURCES = Path(__file__).parent / "kernels"
_KC, _WARPS, _GROUP = 1024, 8, 12
_STAGE = 8 * (_KC * 2 + 64)
_MOST_PROCESSORS = 5 * 32  # a warp's lanes, each of which adds up PARTS_A_LANE


def why_not(decoder: Decoder, block_size: int) -> str | None:
    """Why a model's passes cannot go through the kernel, or None."""
    if isinstance(decoder.layers, LayerStream):
        return "its layers are streamed from the host"
    if decoder.device.type != "cuda" or torch.cuda.get_device_capability(decoder.device) < (9, 0):
        return "it needs a GPU of compute capability 9.0 or newer"
    if decoder.dtype != torch.bfloat16:
        return f"the weights are {decoder.dtype}, not bfloat16"
    if decoder.head_dim not in (64, 128) or block_size != BLOCK:
        return f"heads of {decoder.head_dim} over blocks of {block_size}"
    processors = torch.cuda.get_device_properties(decoder.device).multi_processor_count
    if min(decoder.hidden, decoder.inner, decoder.heads * decoder.head_dim, _known(decoder)) < processors:
        return f"a width is under the {processors} multiprocessors, each of which needs a row"
    if processors > _MOST_PROCESSORS:
        return f"{processors} multiprocessors; a split context is added up from at most {_MOST_PROCESSORS}"
    if any(n % 32 for n in (decoder.hidden, decoder.inner, decoder.heads * decoder.head_dim)):
        return "a width is no multiple of 32"
    matrices = [m for layer in decoder.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    if not all(isinstance(m, Tensor) for m in [*matrices, _head_weight(decoder)]):
        return "its weights are quantized"
    if any(layer.window is not None for layer in decoder.layers):
        return "it has sliding windows"
    if any(each is not None for layer in decoder.layers for each in (layer.gate_up_bias, layer.down_bias)):
        return "its MLP has biases"
    return None


class DecodeKernel:
    """The kernel for one model, for at most 8 and at most 16 tokens.

    `logits` float32[16, known] is what the last launch wrote; `known` is the head's own rows. `meta`
    int32[META] and `tables` int32[16, width] are read by the launch where they lie, so that earlier
    kernels may write them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, device = decoder, decoder.device
        head = _head_weight(decoder)
        assert head is not None
        self.known = head.shape[0]
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._head = head

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.logits = floats(MOST, self.known)
        self.hidden = floats(MOST, decoder.hidden)  # a draft's embedding may be reduced: computed before
        # What one stage hands to the next, absent (all bits set) until it is stored; two copies of each.
        sizes = {
            "hn": 3 * 2 * MOST * decoder.hidden * 2,
            "attn": 2 * MOST * decoder.heads * decoder.head_dim * 2,
            "act": 2 * MOST * decoder.inner * 2,
            "qkv": 2 * MOST * (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim * 4,
            "sumsq": 3 * 2 * self._processors * MOST * 4,
            "part": 2 * self._processors * 16 * decoder.head_dim * 4,
            "part_ml": 2 * self._processors * 16 * 2 * 4,
        }
        self._work = {
            name: torch.full((size,), 255, dtype=torch.uint8, device=device) for name, size in sizes.items()
        }
        self._work["launches"] = torch.zeros(1, dtype=torch.int32, device=device)
        self._layers: Tensor | None = None
        self._maps: Tensor | None = None  # uint8[layers * 2 * MAP]
        self._functions: dict[int, tuple[Any, int]] = {}
        self._params: dict[tuple[int, int, int], tuple[Any, int]] = {}
        from cuda.bindings import driver

        self._launch: Any = driver.cuLaunchKernel
        self._embed = decoder.embed.weight if isinstance(decoder.embed, torch.nn.Embedding) else None

    @property
    def embeds(self) -> bool:
        """Whether the kernel looks tokens up itself; else `hidden` must hold their embeddings."""
        return self._embed is not None

    def attach(self, pool: KVPool) -> None:
        """Reads and writes this pool from now on."""
        layers = self._decoder.layers
        maps = [tile_map(each[i]) for i in range(len(layers)) for each in (pool.keys, pool.values)]
        self._maps = torch.frombuffer(bytearray(b"".join(maps)), dtype=torch.uint8).to(self._decoder.device)
        table = (Layer * len(layers))()
        for i, layer in enumerate(layers):
            values = (
                layer.qkv, layer.out, layer.gate_up, layer.down, layer.qkv_bias, layer.out_bias,
                layer.norm_in, layer.norm_mid, layer.query_norm, layer.key_norm, pool.keys[i], pool.values[i],
                self._maps[2 * i * MAP :], self._maps[(2 * i + 1) * MAP :],
            )  # fmt: skip
            table[i] = Layer(*(each.data_ptr() if isinstance(each, Tensor) else 0 for each in values))
        self._params.clear()
        self._layers = torch.frombuffer(bytearray(table), dtype=torch.uint8).to(self._decoder.device)

    def compile(self) -> None:
        """Builds both variants now rather than at their first launch (seconds each)."""
        for most in (8, MOST):
            self._function(most)

    def launch(self, meta: Tensor, tables: Tensor, most: int) -> None:
        """Queues a pass on the current stream. `most` >= meta's number of tokens; none does nothing."""
        assert self._layers is not None
        key = meta.data_ptr(), tables.data_ptr(), tables.stride(0)
        if key not in self._params:
            if len(self._params) > 256:
                self._params.clear()
            self._params[key] = self._parameters(*key)
        function, shared = self._function(8 if most <= 8 else MOST)
        stream = torch.cuda.current_stream(self._decoder.device).cuda_stream
        checked(
            self._launch(
                function, self._processors, 1, 1, _WARPS * 32 + 64, 1, 1, shared, stream,
                self._params[key][1], 0,
            )
        )  # fmt: skip

    def normed(self, tokens: int) -> Tensor:
        """float32[tokens, hidden]: what the last launch's head made its logits of. Without a read-back."""
        d, most = self._decoder, MOST
        last = (self._work["launches"] - 1).bitwise_and(1)  # which copy it wrote
        size = most * d.hidden
        hn = self._work["hn"].view(torch.bfloat16).view(3, 2, size)[2].index_select(0, last)
        squares = self._work["sumsq"].view(torch.float32).view(3, 2, self._processors * most)[2]
        squares = squares.index_select(0, last).view(self._processors, most)[:, :tokens].sum(0)
        rstd = (squares / d.hidden + d.eps).rsqrt()
        return hn.view(most, d.hidden)[:tokens].float() * rstd[:, None]

    def _parameters(self, meta: int, tables: int, stride: int) -> tuple[Any, int]:
        """What a launch is given, and the address of its address."""
        decoder = self._decoder
        assert self._layers is not None
        params = Params(
            layers=self._layers.data_ptr(),
            embed=0 if self._embed is None else self._embed.data_ptr(),
            hidden=self.hidden.data_ptr(),
            norm=decoder.norm.data_ptr(),
            head=self._head.data_ptr(),
            inv_freq=decoder.inv_freq.data_ptr(),
            meta=meta,
            tables=tables,
            logits=self.logits.data_ptr(),
            table_stride=stride,
            eps=decoder.eps,
            rope_scale=decoder.rope_scale,
            scale=decoder.scaling,
            **{name: tensor.data_ptr() for name, tensor in self._work.items()},
        )
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        return (params, pointers), ctypes.addressof(pointers)

    def _function(self, most: int) -> tuple[Any, int]:
        """The compiled kernel and its shared memory in bytes."""
        if most not in self._functions:
            self._functions[most] = self._load(most)
        return self._functions[most]

    def _load(self, most: int) -> tuple[Any, int]:
        from cuda.bindings import driver

        d = self._decoder
        fixed = self._shared_bytes(most)
        attributes = driver.CUdevice_attribute
        most_shared = attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        limit = checked(driver.cuDeviceGetAttribute(most_shared, d.device.index or 0))
        stages = (limit - fixed) // _STAGE
        if stages < 3:
            raise RuntimeError(
                f"{limit} bytes of shared memory leave no room for weights beside {fixed} of state"
            )
        defines = {
            "H": d.hidden, "NH": d.heads, "NKV": d.kv_heads, "HD": d.head_dim, "INTER": d.inner,
            "LAYERS": len(d.layers), "VOCAB": self.known, "MT": most, "NSM": self._processors,
            "STAGES": stages,
        }  # fmt: skip
        image = _compile(tuple(defines.items()), torch.cuda.get_device_capability(d.device))
        module = checked(driver.cuModuleLoadData(image))
        function = checked(driver.cuModuleGetFunction(module, b"decode"))
        shared = fixed + stages * _STAGE
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, shared))
        return function, shared

    def _shared_bytes(self, most: int) -> int:
        """What `Shared` in decode.cu takes at most, but for the ring."""
        d = self._decoder

        def share(rows: int) -> int:
            return -(-rows // self._processors)

        own = share(d.hidden)
        parts = (
            max(4 * 16 * d.head_dim, _WARPS * _GROUP * 8 * most) * 4,  # red
            most * d.head_dim // 2 * 8,  # rope
            most * own * 4,  # own
            (16 + 2 * most) * (d.head_dim + 8) * 2,  # q, k, v
            len(d.layers) * (ctypes.sizeof(Layer) + 2 * share((d.heads + 2 * d.kv_heads) * d.head_dim)),
            (2 * len(d.layers) + 1) * own * 2,  # norms
            256 * 4,  # table
            META * 4 + most * 4 + _WARPS * 16 * 8 + 64 * 16 + 512,
        )
        return -(-sum(parts) // 128) * 128


@functools.cache
def _compile(defines: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    """The kernel's machine code. Raises RuntimeError with the compiler's log."""
    from cuda.bindings import nvrtc

    headers = sorted(_SOURCES.glob("decode_*.cuh"))
    arch = "sm_{}{}".format(*capability)
    options = [b"--gpu-architecture=" + arch.encode(), b"--std=c++17", b"-default-device"]
    options += [f"-D{name}={value}".encode() for name, value in defines]
    program = checked(
        nvrtc.nvrtcCreateProgram(
            (_SOURCES / "decode.cu").read_bytes(),
            b"decode.cu",
            len(headers),
            [header.read_bytes() for header in headers],
            [header.name.encode() for header in headers],
        )
    )
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result):
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"the decoding kernel does not compile: {log.decode()}")
    image: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, image))
    return image


def _known(decoder: Decoder) -> int:
    """Rows of the head."""
    head = _head_weight(decoder)
    return 0 if head is None else head.shape[0]


def _head_weight(decoder: Decoder) -> Tensor | None:
    """[known, hidden]: the head's matrix; None if it is not one."""
    head: Any = getattr(decoder.head, "linear", decoder.head)
    return head.weight if type(head) is torch.nn.Linear and head.bias is None else None
