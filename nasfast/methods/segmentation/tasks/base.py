"""What the methods for decoders have to know of a dense task, in one place."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rich.table import Table
from torch import Tensor

from nasfast.data import TrainTransform, ValTransform
from nasfast.data.base import Division, halves
from nasfast.data.checks import Findings
from nasfast.inference.model import Model
from nasfast.models.layers import resize
from nasfast.tasks.base import DenseTask
from nasfast.tasks.depth import DepthSettings
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

S = TypeVar("S")
C = TypeVar("C")


@dataclass(frozen=True)
class Reading:
    """How data is read: settings of searches, trainings, evaluations and checks, by their names."""

    data: str
    seed: int = 0
    mask_values: str | None = None
    resize_longer: int | None = None
    omit: tuple[int, ...] = ()
    depth: DepthSettings = field(default_factory=DepthSettings)
    keep: bool = True
    """Whether decoded images stay in memory."""

    @classmethod
    def of(cls, settings: Any, **changes: Any) -> Reading:
        """From the settings of a command, which need not have all."""
        names = {field.name for field in dataclasses.fields(cls)} - changes.keys()
        given = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
        given["depth"] = DepthSettings().over(given.get("depth", DepthSettings()))
        return cls(**{**given, **changes})


@dataclass(frozen=True)
class Opened(Generic[S]):
    """Data, and the task on it."""

    splits: Division[Any]
    task: DenseTask[Any]
    about: str
    """What is asked, as the end of a list: "8 classes"."""


class Binding(ABC, Generic[S]):
    """One dense task as searches, trainings, evaluations and reports of decoders need it.

    A new task gets a subclass in a module of its own, a line in ``BINDINGS`` and its name in
    ``TaskName``.
    """

    metric: ClassVar[tuple[str, str]]
    """Name in records and metrics of the one that tables show, and its label."""
    terms: ClassVar[Mapping[str, str]]
    """What "reward" and the metrics mean."""
    views: ClassVar[str]
    """How an evaluation joins several views of an image: "softmax summed"."""
    foreign: ClassVar[tuple[str, ...]]
    """Settings of other tasks, or groups of them."""

    def refuse_foreign(self, settings: Any, where: str, remedy: str) -> None:
        """Raise UserError for settings that mean nothing for this task, which is called as in
        ``where``."""
        for each in dataclasses.fields(settings):
            value, default = getattr(settings, each.name), each.default
            if each.default_factory is not dataclasses.MISSING:
                default = each.default_factory()
            if each.name in self.foreign and _shown(value) != _shown(default):
                flag = each.name.replace("_", "-")
                raise UserError(
                    f"{flag}: expected none with {where}, which has no use for it, got "
                    f"{_shown(value)}; {remedy}"
                )

    @abstractmethod
    def open(self, reading: Reading) -> Opened[S]:
        """Open the data and divide it."""

    @abstractmethod
    def check(self, opened: Opened[S], reading: Reading, root: Path | None, test: bool) -> Findings:
        """What about the data would mislead; ``test`` as for `nasfast.data.checks`."""

    def training(self, opened: Opened[S], settings: Any, runtime: Runtime) -> DenseTask[Any]:
        """The task as a full training has it."""
        return opened.task

    def halves(self, train: Any, seed: int) -> tuple[Any, Any]:
        """What candidates of a search learn from, and what they are scored on."""
        learned: Any
        held_out: Any
        learned, held_out = halves(train, seed=seed)
        return learned, held_out

    def train_transform(self, crop: int, shorter_side: int) -> Any:
        """Of the samples that candidates learn from."""
        return TrainTransform(crop, shorter_side)

    def val_transform(self, crop: int | None) -> Any:
        """Of the samples that candidates are scored on; None: whole images."""
        return ValTransform(crop)

    def fitted(self, settings: C) -> C | None:
        """The settings of a search whose crops do not depend on the sizes of images; None where
        they do."""
        return None

    def own_crops(self, settings: Any, train: Any) -> tuple[Any, Any, Any] | None:
        """Settings of a training, and what makes the samples that it learns from and is scored on,
        where crops do not depend on the sizes of images; None where they do."""
        return None

    def as_scored(self, model: Model) -> Any:
        """What makes the samples that a network is judged on."""
        return ValTransform(None)

    @abstractmethod
    def measured(self, opened: Opened[S], scores: S) -> dict[str, Any]:
        """What metrics.json says beside the scores by name."""

    @abstractmethod
    def described(self, opened: Opened[S], scores: S, settings: Any) -> dict[str, Any]:
        """What a model file says: how data was read, how the output is understood, and a score."""

    @abstractmethod
    def text(self, opened: Opened[S], scores: S, split: str) -> str:
        """What a person reads of a training's result."""

    @abstractmethod
    def of_model(self, model: Model, reading: Reading) -> Reading:
        """The settings, and where they are open those of the network's training."""

    @abstractmethod
    def require_fit(self, model: Model, opened: Opened[S], part: Any, data: str) -> None:
        """Raise UserError where the data asks something else than the network was trained for."""

    def viewed(
        self, model: Callable[[Tensor], Tensor], factors: Sequence[float], flip: bool
    ) -> Callable[[Tensor], Tensor]:
        """A network that sees images ``[N, 3, H, W]`` at several scales and, with ``flip``,
        mirrored too: the sum of what `view` makes of its outputs."""
        return functools.partial(summed, model, self.view, factors, flip)

    def view(self, output: Tensor, factor: float, views: int) -> Tensor:
        """An output ``[N, outputs, H, W]`` of an image that was resized by a factor, so that the
        sum over all views is an output. By default the sum is their mean."""
        return output / views

    @abstractmethod
    def better(self, scores: S) -> dict[str, float]:
        """Metrics of which more is better, the first to be named first."""

    @abstractmethod
    def evaluated(self, part: Any, scores: S, reading: Reading) -> dict[str, Any]:
        """What evaluation.json says of the scores, and of what decided them."""

    @abstractmethod
    def tabulate(self, table: Table, part: Any, scores: S) -> None:
        """The same as rows of a measure and a value."""


def summed(
    model: Callable[[Tensor], Tensor],
    view_of: Callable[[Tensor, float, int], Tensor],
    factors: Sequence[float],
    flip: bool,
    images: Tensor,
) -> Tensor:
    """What ``view_of`` makes of the outputs for images ``[N, 3, H, W]``, see `Binding.view`, summed
    over scales and, with ``flip``, mirror images."""
    height, width = images.shape[-2:]
    total, views = images.new_zeros(()), len(factors) * (1 + flip)
    for factor in factors:
        scaled = resize(images, (max(1, round(factor * height)), max(1, round(factor * width))))
        for view in (scaled, scaled.flip(-1)) if flip else (scaled,):
            found = model(view)
            found = found if view is scaled else found.flip(-1)
            total = total + resize(view_of(found.float(), factor, views), (height, width))
    return total


def _shown(value: object) -> str:
    """A setting, or those of a group that are given."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = dataclasses.asdict(value).items()
        return ", ".join(f"{name} {each}" for name, each in given if each is not None)
    return str(value)
