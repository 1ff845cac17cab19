"""Write a trained network for other programs: ``nasfast export MODEL``.

MODEL is a model.safetensors of ``nasfast train``, a directory that holds it, or a run. The file
runs without nasfast: ONNX with standard operators only, or an archive of torch.export. It takes
preprocessed images, and its metadata say how to preprocess. It is compared with PyTorch on images
of the data, in three sizes and batches of 1 and 3, and written only if it agrees.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from nasfast.data.images import MAX_PIXELS
from nasfast.inference.export import (
    EQUAL,
    FOUND,
    TOLERANCE,
    Format,
    Suppression,
    agrees,
    check_batches,
    check_exportable,
    compare,
    export,
    measure_of,
    quantize,
)
from nasfast.inference.model import Model, find_model, load
from nasfast.methods.base import Method
from nasfast.methods.registry import method_of_model
from nasfast.training.loop import Runtime
from nasfast.utils.cli import reports_errors
from nasfast.utils.errors import UserError
from nasfast.utils.files import require_place
from nasfast.utils.locks import writing

CALIBRATION = 32
"""Training images that the ranges of activations are taken from."""


@dataclass(frozen=True)
class ExportConfig:
    """What to write, and where."""

    model: Annotated[Path, tyro.conf.Positional]
    """model.safetensors, a directory that holds it, or a run."""
    format: Format = "onnx"
    """onnx: for onnxruntime and other runtimes. pt2: torch.export, for torch alone."""
    int8: bool = False
    """Weights and activations of 8 bits, with ranges from training images (onnx only)."""
    argmax: bool = False
    """Give the class of every pixel, uint8, instead of logits (segmentation only)."""
    nms: Suppression = "outside"
    """inside: give boxes, scores and labels of objects, after non-maximum suppression, instead of
    the output of the network, which `nasfast evaluate` needs (detection and onnx only)."""
    size: str = "dynamic"
    """HxW in pixels, such as 360x480, where all images have one size. The batch is always free."""
    data: str | None = None
    """Data to check and calibrate on; default: what the network was trained on."""
    out: Path | None = None
    """File to write; default: model.onnx or model.pt2 beside the model, with -int8,
    -argmax, -nms and the size in its name."""

    def check(self) -> None:
        """UserError where flags do not go together."""
        if self.int8 and self.format != "onnx":
            raise UserError(f"int8: expected --format onnx, got {self.format}; leave out either")
        if self.out is not None and self.out.suffix != f".{self.format}":
            raise UserError(
                f"out: expected a name that ends in .{self.format}, got {self.out}; rename it, or "
                "give another --format"
            )

    @property
    def fixed(self) -> tuple[int, int] | None:
        """(H, W), or None."""
        if self.size == "dynamic":
            return None
        sides = self.size.split("x")
        if len(sides) != 2 or not all(s.isascii() and s.isdecimal() and int(s) for s in sides):
            raise UserError(
                f"size: expected HxW such as 360x480, or dynamic, got {self.size!r}; change it"
            )
        height, width = map(int, sides)
        if height * width > MAX_PIXELS:
            raise UserError(
                f"size: expected at most {MAX_PIXELS:,} pixels, got {self.size}; make it smaller"
            )
        return height, width

    def target(self, model: Path) -> Path:
        """The file to write."""
        if self.out is not None:
            return self.out
        flags = [
            ("int8", self.int8),
            ("argmax", self.argmax),
            ("nms", self.nms == "inside"),
            (self.size, self.fixed is not None),
        ]
        marks = "".join(f"-{mark}" for mark, given in flags if given)
        return model.with_name(f"{model.stem}{marks}.{self.format}")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: writes the file and prints how far it is from PyTorch; 1 if it is too far."""
    argv = sys.argv[1:] if argv is None else argv
    config = tyro.cli(ExportConfig, args=argv, description=__doc__, prog="nasfast export")
    config.check()
    path, size = find_model(config.model), config.fixed
    model, method, out = load(path, "cpu"), method_of_model([str(path)]), config.target(path)
    check_exportable(model, config.format, argmax=config.argmax, nms=config.nms)
    if config.int8 and model.processor.whole:
        raise UserError(
            f"int8: expected a network of maps, got one for {model.task}, whose logits and "
            "distances do not fit one range of 8 bits; leave it out"
        )
    if not out.parent.is_dir():
        raise UserError(f"out: expected an existing folder, got {out.parent}; make it first")
    require_place(out.parent, "give another --out")
    data = config.data or model.description.get("data")
    images = _images(config, model, method, data)
    calibration = method.inputs(model, str(data), "train", CALIBRATION) if config.int8 else []
    if size is not None:
        calibration = [F.interpolate(each, size, mode="bilinear") for each in calibration]
    # beside the target, which it replaces in one step once it is known to be right
    with (
        writing(out),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder,
    ):
        file = Path(folder) / out.name
        print(f"exporting {path} as {config.format}, which takes up to a minute", flush=True)
        export(model, file, format=config.format, size=size, argmax=config.argmax, nms=config.nms)
        exported = load(file, "cpu")
        least = 1 if size else exported.description["export"]["least"]
        measure, share = measure_of(exported), config.argmax or config.nms == "inside"
        values = []
        for shape, value in compare(model, exported, check_batches(images, size, least)):
            values.append(value)
            shown = f"{value:.3%}" if share else f"{value:.1e}"
            print(f"  {'x'.join(map(str, shape)):<14}  {measure} {shown}", flush=True)
        worst = min(values) if share else max(values)
        if not agrees(exported, worst):
            equal = EQUAL if config.argmax else FOUND
            expected = f"at least {equal:.1%}" if share else f"at most {TOLERANCE:.0e}"
            print(
                f"error: export {path}: expected {measure} of {expected}, got {worst:.3g}; no file "
                "was written; please report it",
                file=sys.stderr,
            )
            return 1
        if config.int8:
            small = file.with_name(f"int8-{out.name}")
            print(f"calibrating on {len(calibration)} training images of {data}", flush=True)
            quantize(file, small, calibration)
            try:
                _print_loss(method, exported, load(small, "cpu"), str(data))
            except UserError as problem:  # validation images of another size than the file's
                print(f"  loss not measured: {problem}")
            print(f"  size {small.stat().st_size / file.stat().st_size:.0%} of float32")
            file = small
        os.replace(file, out)
    command = f"`nasfast evaluate {out}` measures"
    if config.nms == "inside":  # which leaves no losses to measure
        command = f"`nasfast predict {out} IMAGES` uses"
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB; {command} it")
    return 0


def _images(config: ExportConfig, model: Model, method: Method, data: str | None) -> list[Tensor]:
    """Preprocessed images to compare on, ``[1, c, H, W]``; drawn ones where the data is gone."""
    try:
        if data is None:
            raise UserError(
                "data: expected a model file that names its data, got one without; give --data DIR"
            )
        return method.inputs(model, data, "val", 3)
    except UserError as error:
        if config.data is not None or config.int8:
            raise
        print(f"checking on drawn images, as the data cannot be read: {error}; or give --data")
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(3, model.preprocessing.channels, 12, 16, generator=generator)
    smooth = F.interpolate(coarse, config.fixed or (192, 256), mode="bicubic").clamp(0, 255)
    return list(torch.split(model.preprocessing(smooth), 1))


def _print_loss(method: Method, full: Model, small: Model, data: str) -> None:
    """The task's metrics of both, and what is lost."""
    runtime = Runtime(torch.device("cpu"))
    before, after = (method.score(each, data, "val", runtime) for each in (full, small))
    for name, value in before.items():
        print(
            f"  {name}: {value:.4f} in float32, {after[name]:.4f} in int8, "
            f"{value - after[name]:.4f} lost",
            flush=True,
        )
