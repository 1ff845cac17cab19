"""What segmentation, depth, keypoints and detection share: a dense-prediction task."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.data import normalize
from nasfast.models.decoders import DenseNetwork
from nasfast.models.layers import resize
from nasfast.tasks.processor import STRIDE, Prediction, Processor
from nasfast.training.loop import Runtime, in_order
from nasfast.training.pictures import SAMPLES, png, spread, strip, thumbnail

T = TypeVar("T")

Targets = dict[str, Tensor]
"""What a batch is to be predicted as, by name: the first axis is the batch."""


class Scores(Protocol):
    """What a trained network is worth."""

    @property
    def reward(self) -> float:
        """The one number that the search maximises."""

    def as_dict(self) -> dict[str, float]:
        """Metrics by name."""


S = TypeVar("S", bound=Scores)

CLASSES = "classes.json"
"""File beside the pictures: a list of `ClassScore`."""


@dataclass(frozen=True)
class ClassScore:
    """What a network is worth on one class."""

    name: str
    metric: str
    score: float | None
    """None where the class is absent or left out."""
    color: tuple[int, int, int]
    """That it is drawn in."""


class Frames(Protocol):
    """A part of a dataset."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that determines the samples; equal in every process."""


class DenseTask(ABC, Generic[S]):
    """What an encoder with a decoder is trained on and judged by.

    A network gives a map ``[N, outputs, h, w]``, and in training one such map for each auxiliary
    head; what they mean is the task's. Search and training know a task by this interface alone.
    """

    name: ClassVar[str]
    """On the command line and in model files."""
    samples: ClassVar[str] = "images"
    """What a part of the data has."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Channels of the network's output."""

    @property
    @abstractmethod
    def search_train(self) -> Frames:
        """Samples that candidates learn from."""

    @property
    @abstractmethod
    def search_val(self) -> Frames:
        """Samples that candidates are scored on."""

    def begin(self, network: DenseNetwork) -> None:
        """Change the initial weights of a network, where the task knows better ones."""

    @abstractmethod
    def load_batch(
        self,
        frames: Frames,
        indices: Sequence[int],
        transform: Any,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Targets]:
        """Transformed images, uint8 ``[N, 3, H, W]``, and their targets, on the CPU.

        Args:
            frames: one of this task's own parts.
            indices: of the samples.
            transform: crops, and in training augments, image and target alike.
            generator: what the transform draws from.
        """

    @abstractmethod
    def resize_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """The targets for a network that is trained at the resolution ``size`` = (h, w)."""

    @abstractmethod
    def pad_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """The targets with room on the right and at the bottom, up to ``size`` = (H, W), which
        neither criterion nor scores count."""

    def uniform_targets(self, frames: Frames, targets: Targets) -> Targets:
        """The padded targets of some of the frames in tensors whose size, but for the first axis,
        is the same for all of them, as a feature cache keeps them."""
        return targets

    @property
    def assignment(self) -> str:
        """Settings that `resize_targets` depends on, for the key of a feature cache."""
        return ""

    def load_padded(
        self,
        frames: Frames,
        indices: Sequence[int],
        transform: Any,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Targets]:
        """As `load_batch`, padded as networks need it: see `pad_images`."""
        images, targets = self.load_batch(frames, indices, transform, generator)
        images = pad_images(images)
        return images, self.pad_targets(targets, (images.shape[-2], images.shape[-1]))

    @abstractmethod
    def criterion(self, output: Tensor, targets: Targets) -> Tensor:
        """Loss of an output ``[N, outputs, h, w]`` of any resolution, a float32 scalar, or ``[k]``,
        the terms of a sum that are means over different things."""

    def weight(self, targets: Targets) -> Tensor:
        """What `criterion` is a mean over, in the same form: the loss of a batch is the mean of
        those of its parts, which weigh so much. By default the number of samples."""
        (target, *_) = targets.values()
        return torch.full((), len(target), dtype=torch.float32, device=target.device)

    @abstractmethod
    def score(
        self, batches: Iterable[tuple[T, Targets]], predict: Callable[[T], Tensor], runtime: Runtime
    ) -> S:
        """Scores at the targets' own resolution.

        Args:
            batches: pairs of an input of ``predict`` and targets.
            predict: gives ``[N, outputs, h, w]``.
            runtime: device and precision.

        Raises:
            NonFiniteLossError: an output is NaN or infinite; it could look like a score.
        """

    @property
    @abstractmethod
    def processor(self) -> Processor:
        """How a trained network of this task is used."""

    @abstractmethod
    def truth(self, targets: Targets, image: Tensor) -> Prediction:
        """What a network should have predicted, to be drawn beside what it did.

        Args:
            targets: of one sample, at the size of its image, without the batch's axis.
            image: uint8 ``[3, H, W]``.
        """

    def class_scores(self, scores: S) -> list[ClassScore]:
        """Scores of each class; none where the task has no classes."""
        return []

    @torch.inference_mode()
    def show(
        self, model: nn.Module, scores: S, frames: Frames, transform: Any, runtime: Runtime
    ) -> dict[str, bytes]:
        """Files by name, for people to look at: some samples with the truth and with what a network
        in evaluation mode predicts, and the scores of the classes."""
        files = {}
        for index in spread(len(frames), SAMPLES):
            panels = self.panels(model, frames, index, transform, runtime)
            shown = strip({name: thumbnail(panel) for name, panel in panels.items()})
            files[f"image-{index:04}.png"] = png(shown, palette=True)
        if classes := self.class_scores(scores):
            files[CLASSES] = json.dumps([asdict(each) for each in classes]).encode()
        return files

    def panels(
        self, model: nn.Module, frames: Frames, index: int, transform: Any, runtime: Runtime
    ) -> dict[str, Tensor]:
        """Pictures of a sample by their captions: the image, the truth, the prediction."""
        images, targets = self.load_batch(frames, [index], transform)
        padded = pad_images(images)
        with runtime.autocast():
            output = model(prepare_images(padded, runtime))[0]
        output, whole = output.float(), (padded.shape[-2], padded.shape[-1])
        if self.processor.full_size:
            output = resize(output, whole)
        rows, columns = (  # of the output that are the image's
            max(1, round(cells * side / padded_side))
            for cells, side, padded_side in zip(
                output.shape[-2:], images.shape[-2:], whole, strict=True
            )
        )
        output = output[..., :rows, :columns]
        expected = {name: target[0] for name, target in targets.items()}
        return {
            "image": images[0],
            "truth": self.truth(expected, images[0]).draw(),
            "prediction": self.processor.prediction(output[0], images[0]).draw(),
        }

    def loss(
        self,
        output: Tensor,
        aux: Sequence[Tensor],
        targets: Targets,
        *,
        aux_weight: float,
        shares: Tensor | None = None,
        teacher: Tensor | None = None,
        kd_weight: float = 0.0,
    ) -> Tensor:
        """The criterion + ``aux_weight`` * the auxiliary heads' + ``kd_weight`` * distillation.

        Distillation is the mean squared error between output and the teacher's output, without
        softmax or temperature (section 3.3 of Fast NAS). ``shares`` are those of a part of a batch,
        in the form of `weight`, by which the criterion counts in the loss of the whole.
        """
        student = output
        if teacher is not None:
            size = (teacher.shape[-2], teacher.shape[-1])
            student = resize(output.float(), size)
            if any(target.shape[-2:] == size for target in targets.values()):
                output = student  # resized once for both
        loss = self.criterion(output, targets)
        for head in aux:
            loss = loss + aux_weight * self.criterion(head, targets)
        loss = (loss if shares is None else shares * loss).sum()
        if teacher is not None:
            loss = loss + kd_weight * F.mse_loss(student, teacher.float())
        return loss

    def batches(
        self,
        frames: Frames,
        indices: Iterable[Tensor],
        transform: Any,
        runtime: Runtime,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Prepared images ``[N, 3, h, w]`` and targets on the device, batch by batch."""
        for chunk in indices:
            images, targets = self.load_padded(frames, chunk.tolist(), transform, generator)
            moved = {name: runtime.move(target) for name, target in targets.items()}
            yield prepare_images(images, runtime), moved

    def score_images(
        self,
        model: nn.Module,
        frames: Frames,
        transform: Any,
        runtime: Runtime,
        batch_size: int = 8,
    ) -> S:
        """Scores of a network, put in evaluation mode, on a part of the data."""
        model.eval()
        batches = self.batches(frames, in_order(len(frames), batch_size), transform, runtime)
        return self.score(batches, lambda images: model(images)[0], runtime)


def enlarged(maps: Tensor, size: tuple[int, int], value: float = 0) -> Tensor:
    """Maps ``[.., h, w]`` with a value on the right and at the bottom, up to ``size`` = (H, W)."""
    return F.pad(maps, (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2]), value=value)


def pad_images(images: Tensor) -> Tensor:
    """Images ``[N, c, H, W]`` whose last row and column are repeated up to multiples of `STRIDE`.

    The last cell of a coarse map would else reach beyond the image. Where maps are resized to
    the image it would seem to lie inside, and all cells would be shifted to the left and the top.
    """
    rows, columns = (torch.arange(side + -side % STRIDE) for side in images.shape[-2:])
    height, width = images.shape[-2:]
    if (len(rows), len(columns)) == (height, width):
        return images
    return images[..., rows.clamp(max=height - 1), :][..., columns.clamp(max=width - 1)]


def prepare_images(images: Tensor, runtime: Runtime) -> Tensor:
    """uint8 ``[N, 3, H, W]`` to normalised channels-last float images on the device."""
    images = normalize(runtime.move(images))
    return images.contiguous(memory_format=torch.channels_last)
