"""Measuring a trained restoration network: metrics, baselines, cost, and images to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nasfast.data.restoration import ImageSet
from nasfast.device import resolve_device
from nasfast.inference.model import Model, load
from nasfast.inference.speed import (
    measure_size,
    measure_speed,
    size_rows,
    speed_json,
    speed_rows,
)
from nasfast.methods import base
from nasfast.methods.base import Split
from nasfast.methods.restoration.strips import write_strips
from nasfast.methods.restoration.task_flags import parse_with_task
from nasfast.tasks.restoration import RestorationTask, Task, scoring, task_from_json
from nasfast.tasks.restoration.base import Predict
from nasfast.tasks.restoration.scoring import EvalProtocol, Scores, image_generator, input_size
from nasfast.training.loop import Runtime
from nasfast.training.pictures import spread
from nasfast.utils.config import Bound, Seed
from nasfast.utils.errors import UserError

TASK_HELP = (
    "``--task NAME`` measures under another task than the network was trained for, "
    "``--task.SETTING VALUE`` with its settings."
)
PICTURES = "pictures"
"""Folder beside the model that the strips are put in."""


@dataclass(frozen=True)
class EvaluateConfig(base.EvaluateConfig):
    """What to measure, and how."""

    task: Task | None = None
    """Another task than the network was trained for: --task NAME."""
    split: Split = "test"
    """Which images to score on; searches and trainings never read those of test."""
    protocol: EvalProtocol = "whole"
    """whole: one degraded version of each whole image. overlap: averaged patches with
    independent noise, which overestimates PSNR; only to compare with figures measured that way."""
    baselines: bool = False
    """Also run the methods without training."""
    pictures: Annotated[int, Bound(0, 1000)] = 4
    """Images to show before and after, from all over the split."""
    seed: Seed = 0
    """Decides what the task draws."""


def parse_evaluate(argv: Sequence[str], description: str | None) -> EvaluateConfig:
    """Settings from a command line."""
    return parse_with_task(
        EvaluateConfig(model=tyro.MISSING),
        argv,
        "nasfast evaluate",
        f"{description or ''}\n{TASK_HELP}",
    )


def evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], Table]:
    """PSNR and SSIM of the network, and of methods without training, under each condition of the
    task; parameters, multiply-adds and latency. Writes the strips."""
    path = config.path
    model = load(path, config.device)
    runtime = Runtime(resolve_device(str(model.device)))
    data, scale = config.source(model.description), model.processor.scale
    task = config.task or _task(model)
    if task.scale != scale:
        raise UserError(
            f"evaluate {path}: expected a task of scale {scale}, as the network has, got "
            f"{task.label} of scale {task.scale}; leave --task out"
        )
    images = _open_split(model, task, data, config.split)
    task = task.of(images)
    scores: dict[str, dict[str, Scores]] = {}
    notes: list[str] = []
    for condition in task.conditions():
        scores[condition.label], missing = _compare(config, model, condition, images, runtime)
        write_strips(path.with_name(PICTURES), condition, scores[condition.label])
        notes += missing
    size = input_size(task, images)
    latencies = measure_speed(
        path, model, size, runtime, batch=config.batch, seconds=config.seconds
    )
    result = {
        "data": data,
        "split": config.split,
        "images": len(images),
        "task": task.describe(),
        "protocol": config.protocol,
        "seed": config.seed,
        "scores": {
            label: {name: each.to_json() for name, each in by_method.items()}
            for label, by_method in scores.items()
        },
        **measure_size(path, model, size),
        **speed_json(latencies),
    }
    title = f"{len(images)} {config.split} images of {images.name}, {config.protocol}"
    rows = [*size_rows(result), *speed_rows(latencies)]
    return result, _table(title, notes, scores, rows)


def _task(model: Model) -> RestorationTask:
    """What the network was trained for."""
    return task_from_json(model.description["task"])


def _open_split(model: Model, task: RestorationTask, data: str, split: Split) -> ImageSet:
    opened = task.open(data, model.preprocessing.channels)
    images: ImageSet = getattr(opened, split)
    return images


def inputs(model: Model, data: str, split: Split, count: int) -> list[Tensor]:
    """See `nasfast.methods.base.Method.inputs`; degraded as the task has it."""
    task = _task(model)
    images = _open_split(model, task, data, split)
    task.check(images)
    pairs = (images[index] for index in spread(len(images), count))
    return [task.pair(pair, image_generator(0, pair.name))[0][None] for pair in pairs]


def score(model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
    """See `nasfast.methods.base.Method.score`."""
    task, found = _task(model), {}
    images = _open_split(model, task, data, split)
    for condition in task.of(images).conditions():
        scores = scoring.evaluate(
            model, condition, images, channels=model.preprocessing.channels, runtime=runtime
        )
        found[f"PSNR in dB, {condition.label}"] = scores.psnr
        found[f"SSIM, {condition.label}"] = scores.ssim
    return found


def _compare(
    config: EvaluateConfig,
    model: Model,
    condition: RestorationTask,
    images: ImageSet,
    runtime: Runtime,
) -> tuple[dict[str, Scores], list[str]]:
    """Scores under one condition, by method, the network's last; and why methods are missing."""
    keep = spread(len(images), config.pictures)
    methods: dict[str, Predict] = dict(condition.baselines()) if config.baselines else {}
    methods[config.label] = model
    scores, missing = {}, []
    for name, predict in methods.items():
        try:
            scores[name] = scoring.evaluate(
                predict,
                condition,
                images,
                protocol=config.protocol,
                seed=config.seed,
                channels=model.preprocessing.channels,
                runtime=runtime if predict is model else None,
                keep=keep,
            )
        except ImportError as error:
            missing.append(f"without {name}: {error}")
    return scores, missing


def _table(
    title: str,
    notes: Sequence[str],
    scores: Mapping[str, Mapping[str, Scores]],
    rows: Sequence[tuple[str, str]],
) -> Table:
    table = Table(title=escape(title), caption="\n".join(map(escape, notes)) or None)
    for column in ("method", "PSNR, dB", "SSIM"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for label, by_method in scores.items():
        table.add_section()
        table.add_row(escape(label), "", "")
        for name, each in by_method.items():
            table.add_row(escape(f"  {name}"), f"{each.psnr:.3f}", f"{each.ssim:.4f}")
    table.add_section()
    for row in rows:
        table.add_row(*row, "")
    return table
