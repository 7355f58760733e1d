"""The benchmark's target: widened in memory, its spare layers held once, and still the source's function."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_offload import CPU, lent, own_logits
from test_reference_runner import CONFIGS, make

from engine.models.offload import DecoderLayer, HostLayer
from engine.models.placing import Placement, plan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pair = importlib.import_module("offload_pair")
bench = importlib.import_module("offload")
widening = importlib.import_module("widen")


@pytest.mark.parametrize("resident", [0, 2, 5])
def test_the_widened_target_is_the_source(resident: int) -> None:
    source = make(CONFIGS["llama"]())
    shape = replace(
        widening.shape_of(source.config), hidden=48, intermediate=64, layers=9, heads=8, kv_heads=4
    )
    wide, filler = widening.hollow(source, shape, CPU, torch.float32)
    wide.requires_grad_(False)
    stream = pair._placed(wide, filler, CPU, plan(wide, CPU, resident=resident), live=4)
    with lent(wide, stream):
        assert torch.allclose(own_logits(wide), own_logits(source), atol=1e-4)
    host = [each for each in stream._layers if isinstance(each, HostLayer)]
    there = [each for each in stream._layers if isinstance(each, DecoderLayer)]
    spare = len(host) - 4
    assert len({each.flat.data_ptr() for each in host}) == 4 + min(spare, 1)
    assert len({each.down.data_ptr() for each in there}) == len(there) == resident  # type: ignore[union-attr]
    assert bool(host[-1].weights.qkv.any()) and not any(p.is_meta for p in wide.parameters())  # type: ignore


def test_the_host_must_hold_spare_layers_once() -> None:
    placement = Placement(resident=30, streamed=50, layer_bytes=7, buffers=2)
    assert pair._distinct(placement, live=24).host_bytes == 25 * 7
    assert pair._distinct(placement, live=60).host_bytes == 50 * 7


def test_rows_are_saved_as_they_come(tmp_path: Path) -> None:
    path, figures = tmp_path / "a.json", {"floor_seconds": 1.0, "rows": []}
    table: Any = bench.Table(*bench.COLUMNS)
    alone = bench.Row(0.0, {"drafter": "none"}, 3, 6.0, 1, 3, [(0, 1), (0, 1)], [[5, 6, 7, 8]])
    other = bench.Row(0.0, {"policy": "goodput"}, 9, 4.5, 2, 3, [(6, 4), (2, 2)], [[5, 6, 7, 9, 1], [3]])
    bench._keep(figures, table, alone, alone, path)
    bench._keep(copy.copy(figures), table, other, alone, path)
    found = json.loads(path.read_text())["rows"]
    assert found[0]["tokens_per_second"] == 0.5 and found[0]["of_floor"] == 0.5
    assert found[1]["over_alone"] == 4.0 and found[1]["emitted_per_pass"] == 3.0
    assert found[1]["drafted_per_pass"] == 4.0 and found[1]["texts_unlike_alone"] == 1
    bench._keep(figures, table, bench.Row(0.0, {}), alone, path)  # no time for it
    assert len(figures["rows"]) == 2


def test_drafters_come_as_json() -> None:
    assert bench._drafters('[{"policy": "goodput"}]') == [{"policy": "goodput"}]
    for bad in ('{"policy": "goodput"}', "[3]", '[{"policy": 3}]', "nothing"):
        with pytest.raises(ValueError):
            bench._drafters(bad)
