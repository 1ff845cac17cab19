"""How well the table of operators predicts latencies, on networks that it was not fitted to.

    python bench/latency_prediction.py METHOD [--networks 40] [--seconds 1] [--json FILE]
        -- SEARCH FLAGS

The table is that of a search with these flags: 16 networks and the operators of these and of 150
more. Then other random networks are built and timed as they are deployed (`--latency-backend` and
the like are flags of the search). They take turns with the table's references, and their latencies
are what a search would record, by the pace of these.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is measured

import harness  # noqa: E402
from rich.console import Console  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import nasfast  # noqa: E402, F401  before torch: OpenMP's waiting threads then yield the cores
from nasfast.latency.profile import operators_on  # noqa: E402
from nasfast.latency.timing import deployed, rounds, threads  # noqa: E402
from nasfast.methods import registry  # noqa: E402
from nasfast.searches.sampling import SamplingSearch  # noqa: E402
from nasfast.utils.interrupt import Interrupt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method")
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each network")
    parser.add_argument("--json", type=Path)
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    method = registry.method_named(args.method)
    needed = ["--objective", "score", "latency:1"]  # any strategy takes it, and nothing is searched
    config = method.parse_search([args.method, *argv[at + 1 :], *needed])
    with Interrupt() as interrupt, tempfile.TemporaryDirectory() as folder:
        search, _ = method.build(config, interrupt, Console(stderr=True))
        search.close()
        assert isinstance(search, SamplingSearch)
        assert search.phase.costing is not None
        latencies = search.phase.costing.latencies
        assert latencies is not None
        rng = random.Random(1)  # the table's are those of 0
        models = [latencies.draw(rng) for _ in range(args.networks)]
        with threads(latencies.target.threads):
            runs = [deployed(model, latencies.target) for model in models]
            latencies.prepare(Path(folder) / "latency", print)
            turns = rounds([*latencies.references(), *runs], args.seconds)
    half = len(turns) // 2
    parts = turns, turns[:half], turns[half:]
    whole, first, second = map(latencies.comparable, parts)
    pace = [
        statistics.median(turn[i] for turn in turns) / latencies.profile.networks[i][1]
        for i in range(len(latencies.references()))
    ]
    table = latencies.profile.table
    predicted = [table.predict(operators_on(latencies.target, model)) for model in models]
    errors = [abs(p / m - 1) for p, m in zip(predicted, whole, strict=True)]
    found = {
        "machine": harness.machine_line(),
        "target": str(latencies.target),
        "table": str(latencies.profile),
        "networks": len(models),
        "rounds": len(turns),
        "references now, in parts of their latencies in the table": pace,
        "latencies, ms": [round(min(whole), 2), round(max(whole), 2)],
        "Spearman": spearmanr(predicted, whole).statistic,
        "median error": statistics.median(errors),
        "largest error": max(errors),
        "Spearman of the first and the second half of the rounds": spearmanr(
            first, second
        ).statistic,
        "multiply-adds, Spearman": spearmanr(
            [sum(o.macs * n for o, n in operators_on(latencies.target, m).items()) for m in models],
            whole,
        ).statistic,
    }
    harness.write_result(found, args.json)


if __name__ == "__main__":
    main()
