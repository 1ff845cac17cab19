"""Find an architecture: ``python -m nasfast.search``.

Without arguments it searches a small segmentation network for generated street scenes, in a
minute. ``--data DIR`` takes a CamVid folder or a folder with images/, masks/ and classes.txt.
``--resume RUN [--budget N]`` continues a run where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import tyro
from rich.console import Console

from nasfast.cache import default_directory
from nasfast.cli import flag_value, reports_errors, say
from nasfast.config import from_mapping, require_positive
from nasfast.data import Splits, load_splits, shorter_side
from nasfast.device import machine_info, resolve_device
from nasfast.encoders import load_encoder
from nasfast.evaluator import SegmentationEvaluator, Stage0Config, Stage1Config, derive_seed
from nasfast.interrupt import Interrupt, StopRequested
from nasfast.models.segmenter import DecoderConfig, load_teacher
from nasfast.records import Evaluation, Record
from nasfast.report import terminal_table, write_report
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.strategies import PPOConfig, Strategy, make_strategy
from nasfast.study import Study
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.loop import Runtime

StageConfig = TypeVar("StageConfig", Stage0Config, Stage1Config)

FEEDBACK = "stage0"
"""The stage whose reward the strategy learns from, for every candidate: all have passed it, so it
is one scale. Stage 1 only ranks."""
_MAX_FAILURES = 5
_MAX_DUPLICATES = 100


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings of a search; a preset gives the defaults."""

    method: Annotated[Literal["segmentation"], tyro.conf.Positional] = "segmentation"
    """What to search."""
    data: str = "synthetic"
    """"synthetic", a CamVid folder, or a folder with images/, masks/ and classes.txt."""
    preset: Literal["demo", "quick", "paper"] = "demo"
    """demo: a minute on a laptop (default for the synthetic set). quick: about 30 s a candidate
    on two cores (default for other data). paper: the published schedule, for a GPU."""
    budget: int = 8
    """Candidates to evaluate; repeated architectures do not count."""
    strategy: Literal["ppo", "random"] = "ppo"
    """ppo: the recurrent controller; random: uniform sampling, the baseline to beat."""
    encoder_weights: Path | None = None
    """MobileNet-v2 weights with torchvision's key names; default: the packaged small encoder."""
    teacher: Path | None = None
    """Network to distil from: a model.safetensors that nasfast.train wrote for the same classes."""
    seed: int = 0
    """Decides everything that is drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    name: str | None = None
    """Name of the run; default: that of the data."""
    runs: Path = Path("runs")
    """Directory that run directories are made in."""
    cache_dir: Path | None = None
    """Where encoder features are kept between searches; default: $NASFAST_CACHE or
    ~/.cache/nasfast."""
    val_crop: int | None = None
    """Score candidates on centre crops of this side; default: whole images of one size."""
    omit: tuple[int, ...] = ()
    """Classes left out of the reward: 0, the background, in the paper's search on PASCAL VOC."""
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    """Size of the candidates' decoders."""
    stage0: Stage0Config = dataclasses.field(default_factory=Stage0Config)
    """Training of the decoder alone."""
    stage1: Stage1Config = dataclasses.field(default_factory=Stage1Config)
    """Training end to end, after the gate."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    """The controller."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"search: wanted a budget of at least 1 candidate, got {self.budget}")
        require_positive(self.decoder, "agg_size", "sep_repeats")
        for stage in (self.stage0, self.stage1):
            require_positive(stage, "crop", "shorter_side", "batch_size", "max_grad_norm")
        require_positive(self.stage0, "samples", "epochs")


PRESETS = {
    "demo": SearchConfig(
        preset="demo",
        budget=8,
        decoder=DecoderConfig(agg_size=32),
        stage0=Stage0Config(samples=384, crop=96, shorter_side=96, epochs=3, batch_size=16),
        stage1=Stage1Config(crop=96, shorter_side=96, batch_size=16, polyak_decay=0.9),
        ppo=PPOConfig.short_budget(),
    ),
    "quick": SearchConfig(
        preset="quick",
        budget=24,
        decoder=DecoderConfig(agg_size=32),
        stage0=Stage0Config(samples=320, crop=160, shorter_side=240, epochs=4, batch_size=16),
        stage1=Stage1Config(crop=224, shorter_side=260, batch_size=16, polyak_decay=0.9),
        ppo=PPOConfig.short_budget(),
    ),
    "paper": SearchConfig(preset="paper", budget=2000, val_crop=400),
}


def parse(argv: Sequence[str]) -> SearchConfig:
    """Settings from a command line: the preset's, overridden flag by flag."""
    preset = flag_value(argv, "--preset")
    if preset not in PRESETS:  # absent, or wrong and then refused by the parser
        preset = "demo" if flag_value(argv, "--data") in (None, "synthetic") else "quick"
    config = tyro.cli(
        SearchConfig, args=argv, default=PRESETS[preset], description=__doc__, prog="nasfast.search"
    )
    paths = {
        field: getattr(config, field).expanduser().resolve()
        for field in ("encoder_weights", "teacher", "runs", "cache_dir")
        if getattr(config, field) is not None
    }
    if config.data != "synthetic":
        paths["data"] = str(Path(config.data).expanduser().resolve())
    return dataclasses.replace(config, **paths)


@dataclasses.dataclass(frozen=True)
class _Resume:
    """Continue a run."""

    resume: Path
    """Run directory."""
    budget: int | None = None
    """Candidates to evaluate in all, where it should be more than before."""
    device: str | None = None
    """Another device than before."""


def fit_to_data(config: SearchConfig, splits: Splits, console: Console) -> SearchConfig:
    """Crops that the data can fill, where candidates are scored on whole images.

    A crop larger than the images would enlarge every image in training and none in validation.

    Raises:
        ValueError: whole images of more than one size cannot be scored in batches.
    """
    if config.val_crop is not None:
        return config
    sizes = sorted({tuple(sample.mask.shape) for sample in splits.search_val})
    if len(sizes) > 1:
        raise ValueError(
            f"search: wanted images of one size to score candidates on, got {len(sizes)} sizes "
            f"from {sizes[0]} to {sizes[-1]}; give --val-crop SIDE to score centre crops"
        )
    side = min(shorter_side(splits.search_train), *sizes[0])

    def fit(stage: StageConfig) -> StageConfig:
        return dataclasses.replace(
            stage, crop=min(stage.crop, side), shorter_side=min(stage.shorter_side, side)
        )

    fitted = dataclasses.replace(config, stage0=fit(config.stage0), stage1=fit(config.stage1))
    if fitted != config:
        console.print(f"crops are at most {side} pixels, the shorter side of the images")
    return fitted


def build(
    config: SearchConfig, interrupt: Interrupt, console: Console
) -> tuple[SegmentationEvaluator, SearchConfig]:
    """Open data, encoder and teacher and fill the feature cache; the settings fit the data then."""
    runtime = Runtime(resolve_device(config.device), interrupt.check)
    splits = load_splits(config.data, seed=config.seed)
    config = fit_to_data(config, splits, console)
    task = SegmentationTask(splits, config.omit)
    encoder = load_encoder(config.encoder_weights)
    say(
        console,
        f"data     {splits.train.name}: {len(splits.search_train)} frames to train candidates, "
        f"{len(splits.search_val)} to score them, {task.num_classes} classes\n"
        f"encoder  {encoder.name} x{encoder.width:g}, "
        f"{config.encoder_weights or 'packaged weights (trained on generated scenes)'}\n"
        f"device   {runtime.device}, {torch.get_num_threads()} threads, "
        f"{runtime.precision}\n"
        f"space    {FastNASSpace().size():.2e} decoders; strategy {config.strategy}, "
        f"{config.budget} candidates",
    )
    evaluator = SegmentationEvaluator(
        task,
        encoder,
        config.decoder,
        config.stage0,
        config.stage1,
        runtime,
        seed=config.seed,
        cache_dir=config.cache_dir or default_directory(),
        val_crop=config.val_crop,
        teacher=load_teacher(config.teacher, splits.train.classes) if config.teacher else None,
    )
    console.print(f"features of the frozen encoder ready in {evaluator.seconds['encode']:.1f} s")
    return evaluator, config


def run(
    study: Study,
    space: FastNASSpace,
    strategy: Strategy[FastNASGenotype],
    evaluator: SegmentationEvaluator,
    budget: int,
    console: Console,
) -> None:
    """Ask, evaluate, record, tell, until ``budget`` candidates are evaluated.

    After a crash the strategy continues from its checkpoint; a record that the checkpoint has not
    seen is told again, not evaluated again.

    Raises:
        RuntimeError: the last candidates all failed, or all repeated earlier ones.
    """
    checkpoint = study.load_checkpoint()
    told, encode, controller = 0, evaluator.seconds["encode"], 0.0
    if checkpoint is not None:
        told, controller = checkpoint["told"], checkpoint["seconds"]["controller"]
        encode += checkpoint["seconds"]["encode"]
        strategy.load_state_dict(checkpoint["strategy"])
    first = {_key(r.canonical): r for r in reversed(study.records) if r.duplicate_of is None}
    while told < len(study.records) or _evaluated(study) < budget:
        start = time.perf_counter()
        genotype = strategy.ask()
        controller += time.perf_counter() - start
        if told < len(study.records):
            record = study.records[told]
            if space.from_json(record.genotype) != genotype:
                raise RuntimeError(
                    f"{study.path}: record {told} is not what the strategy asked for; the records "
                    "or the checkpoint were edited, start a new run"
                )
        else:
            canonical = genotype.canonical().to_json()
            earlier = first.get(_key(canonical))
            if earlier:
                evaluation = earlier.evaluation
            else:
                with console.status(f"training candidate {_evaluated(study) + 1} of {budget}"):
                    evaluation = evaluator(genotype, told, _gate(study))
            record = Record(
                index=told,
                genotype=genotype.to_json(),
                canonical=canonical,
                seed=derive_seed(evaluator.seed, told),
                evaluation=evaluation,
                duplicate_of=earlier.index if earlier else None,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            study.append(record)
            first.setdefault(_key(canonical), record)
            _print_record(study, record, budget, console)
        start = time.perf_counter()
        strategy.tell(genotype, record.evaluation.rewards.get(FEEDBACK))
        controller += time.perf_counter() - start
        told += 1
        study.save_checkpoint(
            {
                "told": told,
                "strategy": strategy.state_dict(),
                "seconds": {"encode": encode, "controller": controller},
                "budget": budget,
            }
        )
        _check_progress(study)


def _key(canonical: dict[str, object]) -> str:
    return repr(sorted(canonical.items()))


def _fresh(study: Study) -> list[Evaluation]:
    return [r.evaluation for r in study.records if r.duplicate_of is None]


def _evaluated(study: Study) -> int:
    return len(_fresh(study))


def _gate(study: Study) -> float | None:
    """Running mean of the stage-0 rewards so far (section 3.3: a candidate must beat it)."""
    rewards = [e.rewards[FEEDBACK] for e in _fresh(study) if FEEDBACK in e.rewards]
    return statistics.fmean(rewards) if rewards else None


def _check_progress(study: Study) -> None:
    failures = [e.failure for e in _fresh(study)[-_MAX_FAILURES:]]
    if len(failures) == _MAX_FAILURES and all(failures):
        raise RuntimeError(
            f"the last {_MAX_FAILURES} candidates failed, the last one: {failures[-1]}; make "
            "--stage0.batch-size, --stage1.batch-size or the crops smaller, or lower the "
            "learning rates"
        )
    if all(r.duplicate_of is not None for r in study.records[-_MAX_DUPLICATES:]):
        raise RuntimeError(
            f"the last {_MAX_DUPLICATES} architectures repeat earlier ones: the controller has "
            "converged; raise --ppo.ent-coef or take the best one found"
        )


def _print_record(study: Study, record: Record, budget: int, console: Console) -> None:
    evaluation = record.evaluation
    place = f"[{_evaluated(study):>{len(str(budget))}}/{budget}]"
    if record.duplicate_of is not None:
        say(console, f"{place} repeats architecture {record.duplicate_of}")
        return
    rewards = "  ".join(f"{stage} {reward:.4f}" for stage, reward in evaluation.rewards.items())
    outcome = f"failed: {evaluation.failure}" if evaluation.failure else rewards
    mark = "  best so far" if study.best is record else ""
    say(
        console,
        f"{place} {outcome:<32} {evaluation.params / 1e6:.2f} M params  "
        f"{sum(evaluation.seconds.values()):5.1f} s{mark}",
    )


def _open_run(argv: Sequence[str]) -> tuple[Study, SearchConfig]:
    """The run that the command line wants to continue, with the settings to continue it by."""
    arguments = tyro.cli(_Resume, args=argv, prog="nasfast.search")
    study = Study.open(arguments.resume)
    config = from_mapping(SearchConfig, study.config, str(study.path / "config.toml"))
    last = (study.load_checkpoint() or {}).get("budget", config.budget)
    return study, dataclasses.replace(
        config,
        budget=last if arguments.budget is None else arguments.budget,
        device=arguments.device or config.device,
    )


def _identity(evaluator: SegmentationEvaluator) -> dict[str, dict[str, str]]:
    """What a bit-exact continuation needs to be the same: what was read, and what computed."""
    return {
        "inputs": evaluator.inputs,
        "computation": {
            "device": str(evaluator.runtime.device),
            "precision": evaluator.runtime.precision,
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        },
    }


def _check_identity(study: Study, evaluator: SegmentationEvaluator, console: Console) -> None:
    """Refuse to continue a run on other data or weights; say where it will not be bit-exact."""
    now = _identity(evaluator)
    for kind, before in study.env["identity"].items():
        changed = [name for name, value in before.items() if now[kind][name] != value]
        if changed and kind == "inputs":
            raise ValueError(
                f"resume {study.path}: wanted the {', '.join(changed)} that the run began with, "
                "got other content in the same place; restore it or start a new run"
            )
        for name in changed:
            say(
                console,
                f"note: the run began with {name} {before[name]}, this is {now[kind][name]}; "
                "rewards will not be bit-identical to an uninterrupted run",
            )


def _create_run(
    argv: Sequence[str], config: SearchConfig, evaluator: SegmentationEvaluator
) -> Study:
    environment = machine_info() | {
        "command": ["python", "-m", "nasfast.search", *argv],
        "feedback": FEEDBACK,
        "identity": _identity(evaluator),
    }
    name = config.name or re.sub(r"[^\w.+-]+|^[.+-]+", "_", Path(config.data).name)
    return Study.create(config.runs, config.method, name, dataclasses.asdict(config), environment)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (130 after Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    console = Console()
    study, again = None, argv
    start = time.perf_counter()
    with Interrupt() as interrupt, contextlib.ExitStack() as stack:
        try:
            if flag_value(argv, "--resume") is not None:
                study, config = _open_run(argv)
                stack.enter_context(study)
                torch.set_num_threads(int(study.env["identity"]["computation"]["threads"]))
                evaluator, config = build(config, interrupt, console)
                _check_identity(study, evaluator, console)
            else:
                config = parse(argv)
                # before a run is made: this may refuse
                evaluator, config = build(config, interrupt, console)
                study = stack.enter_context(_create_run(argv, config, evaluator))
                again = ["--resume", str(study.path)]
            say(console, f"run      {study.path}")
            space = FastNASSpace()
            strategy = make_strategy(config.strategy, space, config.seed, config.ppo)
            try:
                run(study, space, strategy, evaluator, config.budget, console)
            finally:
                report = write_report(study)
        except StopRequested:
            say(
                console,
                f"\nstopped; {'everything is saved' if study else 'nothing was begun'}. "
                "Continue with\n"
                f"  python -m nasfast.search {shlex.join(again)}",
            )
            return 130
        console.print(terminal_table(study))
        path = shlex.quote(str(study.path))
        say(
            console,
            f"{time.perf_counter() - start:.0f} s; everything is in {study.path}\n"
            f"  python -m nasfast.train {path}      # train the best one in full\n"
            f"  python -m nasfast.search --resume {path} --budget {2 * config.budget}\n"
            f"  open {shlex.quote(str(report))}",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
