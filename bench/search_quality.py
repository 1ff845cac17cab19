"""How soon each strategy finds good architectures, on recorded evaluations: seconds, not days.

python bench/search_quality.py record METHOD TABLE [--count 120] [--again 10x3] -- SEARCH FLAGS
python bench/search_quality.py add TABLE RUN [RUN ..]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is measured

import torch  # noqa: E402

import nasfast  # noqa: E402, F401  before torch: OpenMP's waiting threads then yield the cores
from nasfast.methods import registry  # noqa: E402
from nasfast.methods.features import start_workers  # noqa: E402
from nasfast.methods.segmentation.search import Inputs, evaluator_on, make_evaluator  # noqa: E402
from nasfast.runs.records import Evaluation  # noqa: E402
from nasfast.runs.study import Study  # noqa: E402
from nasfast.training.loop import Runtime  # noqa: E402
from nasfast.workers import Job  # noqa: E402


def record(method: str, path: Path, count: int, again: tuple[int, int], argv: list[str]) -> None:
    """Evaluate uniform draws of a space, stage 0 alone, into a table; a table that exists is
    continued. The first ones are evaluated several times, each with another seed."""
    config: Any = registry.method_named(method).parse_search([method, *argv])
    space = config.decoders.space
    rng = random.Random(config.seed)
    drawn = [space.sample(rng) for _ in range(count)]
    jobs = [Job(index, genotype, {}) for index, genotype in enumerate(drawn)]
    first, times = again
    for repeat in range(1, times):
        jobs += [Job(count * repeat + i, drawn[i], {}) for i in range(first)]
    table: dict[str, Any] = {"rows": []}
    if path.exists():
        table = json.loads(path.read_text())
    table |= {
        "space": space.name,
        "method": method,
        "data": Path(config.data).name,
        "command": f"python bench/search_quality.py record {method} {path.name} --count {count} "
        f"--again {first}x{times} -- {' '.join(argv)}",
        "machine": _processor(),
        "torch": torch.__version__,
    }
    done = {(row["seed"], row["index"]) for row in table["rows"]}
    jobs = [job for job in jobs if (config.seed, job.index) not in done]
    torch.set_num_threads(config.threads)
    workers = config.worker_config()
    runtime = Runtime(torch.device(workers.devices[0]))
    inputs = Inputs.open(config)
    engine, features = start_workers(
        workers, functools.partial(evaluator_on, config), lambda: inputs.features(config, runtime)
    )
    evaluator = make_evaluator(config, features)
    try:
        evaluations = engine.evaluate(evaluator, jobs, lambda running: None)
        for job, evaluation in zip(jobs, evaluations, strict=True):
            row = _row(space.encode(job.genotype), config.seed, job.index, evaluation)
            table["rows"].append(row)
            print(f"{len(table['rows'])}/{len(jobs) + len(done)} {row}", flush=True)
            _write(path, table)
    finally:
        engine.close()


def add(path: Path, runs: Sequence[Path]) -> None:
    """Put what random searches evaluated into the table of their space and data."""
    table = json.loads(path.read_text())
    space = registry.method_named(table["method"]).build_space()
    done = {(row["seed"], row["index"]) for row in table["rows"]}
    for run in runs:
        study = Study.open(run)
        seed = study.config.get("seed", 0)
        for found in study.records:
            if found.duplicate_of is None and (seed, found.index) not in done:
                choices = space.encode(space.from_json(found.genotype))
                table["rows"].append(_row(choices, seed, found.index, found.evaluation))
    _write(path, table)


def _row(choices: Sequence[int], seed: int, index: int, evaluation: Evaluation) -> dict[str, Any]:
    reward = evaluation.rewards.get("stage0")
    return {
        "choices": list(choices),
        "seed": seed,
        "index": index,
        "reward": None if reward is None else round(reward, 5),
        "params": int(evaluation.costs["params"]),
        "macs": int(evaluation.costs["macs"]),
        "seconds": round(
            sum(s for name, s in evaluation.seconds.items() if name.startswith("stage0")), 2
        ),
    }


def _write(path: Path, table: dict[str, Any]) -> None:
    """JSON with one evaluation a line."""
    rows = ",\n".join(json.dumps(row) for row in table["rows"])
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    text = f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("method")
    one.add_argument("table", type=Path)
    one.add_argument("--count", type=int, default=120)
    one.add_argument("--again", default="10x3")
    argv, _, flags = _split(sys.argv[1:])
    args = parser.parse_args(argv)
    start = time.perf_counter()
    if args.command == "record":
        first, times = map(int, args.again.split("x"))
        record(args.method, args.table, args.count, (first, times), flags)
    print(f"{time.perf_counter() - start:.0f} s")


def _split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    if "--" not in argv:
        return argv, "", []
    at = argv.index("--")
    return argv[:at], "--", argv[at + 1 :]


if __name__ == "__main__":
    main()
