"""Time networks and operators on this machine: ``python on_target.py TABLE.json``.

They lie in the folder of this file. It needs Python 3.9, NumPy and onnxruntime, and no nasfast.
``nasfast search --latency-table TABLE.json`` then searches for this machine on another one.
``--threads N`` decides the threads.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import onnxruntime  # type: ignore[import-untyped]

FOLDER = Path(__file__).resolve().parent


def runner(path: Path, shapes: "list[list[int]]", threads: int) -> "Callable[[], object]":
    """One pass of a network or an operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    draw = numpy.random.default_rng(0).random
    inputs = {name: draw(shape, numpy.float32) for name, shape in zip(names, shapes)}
    return lambda: session.run(None, inputs)


def rounds(runs: "list[Callable[[], object]]", seconds: float) -> "list[float]":
    """Milliseconds of runs that take turns, of two passes each: the second is timed."""
    found: list[list[float]] = []
    deadline = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < deadline or len(found) < 5:
        times = []
        for run in runs:
            run()
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        found.append(times)
    return [statistics.median(each) for each in zip(*found)]


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="file to write")
    parser.add_argument("--threads", type=int, default=cores())
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, got {arguments.threads}")
    form = json.loads((FOLDER / "profile.json").read_text())
    seconds, target, threads = form.pop("seconds"), form["target"], arguments.threads
    target["threads"], target["machine"] = threads, processor()
    target["version"] = onnxruntime.__version__
    shape = [target["batch"], target["channels"], *target["size"]]
    networks = form["networks"]
    try:
        runs = [runner(FOLDER / net.pop("file"), [shape], threads) for net in networks]
    except Exception as error:
        version = onnxruntime.__version__
        raise SystemExit(
            f"networks: expected an onnxruntime that runs them, got {version}, which says "
            f"'{str(error)[:160]}'; install a newer one"
        ) from error
    for network, time_ in zip(networks, rounds(runs, seconds["network"])):
        network["ms"] = time_
    print(f"{len(networks)} networks: {networks[0]['ms']:.2f} ms the first")
    refused = 0
    for operator in form["operators"]:
        file = operator.pop("file", None)
        if file is None:
            continue
        try:
            run = runner(FOLDER / file, operator["reads"], threads)
            operator["ms"] = rounds([run], seconds["operator"])[0]
        except Exception as error:  # onnxruntime has a class for each of its codes
            refused += 1
            print(f"{file}: left out, as this onnxruntime refuses it: {str(error)[:160]}")
    Path(arguments.table).write_text(json.dumps(form) + "\n")
    print(f"{len(form['operators']) - refused} operators; {arguments.table}")


if __name__ == "__main__":
    main()
