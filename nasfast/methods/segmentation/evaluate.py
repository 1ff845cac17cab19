"""Measuring a trained segmentation network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from nasfast.data import ValTransform, load_splits
from nasfast.device import resolve_device
from nasfast.methods.base import EvaluateConfig
from nasfast.models.decoders import EncoderDecoder
from nasfast.models.io import load_model
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.cost import count_macs, count_parameters, measure_latency
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError


def evaluate(config: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
    """mIoU on the validation split, parameters, multiply-adds and latency."""
    path = config.path
    model, description = load_model(path, EncoderDecoder)
    runtime = Runtime(resolve_device(config.device))
    data = config.data or description["data"]
    values = description.get("mask_values")
    task = SegmentationTask(load_splits(data, cache_in_memory=False, mask_values=values))
    val = task.splits.val
    if tuple(description["classes"]) != tuple(val.classes):
        raise UserError(
            f"evaluate {path}: expected data of the classes {', '.join(description['classes'])}, "
            f"got {', '.join(val.classes)} in {data}"
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
    return result, table
