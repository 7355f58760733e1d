"""Compiles our Triton kernels for a Hopper GPU on a machine without any: a script of its own.

The interpreter that CI runs kernels in takes what a compiler refuses (types that change in a loop,
scalars where pointers belong). Wrappers are called with tensors of the CPU; what they would launch
is compiled instead, down to machine code. Prints the names of the compiled kernels, one a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CPU, BF16 = torch.device("cpu"), torch.bfloat16
VOCAB = 151936


class Hopper(DriverBase):
    """What the compiler asks of a driver."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> None:
        return None

    def get_device_interface(self) -> None:
        return None


def compile_only(self: Any, grid: Any) -> Callable[..., Any]:
    def launch(*args: Any, **options: Any) -> Any:
        compiled = self.warmup(*args, grid=grid, **options)
        assert compiled.asm["cubin"], self.fn.__name__
        print(self.fn.__name__)
        return compiled

    return launch


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def longs(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def choosing() -> None:
    from engine.models.kernels.choose import Chooser, Laws

    chooser, logits = Chooser(4, VOCAB, CPU), torch.zeros(16, VOCAB)
    laws = Laws(torch.zeros(4, 16, VOCAB, dtype=BF16), ints(4), ints(1))
    rows = logits, ints(4), longs(4), longs(4), torch.ones(4)
    chooser(*rows)
    chooser(*rows, signals=True, top=True, laws=laws)
    chooser(logits.to(BF16), *rows[1:], signals=True, laws=laws)


def rejecting() -> None:
    from engine.models.kernels.reject import reject

    by_position = ints(8), ints(8), ints(8), torch.ones(8), torch.zeros(8, dtype=torch.float64)
    by_row = ints(3), ints(3), longs(3), longs(3)
    for logits in (torch.zeros(16, VOCAB), torch.zeros(16, VOCAB, dtype=BF16)):
        reject(logits, torch.zeros(64, VOCAB, dtype=BF16), by_position, by_row, VOCAB)
        reject(logits, None, by_position, by_row, VOCAB)


def advancing() -> None:
    from engine.models.decode_data import META, MOST
    from engine.models.kernels.advance import MOST_SL, advance

    for size, compact in ((1, True), (8, True), (64, False)):
        rows = {name: longs(size) for name in ("position", "key", "limit")}
        for name in (
            *("place", "alive", "length", "reason"),
            *("ids", "positions", "slots", "starts", "lengths"),
        ):
            rows[name] = ints(size)
        rows |= {"drafted": ints(size * MOST_SL), "progress": ints(4), "meta": ints(META)}
        rows["tables"] = ints(size, 9)
        keep = torch.ones(size, dtype=torch.bool)
        fine = torch.ones(size, dtype=torch.int8)
        advance(ints(size), fine, keep, rows, most=MOST, compact=compact, block_size=16, spare_slot=99)


def agreeing() -> None:
    from engine.models.decode_data import META, MOST
    from engine.models.kernels.agree import agree

    agree(ints(META), ints(MOST), torch.ones(MOST, dtype=torch.int8), ints(4, MOST))


def attending() -> None:
    from engine.models.kernels.attention import Places, attend

    for tokens, longest, programs in ((4, 1, 264), (40, 8, 1)):
        qkv = torch.zeros(tokens, 28 + 8, 128, dtype=BF16)
        pool = torch.zeros(512, 4, 128, dtype=BF16)
        places = Places(ints(4), ints(4), ints(4), ints(4, 9), longest)
        trees = replace(
            places, positions=ints(tokens), trunks=ints(4), sees=ints(tokens), masks=longs(tokens)
        )
        for each in (places, trees):
            attend(
                qkv, pool, pool.clone(), each, heads=28, scaling=0.1, window=None, block_size=16,
                programs=programs,
            )  # fmt: skip


def between_products() -> None:
    from engine.models.kernels.pointwise import add_norm, gate

    hidden, weight = torch.zeros(4, 3584), torch.ones(3584, dtype=BF16)
    add_norm(hidden, None, weight, 1e-6)
    add_norm(hidden, torch.zeros(4, 3584, dtype=BF16), weight, 1e-6)
    gate(torch.zeros(4, 2 * 18944, dtype=BF16))


def disco() -> None:
    from engine.models.kernels.disco import decide

    shapes = {"low": 12, "high": 12, "b1": 64, "w2": 64, "b2": 1}
    weights = {name: torch.zeros(size) for name, size in shapes.items()} | {"w1": torch.zeros(12, 64)}
    decide(torch.zeros(4, 10), torch.zeros(4), ints(4), longs(4), torch.zeros(8), weights)


def goodput() -> None:
    from unit import test_goodput as shipped

    from engine.speculation.policy import Outcome

    for rows, seed in ((1, 0), (5, 1), (40, 0)):
        twins = shipped.Twins(rows, seed)
        state = twins.states[1]
        shipped.launched.limit(state)
        shipped.launched.decide(twins.signals(1, torch.ones(rows, dtype=torch.bool)), state)
        shipped.launched.observe(Outcome(longs(rows) + 2, longs(rows) + 1), state)


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_only
    for compiled in (choosing, rejecting, advancing, agreeing, attending, between_products, disco, goodput):
        compiled()


if __name__ == "__main__":
    main()
