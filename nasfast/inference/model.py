"""A trained network with all that it takes to use it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.data.detection import scaled_size
from nasfast.device import resolve_device
from nasfast.inference.exported import EXPORT_SUFFIXES, Exported, load_exported
from nasfast.inference.inputs import SHORTEST, Input, Resize, pixels_of, resized, size_for
from nasfast.inference.people import Box, joints_of
from nasfast.inference.tiles import Axis, output_bands, resized_bands
from nasfast.models.io import MODEL_FILE, load_model
from nasfast.models.layers import resize as resize_maps
from nasfast.tasks.detection import DetectionProcessor
from nasfast.tasks.detection.nms import nms
from nasfast.tasks.detection.postprocess import Boxes, detections
from nasfast.tasks.keypoints import KeypointProcessor, Poses
from nasfast.tasks.processor import STRIDE, Prediction, Preprocessing, Processor, Tiling
from nasfast.tasks.registry import processor_of
from nasfast.training.cost import count_parameters
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.utils.errors import UserError, about, cause, out_of_memory
from nasfast.utils.files import expanded

CUT = 4
"""A box that ends less than so many pixels from a border between tiles is cut by it."""


class Model(nn.Module):
    """A trained network in evaluation mode, which predicts on images of any size.

    Args:
        network: gives maps ``[N, outputs, h, w]``, or of a detector ``[N, K + 5, P]``, alone or
            first in a tuple.
        processor: what goes in, and what comes out.
        description: of the model file. "size" is the [H, W] of the images it was scored on.

    Attributes:
        classes: names of the classes, empty where the task has none.
        preprocessing: what `predict` does to an image's values.
        genotype: the architecture, in its JSON form.
        task: name of the task, such as "segmentation" or "denoising".
        path: the file that `load` read it from.
    """

    path: Path | None = None

    def __init__(
        self, network: nn.Module, processor: Processor, description: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.network, self.processor, self.description = network, processor, dict(description)
        self.classes: tuple[str, ...] = processor.classes
        self.preprocessing: Preprocessing = processor.preprocessing
        self.genotype: object = description["genotype"]
        self.task: str = processor.task
        self.eval()

    def __repr__(self) -> str:
        parts = [self.task]
        if self.classes:
            parts.append(f"{len(self.classes)} classes ({', '.join(self.classes)})")
        if self.processor.scale > 1:
            parts.append(f"scale {self.processor.scale}")
        parts.append({1: "grey", 3: "RGB"}.get(self.preprocessing.channels, "") + " images")
        own = f"{count_parameters(self):,} parameters"
        parts.append(self.network.backend if isinstance(self.network, Exported) else own)
        return f"Model({', '.join([*parts, str(self.device)])})"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        own = next(self.parameters(), None)
        return torch.device("cpu") if own is None else own.device

    def forward(self, images: Tensor) -> Tensor:
        """Outputs at the size of the result: preprocessed images ``[N, c, H, W]`` to float32
        ``[N, outputs, scale * H, scale * W]``; of a detector ``[N, K + 5, P]``, the points of the
        padded image, and for keypoints ``[N, J, h, w]``, heatmaps that cover the padded image.

        Sides are padded to multiples of the network's stride: the cells of its coarsest maps would
        not lie where they are resized to.
        """
        own = not self.processor.full_size
        if isinstance(self.network, Exported):  # its graph pads
            return self.map(images) if own else self._resized(images)
        height, width = images.shape[-2:]
        scale, stride = self.processor.scale, self.processor.tiling.multiple
        if stride > 1:
            rows, columns = ((side + stride - 1) // stride * stride for side in (height, width))
            images = F.pad(images, (0, columns - width, 0, rows - height), mode="replicate")
        if own:
            return self.map(images)
        return self.cut(self._resized(images), scale * height, scale * width)

    @staticmethod
    def cut(output: Tensor, height: int, width: int) -> Tensor:
        """The top left of an output."""
        return output[..., :height, :width]

    def _resized(self, images: Tensor) -> Tensor:
        scale = self.processor.scale
        return resize_maps(self.map(images), (scale * images.shape[-2], scale * images.shape[-1]))

    def map(self, images: Tensor) -> Tensor:
        """Output of preprocessed images in the network's own resolution, float32."""
        output = self.network(images)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first.float()

    @overload  # a str is a sequence of str: it is one path
    def predict(  # type: ignore[overload-overlap]
        self,
        images: Input,
        *,
        resize: Resize = ...,
        tile: int | None = ...,
        batch: int = ...,
        autocast: bool = ...,
        boxes: Sequence[Box] | None = ...,
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        images: Sequence[Input],
        *,
        resize: Resize = ...,
        tile: int | None = ...,
        batch: int = ...,
        autocast: bool = ...,
        boxes: Sequence[Sequence[Box]] | None = ...,
    ) -> list[Prediction]: ...
    def predict(
        self,
        images: Input | Sequence[Input],
        *,
        resize: Resize = "auto",
        tile: int | None = None,
        batch: int = 8,
        autocast: bool = False,
        boxes: Sequence[Any] | None = None,
    ) -> Prediction | list[Prediction]:
        """The task's result for an image, or a list of them for a list, at each image's own size.

        An image larger than a tile goes through the network in tiles, which overlap. Restoration
        drops of each what its neighbours know better: the result is that of the whole image.
        Deformable convolutions may sample beyond a tile; where they do by many pixels, only a
        larger ``tile`` helps. Segmentation fades tiles into each other;
        a class is then decided by what the tile shows, not by the whole image. Detection uses tiles
        only where ``tile`` is given. They overlap by a quarter: objects that are larger may be
        found in parts. What a tile's border cuts and a neighbour sees whole is dropped; what is
        left is suppressed as the boxes of one image are.

        Args:
            images: a path, an 8-bit PIL image, an array uint8 ``[H, W, 3]`` or ``[H, W]``, a tensor
                uint8 ``[c, H, W]``, or a list. Colour becomes grey for a network of grey images
                (ITU-R 601 luma) and grey becomes colour, as in training.
            resize: "auto" brings an image to the shorter side of the images that the network was
                scored on where its own is less than 0.7 or more than 1.4 times that, where the
                model file says that size; restoration never resizes. A detector that was scored at
                a shorter or a longer side gets every image so. "none" never resizes; a number is
                the shorter side for every image. The result has the image's own size.
            tile: greatest side of what the network sees at once, in pixels; None: 1024, for
                restoration 512 (2048 where it reads blocks), and for detection the whole image. It
                decides the memory that is needed.
            batch: most neighbours of one size that go through the network together. Their pixels
                are never more than those of a tile.
            autocast: compute in bfloat16 where the device does natively, as evaluations do.
                float32 is the default: results agree between machines, up to rounding.
            boxes: for keypoints, the people of an image, each as left, top, right and bottom in its
                pixels; of a list of images a list of them. None: each image is taken for the crop
                of one person. The network sees crops of the boxes, whatever ``resize`` says.

        Raises:
            UserError: an image in another form, or one that cannot be read; a setting that does not
                fit; a network whose outputs are not finite.
        """
        many = isinstance(images, list | tuple)
        each: Any = images if many else [images]
        found = self.predict_each(
            each,
            resize=resize,
            tile=tile,
            batch=batch,
            autocast=autocast,
            boxes=boxes if many or boxes is None else [boxes],
        )
        return list(found) if many else next(found)

    def predict_each(
        self,
        images: Iterable[Input],
        *,
        resize: Resize = "auto",
        tile: int | None = None,
        batch: int = 8,
        autocast: bool = False,
        boxes: Iterable[Sequence[Box]] | None = None,
    ) -> Iterator[Prediction]:
        """The results of :meth:`predict` one by one, in order; images are read as they are
        needed."""
        kind = _DetectionRun if self.processor.whole else _Run
        run = kind(self, resize, tile, autocast)
        if batch < 1:
            raise UserError(f"batch: expected at least 1, got {batch}")
        self.eval()
        if isinstance(self.processor, KeypointProcessor):
            own: Iterable[Sequence[Box] | None] = itertools.repeat(None) if boxes is None else boxes
            for image, people in zip(images, own):
                yield run.people(pixels_of(image, 3), people, batch)
            return
        if boxes is not None:
            raise UserError(
                f"boxes: expected none for {self.task}, which takes whole images, got some; leave "
                "them out"
            )
        group: list[Tensor] = []
        for image in images:
            pixels = pixels_of(image, self.preprocessing.channels)
            fits = not group or (
                pixels.shape == group[0].shape
                and len(group) < batch
                and run.fits_a_tile(len(group) + 1, pixels)
            )
            if not fits:
                yield from run(group)
                group = []
            group.append(pixels)
        if group:
            yield from run(group)


class _Run:
    """Predictions of a model under one choice of settings."""

    def __init__(self, model: Model, resize: Resize, tile: int | None, autocast: bool) -> None:
        self.model, self.processor = model, model.processor
        self.runtime = Runtime(model.device)
        self.autocast = autocast
        self.resize = self._check_resize(resize)
        self.usual = _pair(model.description.get("size"))
        export = model.description.get("export", {})
        self.fixed, self.least = _pair(export.get("size")), int(export.get("least", 1))
        tiling = self.processor.tiling
        if tile is not None and tile < 1:
            raise UserError(f"tile: expected at least 1 pixel, got {tile}")
        if tile is not None and self.fixed is not None:
            raise UserError(
                f"tile: expected none, as this network takes inputs of {_text(self.fixed)} only, "
                f"got {tile}; leave it out"
            )
        self.tiling = dataclasses.replace(tiling, side=tile or tiling.side)
        self.pixels = math.prod(self.fixed) if self.fixed else self.tiling.side**2

    def _check_resize(self, resize: Resize) -> Resize:
        number = isinstance(resize, int) and not isinstance(resize, bool)
        if not (resize in ("auto", "none") or (number and int(resize) >= SHORTEST)):
            raise UserError(
                f"resize: expected 'auto', 'none' or the shorter side in pixels, at least "
                f"{SHORTEST}, got {resize!r}"
            )
        if number and not self.processor.resizes:
            raise UserError(
                f"resize: expected 'auto' or 'none' for {self.processor.task}, whose networks take "
                f"every image as it is, got {resize}; leave it out"
            )
        return resize if self.processor.resizes else "none"

    @torch.no_grad()
    def people(self, image: Tensor, boxes: Sequence[Box] | None, batch: int) -> Poses:
        """The joints of the people in an image: see `joints_of`."""
        assert isinstance(self.processor, KeypointProcessor)
        size = self.fixed or self.usual
        if size is None:
            raise UserError(
                f"{self.model.path}: expected the size of the crops in the description of a "
                "network for keypoints, got none; restore it from a copy"
            )

        def network(crops: Tensor) -> Tensor:
            with self._precision():
                return _finite(self.model(self._prepared(crops, size)))

        return joints_of(network, self.processor, size, image, boxes, batch)

    def fits_a_tile(self, count: int, image: Tensor) -> bool:
        """Whether so many images like this one have no more pixels than a tile."""
        height, width = self._size(image)
        return count * height * width <= self.pixels

    def _size(self, image: Tensor) -> tuple[int, int]:
        return size_for((image.shape[-2], image.shape[-1]), self.usual, self.resize)

    @torch.no_grad()  # results of the inference mode could not be changed in place
    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Results for images of one size."""
        size = self._size(images[0])
        rows, columns = (
            Axis(side, self.tiling, fixed, self.least)
            for side, fixed in zip(size, self.fixed or (None, None), strict=True)
        )
        try:
            return self._results(images, resized(torch.stack(list(images)), size), rows, columns)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"out of memory ({cause(error)}) with tiles of {_text((rows.tile, columns.tile))} "
                f"and {len(images)} images at once; use a smaller tile or batch"
            ) from error

    def _results(
        self, images: Sequence[Tensor], batch: Tensor, rows: Axis, columns: Axis
    ) -> list[Prediction]:
        """Of images, which were resized to a batch."""
        shape = (images[0].shape[-2], images[0].shape[-1])
        strips = self._strips(batch, rows, columns, shape)
        reduced = torch.cat([self.processor.reduce(strip).cpu() for strip in strips], -2)
        return [self.processor.result(*pair) for pair in zip(reduced, images, strict=True)]

    def _strips(
        self, images: Tensor, rows: Axis, columns: Axis, shape: tuple[int, int]
    ) -> Iterator[Tensor]:
        """The output at the size of the result, from top to bottom."""
        bands = output_bands(lambda piece: self._map(piece, rows, columns), images, rows, columns)
        first = next(bands)
        # outputs of the map for one pixel of the network's input
        density = [s / axis.tile for s, axis in zip(self._map_size, (rows, columns), strict=True)]
        if self.processor.full_size:
            height, width = (side * self.processor.scale for side in shape)
        else:
            height, width = (
                max(1, round(axis.side * each))
                for axis, each in zip((rows, columns), density, strict=True)
            )
        steps = rows.side * density[0] / height, columns.side * density[1] / width
        return resized_bands(itertools.chain([first], bands), steps, (height, width))

    def _map(self, piece: Tensor, rows: Axis, columns: Axis) -> Tensor:
        """Output for a piece of images, uint8, padded to a whole tile by its last pixels."""
        x = self._prepared(piece, (rows.tile, columns.tile))
        with self._precision():
            output = _finite(self.model.map(x))
        self._map_size = (output.shape[-2], output.shape[-1])
        return output

    def _prepared(self, piece: Tensor, size: tuple[int, int]) -> Tensor:
        """Input of the network for a piece of images, uint8, no smaller than a size."""
        x = self.model.preprocessing(piece.to(self.runtime.device))
        missing = max(size[1] - x.shape[-1], 0), max(size[0] - x.shape[-2], 0)
        if any(missing):
            x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return self.runtime.autocast() if self.autocast else contextlib.nullcontext()


class _DetectionRun(_Run):
    """The same of a detector, whose boxes are those of the whole image, or of large tiles."""

    processor: DetectionProcessor

    def __init__(self, model: Model, resize: Resize, tile: int | None, autocast: bool) -> None:
        super().__init__(model, resize, tile, autocast)
        side = tile or sys.maxsize
        overlap = max(side // 4 // STRIDE, 1) * STRIDE
        self.tiling = Tiling(side, blend=overlap, multiple=STRIDE)

    def _size(self, image: Tensor) -> tuple[int, int]:
        own = (image.shape[-2], image.shape[-1])
        shorter, longer = map(self.model.description.get, ("shorter_side", "longer_side"))
        if self.resize == "auto" and (shorter or longer):
            size = scaled_size(own, shorter, longer)
        else:
            size = size_for(own, self.usual, self.resize)
        if self.fixed is None:
            return size
        factor = min(1.0, *(most / side for most, side in zip(self.fixed, size, strict=True)))
        return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))

    def _results(
        self, images: Sequence[Tensor], batch: Tensor, rows: Axis, columns: Axis
    ) -> list[Prediction]:
        sizes = torch.tensor([batch.shape[-2:]] * len(images))
        tiles = itertools.product(range(len(rows.starts)), range(len(columns.starts)))
        found = [self._of_tile(batch, rows, columns, *tile) for tile in tiles]
        boxes = Boxes(*(torch.cat(each, 1) for each in zip(*found, strict=True)))
        settings = self.processor.settings
        kept = boxes.chosen(nms(*boxes, settings.nms_threshold, settings.limit))
        return list(self.processor.detections(kept, sizes, images))

    def _found(self, piece: Tensor) -> Boxes:
        """The boxes in a piece of images, uint8, in its pixels."""
        network, settings = self.model.network, self.processor.settings
        height, width = piece.shape[-2:]
        x = self._prepared(piece, self.fixed or (self.least, self.least))
        sizes = torch.tensor([[height, width]] * len(piece), device=x.device)
        if isinstance(network, Exported) and network.suppresses:
            return network.detect(x).clipped(sizes)
        with self._precision():
            output = _finite(self.model(x))
        padded = (x.shape[-2] + -x.shape[-2] % STRIDE, x.shape[-1] + -x.shape[-1] % STRIDE)
        return detections(output, padded, sizes, settings)

    def _of_tile(self, batch: Tensor, rows: Axis, columns: Axis, i: int, j: int) -> Boxes:
        """The boxes in a tile, in the pixels of the image, but for those that the tile's border
        cuts and a neighbour sees whole."""
        top, left = rows.starts[i], columns.starts[j]
        found = self._found(batch[..., top : top + rows.tile, left : left + columns.tile])
        shift = torch.tensor([left, top, left, top], device=found.boxes.device)
        boxes = found.boxes + shift
        cut = torch.zeros_like(found.labels, dtype=torch.bool)
        for axis, index, low, high in (
            (columns, j, boxes[..., 0], boxes[..., 2]),
            (rows, i, boxes[..., 1], boxes[..., 3]),
        ):
            start, tile = axis.starts[index], axis.tile
            if index > 0:
                before = axis.starts[index - 1] + tile
                cut |= (low < start + CUT) & (high < before - CUT)
            if index + 1 < len(axis.starts):
                after = axis.starts[index + 1]
                cut |= (high > start + tile - CUT) & (low > after + CUT)
        return Boxes(boxes, found.scores.masked_fill(cut, -1.0), found.labels)


def _finite(output: Tensor) -> Tensor:
    if not output.isfinite().all():
        raise NonFiniteLossError(
            "predict: expected finite outputs of the network, got NaN or infinity; train it "
            "again with a smaller learning rate, or predict without autocast"
        )
    return output


def _pair(value: object) -> tuple[int, int] | None:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else None


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"


def load(path: Path | str, device: str = "auto") -> Model:
    """A trained network.

    Args:
        path: a model.safetensors, the directory of a training, a run, whose last training counts,
            or a file of ``nasfast export``.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: there is none, or the file is damaged.
    """
    file = find_model(expanded(path))
    where = resolve_device(device)
    network: nn.Module
    if file.suffix in EXPORT_SUFFIXES:
        network, description = exported = load_exported(file, device)
        where = exported[0].place.device
    else:
        network, description = load_model(file)
    try:
        with about(file):
            model = Model(network, processor_of(description), description)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected the description of a network as nasfast train wrote it, got one "
            f"that cannot be read ({type(error).__name__}: {cause(error)}); restore it from a copy"
        ) from error
    model.path = file
    return model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def find_model(path: Path) -> Path:
    """The model file that a path means: itself, that of a training, or the last one of a run.

    Raises:
        UserError: there is none; the message says how to make one.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(
            f"{path}: expected a model.safetensors, a training or a run, got no such file or "
            "folder; give the path that nasfast train printed"
        )
    found = [path / MODEL_FILE, *path.glob(f"train-*/{MODEL_FILE}")]
    found = [file for file in found if file.is_file()]
    if found:
        return max(found, key=lambda file: file.stat().st_mtime)
    begun = [path, *sorted(path.glob("train-*"))]
    begun = [folder for folder in begun if (folder / "checkpoint.pt").is_file()]
    if begun:
        raise UserError(
            f"{path}: expected a finished training, got {begun[-1]}, which was stopped; "
            f"`nasfast train --resume {begun[-1]}` goes on with it"
        )
    raise UserError(
        f"{path}: expected a model.safetensors, a training or a run with one, got none; "
        f"`nasfast train {path}` makes it"
    )
