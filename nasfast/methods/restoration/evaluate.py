"""Measuring a trained restoration network: metrics, baselines, cost, and images to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from nasfast.data.restoration import ImageSet, open_images
from nasfast.device import resolve_device
from nasfast.methods import base
from nasfast.methods.restoration.strips import write_strips
from nasfast.methods.restoration.task_flags import parse_with_task
from nasfast.models.io import load_model
from nasfast.models.restorer import Restorer
from nasfast.tasks.restoration import RestorationTask, Task, scoring, task_from_json
from nasfast.tasks.restoration.base import Predict
from nasfast.tasks.restoration.scoring import EvalProtocol, Scores, costs, input_size
from nasfast.training.cost import measure_latency
from nasfast.training.loop import Runtime
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
    split: Literal["val", "test"] = "test"
    """Which images; searches and trainings never read those of the test."""
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
    model, description = load_model(config.path, Restorer)
    runtime = Runtime(resolve_device(config.device))
    source, channels = config.data or description["data"], model.channels
    task = config.task or task_from_json(description["task"])
    if task.scale != model.scale:
        raise UserError(
            f"evaluate {config.path}: expected a task of scale {model.scale}, as the network has, "
            f"got {task.label} of scale {task.scale}; leave --task out"
        )
    images = getattr(open_images(source, channels), config.split)
    runtime.place(model)
    scores: dict[str, dict[str, Scores]] = {}
    notes: list[str] = []
    for condition in task.conditions():
        scores[condition.label], missing = _compare(config, model, condition, images, runtime)
        write_strips(config.path.with_name(PICTURES), condition, scores[condition.label])
        notes += missing
    latency = measure_latency(
        model,
        input_size(task, images),
        runtime,
        batch=config.batch,
        seconds=config.seconds,
        channels=channels,
    )
    result = {
        "data": source,
        "split": config.split,
        "images": len(images),
        "task": task.describe(),
        "protocol": config.protocol,
        "seed": config.seed,
        "scores": {
            label: {name: each.to_json() for name, each in by_method.items()}
            for label, by_method in scores.items()
        },
        **costs(model, task, images),
        "latency_ms": dataclasses.asdict(latency),
    }
    title = f"{len(images)} {config.split} images of {images.name}, {config.protocol}"
    return result, _table(title, notes, scores, result)


def _compare(
    config: EvaluateConfig,
    model: Restorer,
    condition: RestorationTask,
    images: ImageSet,
    runtime: Runtime,
) -> tuple[dict[str, Scores], list[str]]:
    """Scores under one condition, by method, the network's last; and why methods are missing."""
    count = min(config.pictures, len(images))
    keep = [round((i + 0.5) * len(images) / count - 0.5) for i in range(count)]
    methods: dict[str, Predict] = dict(condition.baselines()) if config.baselines else {}
    methods[config.path.parent.name] = model
    scores, missing = {}, []
    for name, predict in methods.items():
        try:
            scores[name] = scoring.evaluate(
                predict,
                condition,
                images,
                protocol=config.protocol,
                seed=config.seed,
                channels=model.channels,
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
    result: Mapping[str, Any],
) -> Table:
    table = Table(title=escape(title), caption="\n".join(map(escape, notes)) or None)
    for column in ("method", "PSNR, dB", "SSIM"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for label, by_method in scores.items():
        table.add_section()
        table.add_row(escape(label), "", "")
        for name, each in by_method.items():
            table.add_row(escape(f"  {name}"), f"{each.psnr:.3f}", f"{each.ssim:.4f}")
    latency = result["latency_ms"]
    height, width = latency["size"]
    table.add_section()
    table.add_row("parameters", f"{result['params']:,}", "")
    table.add_row(f"multiply-adds, {height}x{width}", f"{result['macs'] / 1e9:.3f} G", "")
    table.add_row(
        f"latency, batch {latency['batch']}, {latency['dtype']}, {latency['device']}, "
        f"{latency['threads']} threads",
        f"{latency['median']:.1f} ms",
        "",
    )
    return table
