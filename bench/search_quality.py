"""How soon each strategy finds good architectures, on recorded evaluations: minutes, not days.

    python bench/search_quality.py record METHOD TABLE [--count 120] [--again 10x3] -- SEARCH FLAGS
    python bench/search_quality.py add TABLE RUN [RUN ..]
    python bench/search_quality.py fit TABLE
    python bench/search_quality.py replay TABLE [--strategies predictor evolution ppo random]
        [--evaluations 100] [--replays 200] [--batch 4] [--prior none] [--front] [--json FILE]
    python bench/search_quality.py fronts RUN [RUN ..] --against RUN [RUN ..]

`record` evaluates uniform draws of a space into a table, stage 0 alone, and `add` puts in what runs
evaluated. `fit` says how well a surrogate that is fitted to the table predicts evaluations of
architectures that it has not seen. `replay` searches the surrogate, whose rewards have the noise of
the recorded ones. What it prints are figures of the surrogate: they compare strategies, and say
nothing of a data set. On a table of the generated data the predictor goes without the prior that it
has from that table. The surrogate is of another kind than the model of the strategy `predictor`:
trees and support vectors. Both describe an architecture by `Space.features`. With `--front` the
strategies look for a front of reward and multiply-adds, and what counts is its hypervolume.
`fronts` compares searches that were run, with one objective beside the score, by the hypervolumes
of their candidates, seed by seed; those that they are compared with are usually random.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is measured

import harness  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from scipy.stats import t as student  # noqa: E402
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
from nasfast.strategies import (  # noqa: E402
    STRATEGIES,
    PPOConfig,
    PredictorConfig,
    Strategy,
    make_strategy,
)
from nasfast.training.loop import Runtime  # noqa: E402
from nasfast.utils.pareto import hypervolume  # noqa: E402
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
        f"--again {first}x{times} -- {' '.join(_without_folders(argv))}",
        "machine": harness.machine_line(),
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


def _without_folders(argv: Sequence[str]) -> list[str]:
    return [Path(word).name if word.startswith("/") else word for word in argv]


def add(path: Path, runs: Sequence[Path]) -> None:
    """Put what searches evaluated into the table of their space and data."""
    table = json.loads(path.read_text())
    space = SPACES[table["space"]]
    rows = {(row["seed"], row["index"], tuple(row["choices"])): row for row in table["rows"]}
    for run in runs:
        study = _opened(run)
        uniform = study.config["strategy"] == "random"
        for found in study.records:
            if found.duplicate_of is None:
                choices = space.encode(space.from_json(found.genotype))
                row = _row(choices, study.config["seed"], found.index, found.evaluation, uniform)
                rows.setdefault((row["seed"], row["index"], choices), row)
    table["rows"] = list(rows.values())
    _write(path, table)


@dataclass(frozen=True)
class Surrogate:
    """An ensemble that stands in for the evaluation of an architecture."""

    space: Space[Any]
    vectorizer: DictVectorizer
    models: list[Any]
    macs: Any
    """A model of the logarithm of multiply-adds."""
    noise: float
    """Standard deviation of rewards of one architecture with different seeds."""

    @classmethod
    def fit(cls, space: Space[Any], rows: Sequence[Mapping[str, Any]]) -> Surrogate:
        """From rows of a table."""
        vectorizer = DictVectorizer(sparse=False)
        genotypes = [space.decode(row["choices"]) for row in rows]
        x = vectorizer.fit_transform([space.features(genotype) for genotype in genotypes])
        models = [
            ExtraTreesRegressor(200, min_samples_leaf=2, max_features=0.4, random_state=0),
            _boosted_trees(),
            make_pipeline(StandardScaler(), SVR(C=0.1, epsilon=0.005)),
        ]
        rewards = centred(rows)
        for model in models:
            model.fit(x, rewards)
        macs = _boosted_trees().fit(x, np.log([row["macs"] for row in rows]))
        return cls(space, vectorizer, models, macs, noise_of(space, rows))

    def describe(self, genotypes: Sequence[Any]) -> np.ndarray:
        return self.vectorizer.transform([self.space.features(genotype) for genotype in genotypes])

    def rewards(self, genotypes: Sequence[Any]) -> np.ndarray:
        """Expected rewards, without noise."""
        x = self.describe(genotypes)
        return np.mean([model.predict(x) for model in self.models], axis=0)

    def costs(self, genotypes: Sequence[Any]) -> np.ndarray:
        """Expected multiply-adds."""
        return np.exp(self.macs.predict(self.describe(genotypes)))


def _boosted_trees() -> GradientBoostingRegressor:
    return GradientBoostingRegressor(
        n_estimators=200, learning_rate=0.05, subsample=0.7, max_features=0.3, random_state=0
    )


def noise_of(space: Space[Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Pooled standard deviation of the rewards of an architecture in one search; 0 where none was
    evaluated twice."""
    groups: dict[Any, list[float]] = {}
    for row in rows:
        key = row["seed"], space.decode(row["choices"]).canonical()
        groups.setdefault(key, []).append(row["reward"])
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return 0.0
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
    return math.sqrt(squares / sum(len(group) - 1 for group in several))


def centred(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Rewards; those of uniform draws have the same median in every search, whose data are split
    by its seed, and none is far below it."""
    rewards = np.array([row["reward"] for row in rows])
    seeds = np.array([row["seed"] for row in rows])
    uniform = np.array([row["uniform"] for row in rows])
    middle = np.median(rewards[uniform & (seeds == seeds[0])])
    for seed in set(seeds.tolist()):
        rewards[seeds == seed] += middle - np.median(rewards[uniform & (seeds == seed)])
    spread = 1.4826 * np.median(np.abs(rewards[uniform] - middle))
    return np.maximum(rewards, middle - 3 * spread)


def fit(path: Path, folds: int = 5, repeats: int = 5) -> dict[str, float]:
    """Rank correlation of predictions with evaluations of architectures that were held out."""
    space, rows = read(path)
    rewards = centred(rows)
    names = [repr(space.decode(row["choices"]).canonical()) for row in rows]
    found, costs = [], []
    for repeat in range(repeats):
        different = sorted(set(names))
        random.Random(repeat).shuffle(different)
        fold = {name: i % folds for i, name in enumerate(different)}
        predicted, macs = np.zeros(len(rows)), np.zeros(len(rows))
        for held in range(folds):
            test = [i for i, name in enumerate(names) if fold[name] == held]
            surrogate = Surrogate.fit(
                space, [row for row, name in zip(rows, names) if fold[name] != held]
            )
            genotypes = [space.decode(rows[i]["choices"]) for i in test]
            predicted[test], macs[test] = surrogate.rewards(genotypes), surrogate.costs(genotypes)
        found.append(spearmanr(predicted, rewards).statistic)
        costs.append(spearmanr(macs, [row["macs"] for row in rows]).statistic)
    noise = noise_of(space, rows)
    return {
        "evaluations": len(rows),
        "architectures": len(set(names)),
        "standard deviation of the rewards": float(np.std(rewards)),
        "standard deviation of the noise": noise,
        "correlation that the noise leaves": math.sqrt(max(0.0, 1 - noise**2 / np.var(rewards))),
        "Spearman": statistics.fmean(found),
        "Spearman, least of the splits": min(found),
        "Spearman, most of the splits": max(found),
        "Spearman of the multiply-adds": statistics.fmean(costs),
    }


@dataclass
class Replay:
    """A search of the surrogate."""

    strategy: Strategy[Any]
    rng: np.random.Generator
    seen: dict[Any, float] = dataclasses.field(default_factory=dict)
    """Observed rewards, by architecture."""
    true: list[float] = dataclasses.field(default_factory=list)
    """Rewards without noise, in the order of the evaluations."""
    macs: list[float] = dataclasses.field(default_factory=list)

    def ask(self, space: Space[Any]) -> Any:
        """As a search does: what is no network is rejected."""
        while not space.valid(genotype := self.strategy.ask()):
            self.strategy.reject(genotype)
        return genotype

    def tell(self, genotype: Any, true: float, macs: float, noise: float) -> None:
        """Duplicates repeat what was observed, and do not count."""
        name = genotype.canonical()
        if name not in self.seen:
            self.seen[name] = true + noise * self.rng.standard_normal()
            self.true.append(true)
            self.macs.append(macs)
        self.strategy.tell(genotype, self.seen[name])

    def curves(self, evaluations: int) -> tuple[np.ndarray, ...]:
        """After each evaluation: the best true reward, that of the architecture which was observed
        to be best, and multiply-adds and true reward of the one evaluated."""
        true, observed = np.array(self.true), np.array(list(self.seen.values()))
        leads = np.maximum.accumulate(observed) == observed
        at = np.maximum.accumulate(np.where(leads, np.arange(len(true)), 0))
        best = np.maximum.accumulate(true)
        curves = best, true[at], np.array(self.macs), true
        return tuple(curve[:evaluations] for curve in curves)


def play(
    surrogate: Surrogate,
    make: Callable[[int], Strategy[Any]],
    seeds: Sequence[int],
    evaluations: int,
    batch: int,
) -> list[tuple[np.ndarray, ...]]:
    """Curves of replays, all of them in step: the surrogate is asked for many at once."""
    replays = [Replay(make(seed), np.random.default_rng(seed)) for seed in seeds]
    for _ in range(100 * evaluations):
        running = [replay for replay in replays if len(replay.true) < evaluations]
        if not running:
            break
        asked = [(each, [each.ask(surrogate.space) for _ in range(batch)]) for each in running]
        genotypes = [genotype for _, proposed in asked for genotype in proposed]
        found = zip(surrogate.rewards(genotypes).tolist(), surrogate.costs(genotypes).tolist())
        for each, proposed in asked:
            for genotype in proposed:
                each.tell(genotype, *next(found), surrogate.noise)
    return [replay.curves(evaluations) for replay in replays]


def replay(
    path: Path,
    names: Sequence[str],
    evaluations: int,
    count: int,
    batch: int,
    settings: SamplingSettings,
) -> dict[str, Any]:
    """How soon each strategy reaches the best that random search has after all evaluations."""
    surrogate = Surrogate.fit(*read(path))
    best, taken, macs = {}, {}, {}
    for name, curves in _played(surrogate, names, settings, count, evaluations, batch):
        best[name], taken[name], macs[name], _ = map(np.array, zip(*curves))
    goal = float(np.median(best["random"][:, -1]))
    after = [n for n in (12, 24, 50, 100, 200) if n <= evaluations]
    strategies = {}
    for name, curve in best.items():
        reached = (curve >= goal).any(1)
        first = np.where(reached, (curve >= goal).argmax(1) + 1, evaluations + 1)
        strategies[name] = {
            "evaluations to the goal": {
                "median": float(np.median(first)),
                "quartiles": np.percentile(first, [25, 75]).tolist(),
                "reached": int(reached.sum()),
            },
            "best true reward after": {
                n: _lead(curve[:, n - 1], best["random"][:, n - 1]) for n in after
            },
            "true reward of the best observed after": {
                n: _lead(taken[name][:, n - 1], taken["random"][:, n - 1]) for n in after
            },
            "mean multiply-adds": float(macs[name].mean()),
        }
    return {"goal": goal, "replays": count, "batch": batch, "strategies": strategies}


def _lead(values: np.ndarray, random: np.ndarray) -> dict[str, Any]:
    """Mean, and by how much it is above that of random search, with a 95 % interval."""
    leads = values - random
    half = 1.96 * leads.std(ddof=1) / math.sqrt(len(leads))
    interval = [round(float(leads.mean() + sign * half), 5) for sign in (-1, 1)]
    return {"mean": round(float(values.mean()), 5), "lead": interval}


@dataclass(frozen=True)
class Span:
    """Rewards, and logarithms of a cost, that volumes are parts of."""

    best: float
    worst: float
    smallest: float
    largest: float

    def volume(self, rewards: np.ndarray, sizes: np.ndarray) -> float:
        """Hypervolume of points, from 0 to 1."""
        x = (self.best - rewards) / (self.best - self.worst)
        y = (sizes - self.smallest) / (self.largest - self.smallest)
        return hypervolume(list(zip(x.tolist(), y.tolist())), (1.0, 1.0))


def replay_fronts(
    path: Path,
    names: Sequence[str],
    evaluations: int,
    count: int,
    batch: int,
    settings: SamplingSettings,
) -> dict[str, Any]:
    """Hypervolume of the front of true rewards and multiply-adds, beside that of random search.

    Both are in parts of what uniform draws span: from the lower quartile of the rewards to the
    best, and from the fewest multiply-adds to the upper quartile, on a logarithmic scale.
    """
    surrogate = Surrogate.fit(*read(path))
    rng = random.Random(0)
    some = [surrogate.space.sample(rng) for _ in range(2000)]
    reward, size = surrogate.rewards(some), np.log2(surrogate.costs(some))
    span = Span(reward.max(), np.percentile(reward, 25), size.min(), np.percentile(size, 75))
    after = [n for n in (12, 24, 40, 100) if n <= evaluations]
    found: dict[str, np.ndarray] = {}
    for name, curves in _played(surrogate, names, settings, count, evaluations, batch, True):
        found[name] = np.array(
            [
                [span.volume(true[:n], np.log2(macs[:n])) for n in after]
                for _, _, macs, true in curves
            ]
        )
    strategies = {
        name: {n: _lead(v[:, i], found["random"][:, i]) for i, n in enumerate(after)}
        for name, v in found.items()
    }
    return {"replays": count, "batch": batch, "hypervolume after": strategies}


def fronts(runs: Sequence[Path], against: Sequence[Path]) -> dict[str, Any]:
    """Hypervolumes of searches beside those of others of the same seeds, in units as those of
    `replay_fronts`: of the candidates of the others. Rewards are of stage 0, which all have."""
    ours, theirs = ({s.config["seed"]: s for s in map(_opened, each)} for each in (runs, against))
    if len(ours.keys() & theirs.keys()) < 2:
        raise SystemExit(
            f"fronts: expected runs of two seeds or more on both sides, got {sorted(ours)} and "
            f"{sorted(theirs)}"
        )
    (cost,) = next(iter(ours.values())).objectives.costs
    points = {
        name: {seed: _points(study, cost) for seed, study in studies.items()}
        for name, studies in (("ours", ours), ("theirs", theirs))
    }
    baseline = np.concatenate(list(points["theirs"].values()))
    everything = np.concatenate([p for each in points.values() for p in each.values()])
    span = Span(
        everything[:, 0].max(),
        np.percentile(baseline[:, 0], 25),
        everything[:, 1].min(),
        np.percentile(baseline[:, 1], 75),
    )
    pairs = {
        seed: tuple(span.volume(*points[name][seed].T) for name in ("ours", "theirs"))
        for seed in sorted(ours.keys() & theirs.keys())
    }
    leads = np.array([a - b for a, b in pairs.values()])
    half = student.ppf(0.975, len(leads) - 1) * leads.std(ddof=1) / math.sqrt(len(leads))
    return {
        "cost": cost,
        "hypervolumes by seed": pairs,
        "mean of the others": float(np.mean([b for _, b in pairs.values()])),
        "lead": float(leads.mean()),
        "95 % interval of the lead": [float(leads.mean() - half), float(leads.mean() + half)],
    }


def _opened(run: Path) -> Study:
    return Study.open(run, read_only=True)


def _points(study: Study, cost: str) -> np.ndarray:
    """Reward of stage 0 and logarithm of a cost of each candidate, ``[N, 2]``."""
    found = [r.evaluation for r in study.records if r.duplicate_of is None]
    return np.array(
        [(e.rewards["stage0"], math.log2(e.costs[cost])) for e in found if "stage0" in e.rewards]
    )


def _played(
    surrogate: Surrogate,
    names: Sequence[str],
    settings: SamplingSettings,
    count: int,
    evaluations: int,
    batch: int,
    front: bool = False,
) -> Iterator[tuple[str, list[tuple[np.ndarray, ...]]]]:
    """Curves of random search and of each strategy; says how long they took."""
    for name in dict.fromkeys(["random", *names]):
        start = time.perf_counter()
        seeds = range(count)
        yield name, _in_parallel(surrogate, name, settings, seeds, evaluations, batch, front)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def _in_parallel(
    surrogate: Surrogate,
    name: str,
    settings: SamplingSettings,
    seeds: Sequence[int],
    evaluations: int,
    batch: int,
    front: bool = False,
) -> list[tuple[np.ndarray, ...]]:
    workers = len(os.sched_getaffinity(0))
    shares = [seeds[i::workers] for i in range(workers)]
    part = functools.partial(_part, surrogate, name, settings, evaluations, batch, front)
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(part, shares))
    curves = {seed: curve for share, part in zip(shares, parts) for seed, curve in zip(share, part)}
    return [curves[seed] for seed in seeds]


def _part(
    surrogate: Surrogate,
    name: str,
    settings: SamplingSettings,
    evaluations: int,
    batch: int,
    front: bool,
    seeds: Sequence[int],
) -> list[tuple[np.ndarray, ...]]:
    torch.set_num_threads(1)

    @functools.cache
    def goals(genotype: Any) -> tuple[float, ...]:
        return (float(np.log2(surrogate.costs([genotype])[0])),)

    def make(seed: int) -> Strategy[Any]:
        return make_strategy(name, surrogate.space, seed, settings, goals if front else None)

    return play(surrogate, make, seeds, evaluations, batch)


def read(path: Path) -> tuple[Space[Any], list[dict[str, Any]]]:
    """Space and evaluations of a table, without the failed ones."""
    table = json.loads(path.read_text())
    return SPACES[table["space"]], [row for row in table["rows"] if row["reward"] is not None]


def _row(
    choices: Sequence[int], seed: int, index: int, evaluation: Evaluation, uniform: bool = True
) -> dict[str, Any]:
    reward = evaluation.rewards.get("stage0")
    return {
        "choices": list(choices),
        "seed": seed,
        "index": index,
        "uniform": uniform,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = {name: commands.add_parser(name) for name in ("record", "add", "fit", "replay")}
    sub["record"].add_argument("method")
    for each in sub.values():
        each.add_argument("table", type=Path)
    of_runs = commands.add_parser("fronts")
    of_runs.add_argument("runs", type=Path, nargs="+")
    of_runs.add_argument("--against", type=Path, nargs="+", required=True)
    sub["record"].add_argument("--count", type=int, default=120)
    sub["record"].add_argument("--again", default="10x3")
    sub["add"].add_argument("runs", type=Path, nargs="+")
    sub["replay"].add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    sub["replay"].add_argument("--evaluations", type=int, default=100)
    sub["replay"].add_argument("--replays", type=int, default=200)
    sub["replay"].add_argument("--batch", type=int, default=4)
    sub["replay"].add_argument("--prior", choices=("auto", "none"), default="auto")
    sub["replay"].add_argument("--front", action="store_true")
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
        case "fronts":
            print(json.dumps(fronts(args.runs, args.against), indent=1))
        case "replay":
            generated = json.loads(args.table.read_text())["data"] == "synthetic"
            predictor = PredictorConfig(prior="none" if generated else args.prior)
            settings = SamplingSettings(ppo=PPOConfig.short_budget(), predictor=predictor)
            names = [n for n in args.strategies if not (args.front and n == "ppo")]
            play_all = replay_fronts if args.front else replay
            found = play_all(
                args.table, names, args.evaluations, args.replays, args.batch, settings
            )
            head = {"table": args.table.name, "surrogate": True, "prior": predictor.prior}
            harness.write_result({**head, **found}, args.json)


if __name__ == "__main__":
    main()
