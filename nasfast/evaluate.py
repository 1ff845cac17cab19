"""Measure a trained network: ``python -m nasfast.evaluate MODEL``.

MODEL is a model.safetensors of ``nasfast.train``, or the directory that holds it. Reports
mIoU on the validation split, parameters, multiply-adds and latency.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nasfast.cli import reports_errors
from nasfast.config import require_positive
from nasfast.data import ValTransform, load_splits
from nasfast.device import resolve_device
from nasfast.files import atomic_write
from nasfast.models.segmenter import read_segmenter
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.cost import count_macs, count_parameters, measure_latency
from nasfast.training.loop import Runtime


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and where."""

    model: Annotated[Path, tyro.conf.Positional]
    """model.safetensors, or the directory that holds it."""
    data: str | None = None
    """Data as for nasfast.search; default: what the network was trained on."""
    batch: int = 1
    """Images a forward pass, for the latency."""
    seconds: float = 5.0
    """How long to measure the latency."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_positive(self, "batch")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints a table and writes evaluation.json beside the model."""
    config = tyro.cli(EvaluateConfig, args=argv, description=__doc__, prog="nasfast.evaluate")
    path = config.model / "model.safetensors" if config.model.is_dir() else config.model
    model, description = read_segmenter(path)
    runtime = Runtime(resolve_device(config.device))
    data = config.data or description["data"]
    task = SegmentationTask(load_splits(data, cache_in_memory=False))
    val = task.splits.val
    if tuple(description["classes"]) != tuple(val.classes):
        raise ValueError(
            f"evaluate {path}: wanted data of the classes {', '.join(description['classes'])}, got "
            f"{', '.join(val.classes)} in {data}"
        )
    runtime.place(model)
    scores = task.score_images(model, val, ValTransform(None), runtime, batch_size=1)
    height, width = val[0].mask.shape
    latency = measure_latency(
        model, (height, width), runtime, batch=config.batch, seconds=config.seconds
    )
    class_iou = dict(zip(val.classes, scores.class_iou, strict=True))
    macs = count_macs(model, (height, width))
    result = {
        "data": data,
        "images": len(val),
        **scores.as_dict(),
        "class_iou": class_iou,
        "params": count_parameters(model),
        "macs": macs,
        "latency_ms": dataclasses.asdict(latency),
    }
    atomic_write(path.with_name("evaluation.json"), json.dumps(result, indent=2) + "\n")
    table = Table(title=escape(f"{path.parent.name}, {len(val)} validation images of {val.name}"))
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, iou in class_iou.items():
        table.add_row(escape(f"IoU {name}"), "absent" if iou is None else f"{iou:.3f}")
    table.add_section()
    table.add_row("mIoU", f"{scores.miou:.4f}")
    table.add_row("mean accuracy", f"{scores.mean_accuracy:.4f}")
    table.add_row("frequency-weighted IoU", f"{scores.fw_iou:.4f}")
    table.add_row("parameters", f"{result['params']:,}")
    table.add_row(f"multiply-adds, {height}x{width}", f"{macs / 1e9:.3f} G")
    table.add_row(
        f"latency, batch {latency.batch}, {latency.dtype}, {latency.device}, "
        f"{latency.threads} threads",
        f"{latency.median:.1f} ms ({latency.low:.1f} to {latency.high:.1f}, {latency.runs} runs)",
    )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
