"""Size and latency of a network, and of an export beside the network that it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nasfast.inference.export import weights_digest
from nasfast.inference.exported import Exported
from nasfast.inference.model import Model, load
from nasfast.training.cost import Latency, count_macs, count_parameters, measure_latency
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

TIE = 0.05
"""Share of the latency that two may differ by and count as equal."""


def measure_size(path: Path, model: Model, size: tuple[int, int]) -> dict[str, Any]:
    """Bytes of the file; and of a network that is no export, parameters and multiply-adds for an
    image of a size."""
    found: dict[str, Any] = {"bytes": path.stat().st_size}
    if not isinstance(model.network, Exported):
        channels = model.preprocessing.channels
        found["params"] = count_parameters(model)
        found["macs"] = count_macs(model.network, size, channels=channels)
        found["size"] = list(size)
    return found


def size_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `measure_size` found, for a table."""
    rows = [("file", f"{found['bytes'] / 1e6:.2f} MB")]
    if "params" in found:
        height, width = found["size"]
        rows.append(("parameters", f"{found['params']:,}"))
        rows.append((f"multiply-adds, {height}x{width}", f"{found['macs'] / 1e9:.3f} G"))
    return rows


def measure_speed(
    path: Path,
    model: Model,
    size: tuple[int, int],
    runtime: Runtime,
    *,
    batch: int,
    seconds: float,
) -> list[Latency]:
    """Latency of a network, its output at the size of the result. That of an export is followed by
    that of the network it was made from, where the folder holds it; the two take turns.

    Args:
        path: the file of the network.
        model: the network, on the device of the runtime.
        size: (H, W) of the images; an export of one size has its own.
        runtime: device, and precision of a network that is no export.
        batch: images per forward pass.
        seconds: how long to measure each.
    """
    models = [model]
    if isinstance(model.network, Exported):
        size = tuple(model.network.export["size"] or size)
        models += _original(path, model.network, str(runtime.device))
    found = measure_latency(
        models, size, runtime, batch=batch, channels=model.preprocessing.channels, seconds=seconds
    )
    if isinstance(model.network, Exported):
        network = model.network
        found[0] = replace(found[0], dtype=network.precision, backend=network.backend)
    return found


def _original(path: Path, export: Exported, device: str) -> list[Model]:
    """The network beside an export that has its weights, or none."""
    for file in sorted(path.parent.glob("*.safetensors")):
        try:
            model = load(file, device)
        except UserError:  # another file of that kind
            continue
        if weights_digest(model) == export.export["weights"]:
            return [model]
    return []


def speed_json(latencies: Sequence[Latency]) -> dict[str, Any]:
    """What `measure_speed` found, for evaluation.json."""
    names = ("latency_ms", "latency_ms_of_original")
    return {name: asdict(latency) for name, latency in zip(names, latencies)}


def speed_rows(latencies: Sequence[Latency]) -> list[tuple[str, str]]:
    """What was measured how, and the figures, for a table."""
    rows = [
        (
            f"latency, {each.backend}, {each.dtype}, {each.device}, {each.threads} threads, "
            f"batch {each.batch}, {each.size[0]}x{each.size[1]}",
            f"{each.median:.1f} ms (95 % below {each.p95:.1f}, {each.runs} runs)",
        )
        for each in latencies
    ]
    if len(latencies) > 1:
        ours, theirs = (each.median for each in latencies)
        gap = abs(ours - theirs) / max(ours, theirs)
        factor = max(ours, theirs) / min(ours, theirs)
        verdict = "as fast" if ours < theirs else "as slow"
        text = f"a tie ({gap:.1%} apart)" if gap < TIE else f"{factor:.2f} times {verdict}"
        dtypes = [each.dtype for each in latencies]
        if len(set(dtypes)) > 1:
            text += f", {' against '.join(dtypes)}"
        rows.append(("the export against torch", text))
    return rows
