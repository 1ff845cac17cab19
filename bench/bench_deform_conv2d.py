"""deform_conv2d beside its baselines, as multiples of a plain convolution of the same shape.

    pytest bench/bench_deform_conv2d.py --benchmark-json=deform_conv2d.json

One table per direction: multiple of the convolution, ms, GFLOP/s, and the memory at the peak beyond
output and gradients. The row that pytest-benchmark prints is that of "nasfast".
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import deform_conv2d_baselines as deform
import harness
import pytest
from deform_conv2d_baselines import Problem

IMPLEMENTATIONS = (
    deform.FLOOR,
    "nasfast",
    "nasfast bfloat16",
    "torchvision",
    "mmcv",
    "grid_sample",
    "onnxruntime",
)


@pytest.mark.parametrize("shape", deform.SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_deform_conv2d(
    benchmark: Any,
    pytestconfig: pytest.Config,
    tables: dict[str, dict[str, dict[str, object]]],
    shape: tuple[int, int, int, int, int],
    backward: bool,
) -> None:
    problem = Problem(*shape, spread=pytestconfig.getoption("spread"))
    names = (*IMPLEMENTATIONS, *(("compiled gather",) if pytestconfig.getoption("compile") else ()))
    calls, skipped = deform.calls(names, problem, backward)
    rounds = harness.Rounds(calls)
    count = rounds.warm_up(pytestconfig.getoption("seconds"))
    others = [name for name in calls if name != "nasfast"]

    def setup() -> None:
        rounds.time(*others)
        calls["nasfast"]()

    benchmark.pedantic(rounds.time_warm, args=("nasfast",), setup=setup, rounds=count)
    memory = {
        name: harness.extra_memory(deform.memory_calls, name, problem, backward) for name in calls
    }
    rows = harness.rows(rounds, deform.FLOOR, problem.flops(backward), memory)
    half = {}
    if "nasfast bfloat16" in rows:
        half["bfloat16 / float32"] = rounds.multiple("nasfast bfloat16", "nasfast")
    benchmark.extra_info.update(
        machine=harness.machine_line(),
        spread=problem.spread,
        rows={name: asdict(row) for name, row in rows.items()},
        skipped=skipped,
        **half,
    )
    cells = {name: f"{value:.2f}x" for name, value in half.items()}
    direction = "forward and backward" if backward else "forward"
    title = f"deform_conv2d {direction}, float32, offsets of deviation {problem.spread} px"
    tables.setdefault(title, {})[str(problem)] = {**rows, **cells}
    tables.setdefault("skipped", {}).update({name: {"reason": skipped[name]} for name in skipped})
