"""Trained networks as files that run without nasfast: ONNX, and archives of ``torch.export``.

A file takes preprocessed images and gives the output at the size of the result, or of a detector
that of its points or the objects. Its metadata says how images are preprocessed and what the output
means.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.inference.exported import METADATA, Exported, import_onnxruntime
from nasfast.inference.model import Model
from nasfast.inference.suppression import SuppressedDetector, suppression_table
from nasfast.ops import DeformConv2d, deform_conv2d_reference, onnx_translation_table
from nasfast.tasks.detection.postprocess import Boxes
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_write

Format = Literal["onnx", "pt2"]
Suppression = Literal["inside", "outside"]
"""Whether the file of a detector gives objects, or the output of its network."""
TOLERANCE = 1e-4
"""Greatest difference from PyTorch that an export may have, in float32; relative where outputs of
a detector are greater than 1, as distances are."""
EQUAL = 0.999
"""Least share of the pixels that must get the class that PyTorch gives them."""
FOUND, NEAR = 0.98, 1e-2
"""Least share of the objects that must be found as in PyTorch: their class, their box within so
many times its longer side, their score within 0.01."""
OPSET, DEFORM_OPSET = 18, 19
"""18 is the lowest that torch writes and every runtime of the last years reads; DeformConv came
with 19."""
VERSION = 1
"""Of the metadata."""
# batch of more than 1, and sides that are padded, of which no level has 1: others become constants
_BATCH, _SIDES, _DETECTOR_SIDES = 2, (97, 130), (270, 390)


class _Classes(nn.Module):
    """The class of every pixel, uint8 ``[N, H, W]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        classes: Tensor = self.model(images).argmax(1).to(torch.uint8)
        return classes


def export(
    model: Model,
    path: Path,
    *,
    format: Format = "onnx",
    size: tuple[int, int] | None = None,
    argmax: bool = False,
    nms: Suppression = "outside",
) -> None:
    """Write a network as a file for other programs, in float32.

    Args:
        model: of a model.safetensors.
        path: the file, which is replaced in one step.
        format: "onnx", or "pt2", an archive of ``torch.export`` that runs with torch alone.
        size: (H, W) that all images have; None: any. The batch is always free.
        argmax: give the class of every pixel, uint8 ``[N, H, W]``, in place of logits.
        nms: "inside": the file of a detector gives "boxes" ``[N, 100, 4]`` (left, top, right and
            bottom in pixels of the input), "scores" and "labels" ``[N, 100]``, -1 after the last,
            in place of the output of its network.

    Raises:
        UserError: the network is an export itself, has no classes for ``argmax`` or no boxes for
            ``nms``, or a package is missing.
    """
    check_exportable(model, format, argmax=argmax, nms=nms)
    atomic_write(path, exported_bytes(model, format, size=size, argmax=argmax, nms=nms))


def exported_bytes(
    model: Model,
    format: Format = "onnx",
    *,
    size: tuple[int, int] | None = None,
    argmax: bool = False,
    nms: Suppression = "outside",
) -> bytes:
    """The content of the file that `export` writes, of the same arguments."""
    # a copy: of the weights of another device, and the memory format of the caller's stays
    network: nn.Module = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    if argmax:
        network = _Classes(network)
    if nms == "inside":
        assert isinstance(network, Model)
        network = SuppressedDetector(network)
    traced = _DETECTOR_SIDES if model.processor.whole else _SIDES
    images = torch.zeros(_BATCH, model.preprocessing.channels, *(size or traced))
    write = _onnx if format == "onnx" else _archive
    with torch.no_grad(), _quiet():
        return write(network, images, size, _description(model, size, argmax, nms))


def check_exportable(
    model: Model, format: Format, *, argmax: bool = False, nms: Suppression = "outside"
) -> None:
    """UserError where `export` cannot write the network."""
    if isinstance(model.network, Exported):
        raise UserError(
            f"export: expected a model.safetensors, got {model.network.path}, which is an export; "
            "give the file that it was made from"
        )
    if argmax and (not model.processor.full_size or not 0 < len(model.classes) <= 256):
        raise UserError(
            f"argmax: expected a network of 1 to 256 classes of pixels, got {len(model.classes)} "
            f"of a network for {model.task}; leave it out"
        )
    if nms == "inside" and not model.processor.whole:
        raise UserError(
            f"nms: expected inside for a network for detection only, got one for {model.task}; "
            "leave it out"
        )
    if nms == "inside" and format != "onnx":
        raise UserError(
            f"nms: expected outside for --format {format}, as torch alone has no suppression, got "
            "inside; leave it out, or use --format onnx"
        )


def _description(
    model: Model, size: tuple[int, int] | None, argmax: bool, nms: Suppression
) -> dict[str, Any]:
    """All that a program needs to know, and with it the description of the model file."""
    file = {
        "version": VERSION,
        "task": model.task,
        "classes": list(model.classes),
        "preprocessing": model.preprocessing.describe(),
        "scale": model.processor.scale,
        "argmax": argmax,
        "dtype": "float32",
        "size": size and list(size),
        "least": 1,
        "weights": weights_digest(model),
    }
    if model.processor.whole:
        file["nms"] = nms
    fixed = {"input_size": list(size)} if size else {}
    return {**model.description, **fixed, "export": file}


def weights_digest(model: Model) -> str:
    """SHA-256 (hex) over the weights, by which an export knows the network it was made from."""
    digest = hashlib.sha256()
    for name, tensor in model.network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _onnx(
    network: nn.Module, images: Tensor, size: tuple[int, int] | None, description: dict[str, Any]
) -> bytes:
    import_onnxruntime("export --format onnx")
    try:
        table = onnx_translation_table() | suppression_table()
    except ModuleNotFoundError as error:
        raise UserError(str(error)) from error
    axes = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    deformable = any(isinstance(module, DeformConv2d) for module in network.modules())
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        verbose=False,
        opset_version=DEFORM_OPSET if deformable else OPSET,
        input_names=["images"],
        output_names=_names(description["export"]),
        dynamic_shapes=(axes,),
        custom_translation_table=table,
    )
    assert program is not None
    program.model.metadata_props[METADATA] = json.dumps(description)
    data: bytes = program.model_proto.SerializeToString()
    return data


def _names(export: dict[str, Any]) -> list[str]:
    """Of the outputs of a file."""
    if export.get("nms") == "inside":
        return ["boxes", "scores", "labels"]
    return ["classes" if export["argmax"] else "output"]


def _archive(
    network: nn.Module, images: Tensor, size: tuple[int, int] | None, description: dict[str, Any]
) -> bytes:
    for module in network.modules():
        if isinstance(module, Model):
            module.cut = _gathered  # type: ignore[method-assign]
    free = torch.export.Dim.DYNAMIC
    axes = {0: free} if size else {0: free, 2: free, 3: free}
    program = torch.export.export(network, (images,), dynamic_shapes=(axes,))
    ours = torch.ops.nasfast.deform_conv2d.default
    if any(node.target is ours for node in program.graph.nodes):
        program = program.run_decompositions({ours: deform_conv2d_reference})
    if size is None:
        shape = next(n for n in program.graph.nodes if n.name == "images").meta["val"].shape
        ranges = [program.range_constraints[side.node.expr] for side in shape[2:]]
        lowest = max(int(each.lower) for each in ranges)
        description["export"]["least"] = _least_side(program, images, lowest)
    buffer = io.BytesIO()
    extra = {f"{METADATA}.json": json.dumps(description)}
    torch.export.save(program, buffer, extra_files=extra)
    return buffer.getvalue()


def _least_side(program: torch.export.ExportedProgram, images: Tensor, lowest: int) -> int:
    """The least side that an archive takes, beside any other: besides the ranges of its sides it
    has conditions on both, which only a run shows. It was traced with ``images``."""
    module = program.module()
    channels, most = images.shape[1], max(images.shape[2:])

    def takes(side: int) -> bool:
        try:
            for other in (side, most):
                module(torch.zeros(1, channels, side, other))
                module(torch.zeros(1, channels, other, side))
        except AssertionError:
            return False
        return True

    return next((side for side in range(lowest, most) if takes(side)), most)


def _gathered(output: Tensor, height: int, width: int) -> Tensor:
    """`Model.cut`; the strides of a slice would become conditions of the archive."""
    rows, columns = torch.arange(height), torch.arange(width)
    return output.index_select(-2, rows).index_select(-1, columns)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say to their developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def quantize(path: Path, out: Path, images: Sequence[Tensor]) -> None:
    """Write an ONNX file of `export` with 8-bit integers: weights by channel, activations by their
    range on the images (static quantisation of onnxruntime, QDQ).

    Args:
        path: the float32 file.
        out: the new one, which is replaced in one step.
        images: preprocessed, ``[1, c, H, W]`` each, of any sizes that the file takes.
    """
    import_onnxruntime("export --int8")
    import onnx
    from onnxruntime.quantization import (  # type: ignore[import-untyped]
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import (  # type: ignore[import-untyped]
        quant_pre_process,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {"images": image.numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        written = onnx.load(quantized)
        description = json.loads(
            next(entry.value for entry in onnx.load(path).metadata_props if entry.key == METADATA)
        )
        description["export"]["dtype"] = "int8"
        onnx.helper.set_model_props(written, {METADATA: json.dumps(description)})
        atomic_write(out, written.SerializeToString())


@torch.inference_mode()
def compare(
    model: Model, exported: Model, batches: Iterable[Tensor]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Shape of each batch, and the greatest difference of the outputs on it; of a file that gives
    classes the share of pixels whose class is the same, and of one that gives objects the share of
    those that both find."""
    network = exported.network
    assert isinstance(network, Exported)
    for images in batches:
        if network.suppresses:
            value = _same(Boxes(*SuppressedDetector(model)(images)), network.detect(images))
        else:
            expected, got = model(images), exported(images)
            if network.export["argmax"]:
                value = (expected.argmax(1) == got.argmax(1)).float().mean().item()
            else:
                unit = expected.abs().clamp(min=1) if model.processor.whole else 1.0
                value = ((expected - got).abs() / unit).max().item()
        yield tuple(images.shape), value


def _same(expected: Boxes, got: Boxes) -> float:
    """The share of the objects of either that the other has too; 1 where there are none."""
    side = (expected.boxes[..., 2:] - expected.boxes[..., :2]).amax(-1)[..., None]
    far = (expected.boxes[:, :, None] - got.boxes[:, None]).abs().amax(-1)  # [N, C, C]
    same = (far <= NEAR * side) & (expected.labels[:, :, None] == got.labels[:, None])
    same &= (expected.scores[:, :, None] - got.scores[:, None]).abs() <= 0.01
    there = (expected.scores >= 0, got.scores >= 0)
    same &= there[0][:, :, None] & there[1][:, None]
    shares = [
        (same.any(axis) & each).sum().item() / max(each.sum().item(), 1)
        for axis, each in zip((2, 1), there, strict=True)
        if each.any()
    ]
    return min(shares, default=1.0)


def measure_of(exported: Model) -> str:
    """What `compare` yields, in words."""
    assert isinstance(exported.network, Exported)
    if exported.network.suppresses:
        return "equal objects"
    if exported.network.export["argmax"]:
        return "equal pixels"
    return "greatest difference from PyTorch"


def agrees(exported: Model, value: float) -> bool:
    """Whether a value of `compare` is one of a correct export in float32."""
    assert isinstance(exported.network, Exported)
    if exported.network.suppresses:
        return value >= FOUND
    return value >= EQUAL if exported.network.export["argmax"] else value <= TOLERANCE


def check_batches(
    images: Sequence[Tensor], size: tuple[int, int] | None, least: int = 1
) -> Iterator[Tensor]:
    """Batches of 1 and 3 in three sizes, or in the one, made of images ``[1, c, H, W]``; no side is
    smaller than the ``least`` that the file takes."""
    height, width = size or images[0].shape[-2:]
    sizes = [(height, width)]
    if size is None:
        sizes += [(height * 3 // 4 | 1, width * 2 // 3 | 1), (height // 2 + 3, width)]
    for rows, columns in sizes:
        side = max(rows, least), max(columns, least)
        some = [
            F.interpolate(images[i % len(images)], side, mode="bilinear", antialias=True)
            for i in range(3)
        ]
        yield some[0]
        yield torch.cat(some)
