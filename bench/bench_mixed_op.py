"""A mixed operation beside its baselines, as multiples of the eager formulation, and its memory.

    pytest bench/bench_mixed_op.py --benchmark-json=mixed_op.json

One table per direction, training (forward and backward) and evaluation (forward): multiple of
eager, ms, GFLOP/s. The rows that pytest-benchmark prints are those of "save". Then what a cell and
the published supernet keep for their backward pass, and the memory of a search step at its peak.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import deform_conv2d_baselines as deform
import harness
import mixed_op_baselines as mixed
import pytest
from mixed_op_baselines import EAGER, IMPLEMENTATIONS, OWN, Problem

Tables = dict[str, dict[str, dict[str, object]]]


@pytest.mark.parametrize("channels", mixed.CHANNELS, ids=lambda c: f"C{c}")
@pytest.mark.parametrize("backward", [True, False], ids=["training", "evaluation"])
def test_mixed_op(
    benchmark: Any, pytestconfig: pytest.Config, tables: Tables, channels: int, backward: bool
) -> None:
    problem = Problem(channels)
    names = [name for name in IMPLEMENTATIONS if backward or name != "recompute"]
    if not pytestconfig.getoption("compile"):
        names.remove("compiled eager")
    calls, skipped = deform.calls(names, problem, backward, IMPLEMENTATIONS, OWN)
    rounds = harness.Rounds(calls)
    count = rounds.warm_up(pytestconfig.getoption("seconds"))
    others = [name for name in calls if name != "save"]

    def setup() -> None:
        rounds.time(*others)
        calls["save"]()

    benchmark.pedantic(rounds.time_warm, args=("save",), setup=setup, rounds=count)
    rows = harness.rows(rounds, EAGER, problem.flops(backward), {})
    benchmark.extra_info.update(
        machine=harness.machine_line(),
        rows={name: asdict(row) for name, row in rows.items()},
        skipped=skipped,
    )
    title = f"mixed_op, {'training' if backward else 'evaluation'}, float32"
    tables.setdefault(title, {})[str(problem)] = dict(rows)
    for name, reason in skipped.items():
        tables.setdefault("skipped", {})[name] = {"reason": reason}


def test_memory_kept_for_backward(tables: Tables) -> None:
    lines = tables.setdefault("kept for the backward pass, float32, batch 12, 64x64", {})
    for way in mixed.WAYS:
        cells = {f"cell, C={c}": mixed.kept_by_cell(way, c) for c in mixed.CHANNELS}
        cells["supernet"] = mixed.kept_by_supernet(way)
        lines[way] = {name: f"{size / harness.MIB:.1f} MiB" for name, size in cells.items()}


def test_memory_at_the_peak(tables: Tables) -> None:
    """Of one step of the weights, beyond weights and gradients; eager would take 20 GB."""
    sizes = mixed.CONFIG, mixed.BATCH, mixed.SIZE
    peak = harness.extra_memory(mixed.memory_calls, *sizes)
    text = "not reported by the system" if peak is None else f"{peak / harness.MIB:.0f} MiB"
    lines = tables.setdefault("peak of a search step of the published supernet", {})
    lines["recompute"] = {"beyond weights and gradients": text}
