"""How soon each strategy finds good architectures, on recorded evaluations: seconds, not days.

python bench/search_quality.py record METHOD TABLE [--count 120] [--again 10x3] -- SEARCH FLAGS
python bench/search_quality.py add TABLE RUN [RUN ..]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is measured

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingRegressor  # noqa: E402
from sklearn.feature_extraction import DictVectorizer  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.svm import SVR  # noqa: E402

import nasfast  # noqa: E402, F401  before torch: OpenMP's waiting threads then yield the cores
from nasfast.methods import registry  # noqa: E402
from nasfast.methods.features import start_workers  # noqa: E402
from nasfast.methods.segmentation.search import Inputs, evaluator_on, make_evaluator  # noqa: E402
from nasfast.runs.records import Evaluation  # noqa: E402
from nasfast.runs.study import Study  # noqa: E402
from nasfast.searches.sampling import SamplingSettings  # noqa: E402
from nasfast.spaces.base import Space  # noqa: E402
from nasfast.spaces.fast_nas import FastNASSpace  # noqa: E402
from nasfast.spaces.template_nas import TemplateNASSpace  # noqa: E402
from nasfast.strategies import STRATEGIES, PPOConfig, Strategy, make_strategy  # noqa: E402
from nasfast.training.loop import Runtime  # noqa: E402
from nasfast.workers import Job  # noqa: E402

SPACES: dict[str, Space[Any]] = {
    space.name: space for space in (FastNASSpace(), TemplateNASSpace())
}


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
    space = SPACES[table["space"]]
    done = {(row["seed"], row["index"]) for row in table["rows"]}
    for run in runs:
        study = Study.open(run)
        seed = study.config.get("seed", 0)
        for found in study.records:
            if found.duplicate_of is None and (seed, found.index) not in done:
                choices = space.encode(space.from_json(found.genotype))
                table["rows"].append(_row(choices, seed, found.index, found.evaluation))
    _write(path, table)


@dataclass(frozen=True)
class Surrogate:
    """An ensemble that stands in for the evaluation of an architecture."""

    space: Space[Any]
    vectorizer: DictVectorizer
    models: list[Any]
    noise: float
    """Standard deviation of rewards of one architecture with different seeds."""

    @classmethod
    def fit(cls, space: Space[Any], rows: Sequence[Mapping[str, Any]]) -> Surrogate:
        """From rows of a table; rewards of each seed of the search are centred, as its data are
        split in another way."""
        rewards = _centred(rows)
        vectorizer = DictVectorizer(sparse=False)
        genotypes = [space.decode(row["choices"]) for row in rows]
        x = vectorizer.fit_transform([space.features(genotype) for genotype in genotypes])
        models = [
            ExtraTreesRegressor(200, min_samples_leaf=2, max_features=0.4, random_state=0),
            GradientBoostingRegressor(
                n_estimators=200,
                learning_rate=0.05,
                subsample=0.7,
                max_features=0.3,
                random_state=0,
            ),
            make_pipeline(StandardScaler(), SVR(C=0.1, epsilon=0.005)),
        ]
        for model in models:
            model.fit(x, rewards)
        return cls(space, vectorizer, models, noise_of(space, rows))

    def rewards(self, genotypes: Sequence[Any]) -> np.ndarray:
        """Expected rewards, without noise."""
        x = self.vectorizer.transform([self.space.features(genotype) for genotype in genotypes])
        return np.mean([model.predict(x) for model in self.models], axis=0)


def noise_of(space: Space[Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Pooled standard deviation of the rewards of an architecture in one search."""
    groups: dict[Any, list[float]] = {}
    for row in rows:
        key = row["seed"], space.decode(row["choices"]).canonical()
        groups.setdefault(key, []).append(row["reward"])
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return 0.0
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
    return math.sqrt(squares / sum(len(group) - 1 for group in several))


def _centred(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Rewards, of each search moved to the median of the first, and none far below it."""
    rewards = np.array([row["reward"] for row in rows])
    seeds = np.array([row["seed"] for row in rows])
    middle = np.median(rewards[seeds == seeds[0]])
    for seed in set(seeds.tolist()):
        rewards[seeds == seed] += middle - np.median(rewards[seeds == seed])
    spread = 1.4826 * np.median(np.abs(rewards - middle))
    return np.maximum(rewards, middle - 3 * spread)


def fit(path: Path, folds: int = 5, repeats: int = 5) -> dict[str, float]:
    """Rank correlation of predictions with evaluations of architectures that were held out."""
    _, space, rows = _read(path)
    rewards = _centred(rows)
    names = [repr(space.decode(row["choices"]).canonical()) for row in rows]
    found = []
    for repeat in range(repeats):
        different = sorted(set(names))
        random.Random(repeat).shuffle(different)
        fold = {name: i % folds for i, name in enumerate(different)}
        predicted = np.zeros(len(rows))
        for held in range(folds):
            test = [i for i, name in enumerate(names) if fold[name] == held]
            train = [row for row, name in zip(rows, names) if fold[name] != held]
            genotypes = [space.decode(rows[i]["choices"]) for i in test]
            predicted[test] = Surrogate.fit(space, train).rewards(genotypes)
        found.append(spearmanr(predicted, rewards).statistic)
    noise = noise_of(space, rows)
    return {
        "evaluations": len(rows),
        "architectures": len(set(names)),
        "standard deviation of rewards": float(np.std(rewards)),
        "noise": noise,
        "ceiling": math.sqrt(max(0.0, 1 - noise**2 / np.var(rewards))),
        "spearman": statistics.fmean(found),
        "least": min(found),
        "most": max(found),
    }


@dataclass
class Replay:
    """A search of the surrogate."""

    strategy: Strategy[Any]
    rng: np.random.Generator
    seen: dict[Any, float] = dataclasses.field(default_factory=dict)
    best: float = -math.inf
    """Reward of the best so far, as it was observed."""
    curve: list[float] = dataclasses.field(default_factory=list)
    """Without noise, what the best observed one is worth, after each evaluation."""


def play(
    surrogate: Surrogate,
    make: Callable[[int], Strategy[Any]],
    seeds: Sequence[int],
    evaluations: int,
    batch: int,
) -> list[list[float]]:
    """Curves of replays, all of them in step: the surrogate is asked for many at once."""
    replays = [Replay(make(seed), np.random.default_rng(seed)) for seed in seeds]
    for _ in range(100 * evaluations):
        running = [replay for replay in replays if len(replay.curve) < evaluations]
        if not running:
            break
        asked = [
            (replay, [_valid(surrogate.space, replay) for _ in range(batch)]) for replay in running
        ]
        worth = iter(surrogate.rewards([g for _, genotypes in asked for g in genotypes]).tolist())
        for replay, genotypes in asked:
            for genotype in genotypes:
                value, name = next(worth), genotype.canonical()
                if name not in replay.seen:
                    replay.seen[name] = value + surrogate.noise * replay.rng.standard_normal()
                    if replay.seen[name] > replay.best:
                        replay.best, top = replay.seen[name], value
                    else:
                        top = replay.curve[-1]
                    replay.curve.append(top)
                replay.strategy.tell(genotype, replay.seen[name])
    return [replay.curve[:evaluations] for replay in replays]


def _valid(space: Space[Any], replay: Replay) -> Any:
    while not space.valid(genotype := replay.strategy.ask()):
        replay.strategy.reject(genotype)
    return genotype


def replay(
    path: Path,
    names: Sequence[str],
    evaluations: int,
    count: int,
    batch: int,
    settings: SamplingSettings,
) -> dict[str, Any]:
    """How soon each strategy reaches what random search has after all evaluations."""
    _, space, rows = _read(path)
    surrogate = Surrogate.fit(space, rows)
    curves = {}
    for name in dict.fromkeys(["random", *names]):
        start = time.perf_counter()
        curves[name] = np.array(
            _in_parallel(surrogate, name, settings, range(count), evaluations, batch)
        )
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    goal = float(np.median(curves["random"][:, -1]))
    result: dict[str, Any] = {"goal": goal, "replays": count, "batch": batch, "strategies": {}}
    for name, curve in curves.items():
        first = [
            int(np.argmax(row >= goal)) + 1 if (row >= goal).any() else evaluations + 1
            for row in curve
        ]
        lead = curve - curves["random"]
        result["strategies"][name] = {
            "evaluations to the goal": statistics.median(first),
            "quartiles": [float(q) for q in np.percentile(first, [25, 75])],
            "after": {
                n: {
                    "mean": float(curve[:, n - 1].mean()),
                    "lead": float(lead[:, n - 1].mean()),
                    "interval": _interval(lead[:, n - 1]),
                }
                for n in (12, 24, 50, 100, 200)
                if n <= evaluations
            },
        }
    return result


def _interval(leads: np.ndarray) -> list[float]:
    """95 % of the mean of pairs."""
    half = 1.96 * leads.std(ddof=1) / math.sqrt(len(leads))
    return [float(leads.mean() - half), float(leads.mean() + half)]


def _in_parallel(
    surrogate: Surrogate,
    name: str,
    settings: SamplingSettings,
    seeds: Sequence[int],
    evaluations: int,
    batch: int,
) -> list[list[float]]:
    workers = os.cpu_count() or 1
    shares = [seeds[i::workers] for i in range(workers)]
    part = functools.partial(_part, surrogate, name, settings, evaluations, batch)
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(part, shares))
    curves = dict(zip([seed for share in shares for seed in share], [c for p in parts for c in p]))
    return [curves[seed] for seed in seeds]


def _part(
    surrogate: Surrogate,
    name: str,
    settings: SamplingSettings,
    evaluations: int,
    batch: int,
    seeds: Sequence[int],
) -> list[list[float]]:
    torch.set_num_threads(1)
    space = surrogate.space

    def make(seed: int) -> Strategy[Any]:
        return make_strategy(name, space, seed, settings)

    return play(surrogate, make, seeds, evaluations, batch)


def _read(path: Path) -> tuple[dict[str, Any], Space[Any], list[dict[str, Any]]]:
    table = json.loads(path.read_text())
    rows = [row for row in table["rows"] if row["reward"] is not None]
    return table, SPACES[table["space"]], rows


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = {name: commands.add_parser(name) for name in ("record", "add", "fit", "replay")}
    sub["record"].add_argument("method")
    for each in sub.values():
        each.add_argument("table", type=Path)
    sub["record"].add_argument("--count", type=int, default=120)
    sub["record"].add_argument("--again", default="10x3")
    sub["add"].add_argument("runs", type=Path, nargs="+")
    sub["replay"].add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    sub["replay"].add_argument("--evaluations", type=int, default=100)
    sub["replay"].add_argument("--replays", type=int, default=200)
    sub["replay"].add_argument("--batch", type=int, default=4)
    sub["replay"].add_argument("--json", type=Path)
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    match args.command:
        case "record":
            first, times = map(int, args.again.split("x"))
            record(args.method, args.table, args.count, (first, times), argv[at + 1 :])
        case "add":
            add(args.table, args.runs)
        case "fit":
            print(json.dumps(fit(args.table), indent=1))
        case "replay":
            settings = SamplingSettings(ppo=PPOConfig.short_budget())
            found = replay(
                args.table, args.strategies, args.evaluations, args.replays, args.batch, settings
            )
            text = json.dumps({"table": args.table.name, "surrogate": True, **found}, indent=1)
            print(text)
            if args.json:
                args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
