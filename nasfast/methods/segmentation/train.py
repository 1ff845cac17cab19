"""Full training of a segmentation network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from nasfast.cache import tensors_fingerprint
from nasfast.data import TrainTransform, ValTransform, shorter_side
from nasfast.data.base import Samples
from nasfast.encoders import load_encoder
from nasfast.methods.base import Architecture
from nasfast.methods.dense import DenseTrainConfig, DenseTraining, located
from nasfast.methods.segmentation.crops import enlarging
from nasfast.methods.segmentation.decoders import FAST_NAS, Decoders
from nasfast.methods.segmentation.tasks import BINDINGS, Reading, TaskName, binding_of
from nasfast.models.decoders import FULL_DECODER, DecoderConfig, EncoderDecoder
from nasfast.spaces.base import Genotype
from nasfast.tasks.depth import DepthSettings
from nasfast.training.loop import Runtime
from nasfast.utils.config import Bound, Pixels
from nasfast.utils.files import data_path


@dataclasses.dataclass(frozen=True)
class DecoderTrainConfig(DenseTrainConfig):
    """Settings of every full training of a segmentation network, whatever its decoder."""

    decoders: ClassVar[Decoders]
    """What the network is one of."""

    task: TaskName | None = None
    """What the network is for; default: as in the search, else segmentation."""
    mask_values: str | None = None
    """Values of the classes in the masks: 0,255; default: the search's."""
    resize_longer: Pixels | None = None
    """Images whose longer side has more pixels are reduced to it, to train and to score on;
    default: the search's."""
    class_balance: Annotated[float, Bound(0, 2)] = 0.3
    """The loss weighs class k by its frequency to the power of minus this; 0 weighs all alike."""
    depth: DepthSettings = dataclasses.field(default_factory=DepthSettings)
    """Reading and loss of --task depth; default: the search's."""
    turn: Annotated[float, Bound(0, 180)] = 40.0
    """Greatest angle by which crops of people are turned, in degrees, for --task keypoints."""
    decoder: Any = None
    """Size of the decoder; each method has a type of its own."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(DecoderTrainConfig):
    """Settings of a full training of a network with cells."""

    decoders: ClassVar[Decoders] = FAST_NAS

    decoder: DecoderConfig = FULL_DECODER
    """Size of the decoder; the default is that of the published final networks."""


C = TypeVar("C", bound=DecoderTrainConfig)


FIRST = (
    "source",
    "rank",
    "data",
    "out",
    "encoder_weights",
    "epochs",
    "batch_size",
    "crop",
    "device",
    "seed",
)
"""What ``--help`` describes."""


def resolve(config: C, architecture: Architecture) -> C:
    """Fill in data, task, how data is read, and encoder of the search; what another task has no use
    for stays out."""
    search = architecture.search
    resolved: C = located(config, search.get("encoder_weights"))
    task = config.task or search.get("task", "segmentation")
    search = {k: v for k, v in search.items() if k not in BINDINGS[task].foreign}
    before = dict(search.get("depth", {}))
    if config.data is not None and data_path(config.data) != search.get("data"):
        before.pop("scale", None)  # of other files
    return dataclasses.replace(
        resolved,
        data=config.data or search.get("data", "synthetic"),
        task=task,
        depth=config.depth.over(before),
        mask_values=config.mask_values or search.get("mask_values"),
        resize_longer=config.resize_longer or search.get("resize_longer"),
    )


class DecoderTraining(DenseTraining):
    """The full training of a network with a decoder, for any of its tasks."""

    settings: DecoderTrainConfig

    def __init__(
        self, config: DecoderTrainConfig, genotype: Genotype, out: Path, runtime: Runtime
    ) -> None:
        assert config.data is not None
        self.genotype = genotype
        self.binding = binding_of(config)
        self.opened = self.binding.open(Reading.of(config))
        splits, train = self.opened.splits, self.opened.splits.train
        crops = self.binding.own_crops(config, train) or self._cut(config, train)
        super().__init__(
            crops[0],
            self.binding.training(self.opened, config, runtime),
            train,
            splits.val,
            crops[1:],
            out,
            runtime,
        )

    _enlarging: Sequence[str] = ()

    def _cut(self, config: DecoderTrainConfig, train: Samples) -> tuple[Any, Any, Any]:
        """As `Binding.own_crops`, of crops that the images can fill."""
        # larger would enlarge every image, where validation takes them as they are
        found = [
            config.crop and enlarging("--crop", config.crop, train),
            config.crop_width and enlarging("--crop-width", config.crop_width, train, "width"),
        ]
        self._enlarging = [text for text in found if text]
        crop = config.crop or min(288, shorter_side(train))
        sides = (crop, config.crop_width or crop)
        transform = TrainTransform(sides, crop, config.scales, jitter=config.jitter)
        return dataclasses.replace(config, crop=crop), transform, ValTransform(None)

    def network(self) -> EncoderDecoder:
        settings = self.settings
        encoder = load_encoder(settings.encoder_weights, settings.decoders.rows)
        self._encoder = tensors_fingerprint(encoder.state_dict())
        build, outputs = settings.decoders.build, self.task.outputs
        model = build(encoder, self.genotype, outputs, settings.decoder)
        self.task.begin(model)
        model.decoder.with_aux = settings.aux_weight > 0
        return model

    def inputs(self, search: Mapping[str, Any]) -> dict[str, str]:
        config, found = self.settings, {}
        reading = Reading.of(config, seed=search["seed"])
        before = {"depth": {}, **search}
        same = (config.task or "segmentation") == search.get("task", "segmentation") and all(
            getattr(config, name) == search.get(name)
            for name in ("data", "mask_values", "resize_longer")
        )
        if same and reading.depth == DepthSettings().over(before["depth"]):
            learned, held_out = self.binding.halves(self.opened.splits.train, search["seed"])
            found["training data"] = learned.fingerprint()
            found["validation data"] = held_out.fingerprint()
        if str(config.encoder_weights) == str(search.get("encoder_weights")):
            found["encoder"] = self._encoder
        return found

    @property
    def summary(self) -> str:
        return "\n".join([super().summary, *(f"warning: {text}" for text in self._enlarging)])

    def measured(self, scores: Any) -> dict[str, Any]:
        return {"genotype": self.genotype.to_json(), **self.binding.measured(self.opened, scores)}

    def described(self, scores: Any) -> dict[str, Any]:
        own = self.binding.described(self.opened, scores, self.settings)
        return {**own, "method": self.settings.decoders.method}

    def text(self, scores: Any, split: str) -> str:
        return self.binding.text(self.opened, scores, split)
