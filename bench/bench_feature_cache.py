"""Feeding a trainer from a warm feature cache beside the forms people use and a memory copy.

    pytest bench/bench_feature_cache.py --benchmark-json=feature_cache.json

Batches of 8 samples of 1.34 MiB in float16, shuffled, one thread a process: samples a second, and
speed as a multiple of the plain memory copy of the same bytes, the faster of PyTorch's and NumPy's.
The rows that pytest-benchmark prints are those of "batches". Then processes that read at the same
time, and the memory that another reader costs. "views" hand out tensors over the memory map that
nothing reads; "views, read" also sums their words.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import feature_cache_baselines as features
import harness
import pytest
import torch
from feature_cache_baselines import FLOORS, IMPLEMENTATIONS, Rate, Store

Tables = dict[str, dict[str, dict[str, object]]]
TOGETHER = (
    "batches",
    "batches, none ahead",
    "batch",
    "DataLoader(2), memmap",
    "DataLoader(2), files",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("features")
    yield Store(folder, features.SAMPLES, features.SHAPES)
    torch.set_num_threads(threads)


def bytes_of(store: Store) -> str:
    size = store.cache.layout.sample_bytes / harness.MIB
    return f"{size:.2f} MiB a sample, {store.samples * size:.0f} MiB"


def test_batches(benchmark: Any, pytestconfig: pytest.Config, tables: Tables, store: Store) -> None:
    passes = {name: make(store) for name, make in IMPLEMENTATIONS.items()}
    calls = {name: lambda given=given: features.drain(given) for name, given in passes.items()}
    for call in calls.values():  # makes what it reads, and starts its workers
        call()
    rounds = harness.Rounds(calls)
    count = rounds.warm_up(pytestconfig.getoption("seconds"))
    others = [name for name in calls if name != "batches"]

    def setup() -> None:
        rounds.time(*others)
        calls["batches"]()

    benchmark.pedantic(rounds.time_warm, args=("batches",), setup=setup, rounds=count)
    floor = min(FLOORS, key=lambda name: statistics.median(rounds.times[name]))
    rates = {
        name: Rate(store.samples / statistics.median(times), 1 / rounds.multiple(name, floor))
        for name, times in rounds.times.items()
    }
    benchmark.extra_info.update(
        machine=harness.machine_line(),
        rows={name: asdict(rate) for name, rate in rates.items()},
        times=rounds.times,
    )
    lines = tables.setdefault(f"batches of {features.BATCH}, {bytes_of(store)}", {})
    for name, rate in rates.items():
        lines[name] = {
            "samples": f"{rate.samples_per_second:,.0f}/s",
            "copy": f"{rate.of_copy:.2f}x",
        }


def test_processes_together(pytestconfig: pytest.Config, tables: Tables, store: Store) -> None:
    seconds = pytestconfig.getoption("seconds") / 5
    lines = tables.setdefault("processes that read at the same time, samples/s in all", {})
    for name in TOGETHER:
        lines[name] = {
            f"{n} process{'es' if n > 1 else ''}": f"{rate:,.0f}"
            for n in (1, 2)
            for rate in [features.together(store, name, n, seconds)]
        }


def test_private_memory_of_another_reader(tables: Tables, store: Store) -> None:
    readers = {
        "attached, every sample read in place": "views, read",
        "attached, every sample read in batches": "batches",
        "attached, the same, none ahead": "batches, none ahead",
    }
    features.drain(IMPLEMENTATIONS["views, read"](store))
    lines = tables.setdefault("private memory of another reader, beyond importing torch", {})

    def median(reader: str | None) -> float:
        repeats = range(features.REPEATS)
        return statistics.median(features.private_memory(store, reader) for _ in repeats)

    alone = median(None)
    for name, reader in readers.items():
        lines[name] = {"memory": f"{(median(reader) - alone) / harness.MIB:.1f} MiB"}
