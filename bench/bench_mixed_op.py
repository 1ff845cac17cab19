"""A mixed operation beside its rivals, as multiples of the eager formulation, and its memory.

    pytest bench/bench_mixed_op.py --benchmark-json=mixed_op.json

One table per direction, training (forward and backward) and evaluation (forward): multiple of
eager, ms, GFLOP/s. The rows that pytest-benchmark prints are the leg "save". Then what a cell and
the published supernet keep for their backward pass, and the memory of a search step at its peak.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import harness
import mixed_rivals
import pytest
import rivals
from mixed_rivals import EAGER, LEGS, OWN, Problem

Tables = dict[str, dict[str, dict[str, object]]]


@pytest.mark.parametrize("channels", mixed_rivals.CHANNELS, ids=lambda c: f"C{c}")
@pytest.mark.parametrize("backward", [True, False], ids=["training", "evaluation"])
def test_mixed_op(
    benchmark: Any, pytestconfig: pytest.Config, tables: Tables, channels: int, backward: bool
) -> None:
    problem = Problem(channels)
    names = [name for name in LEGS if backward or name != "recompute"]
    if not pytestconfig.getoption("compile"):
        names.remove("compiled eager")
    calls, skipped = rivals.calls(names, problem, backward, LEGS, OWN)
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
    for way in mixed_rivals.WAYS:
        cells = {f"cell, C={c}": mixed_rivals.kept_by_cell(way, c) for c in mixed_rivals.CHANNELS}
        cells["supernet"] = mixed_rivals.kept_by_supernet(way)
        lines[way] = {name: f"{size / harness.MIB:.1f} MiB" for name, size in cells.items()}


def test_memory_at_the_peak(tables: Tables) -> None:
    """Of one step of the weights, beyond weights and gradients; eager would take 20 GB."""
    sizes = mixed_rivals.CONFIG, mixed_rivals.BATCH, mixed_rivals.SIZE
    peak = harness.extra_memory(mixed_rivals.memory_calls, *sizes)
    told = "not told by the system" if peak is None else f"{peak / harness.MIB:.0f} MiB"
    lines = tables.setdefault("peak of a search step of the published supernet", {})
    lines["recompute"] = {"beyond weights and gradients": told}
