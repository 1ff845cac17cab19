"""Anchor-free detectors: an encoder, a pyramid and a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from nasfast.encoders import Encoder, FeatureInfo
from nasfast.models.decoders import DenseDecoder, DenseNetwork
from nasfast.models.heads import GROUPS, FCOSHead
from nasfast.models.points import STRIDES
from nasfast.models.pyramids import FPN, Pyramid, SearchedFPN
from nasfast.spaces.nas_fcos import NASFCOSGenotype
from nasfast.utils.config import Bounded, Channels
from nasfast.utils.errors import UserError

EXTRA = 5
"""Rows of an output beside those of the classes: four distances, centre-ness."""


@dataclass(frozen=True)
class DetectorConfig(Bounded):
    """Size of a detector's pyramid and head, and what the head predicts."""

    width: Channels = 256
    """Channels of the pyramid, a multiple of 32."""
    head_width: Channels | None = None
    """Channels of the head: the width, or twice that for a searched pyramid, which is then widened
    without weights; default: the width."""
    cat: Literal["grouped", "full"] = "grouped"
    """1x1 convolution behind a concatenation: with a group a channel, as published, or over all."""
    centerness: Literal["cls", "reg"] = "cls"
    """Tower that centre-ness is read from: that of the classes, as published, or of the boxes."""
    normalized: bool = False
    """Predict distances in strides of the level, not in pixels."""
    faithful: bool = False
    """Compute what the published networks do though nothing reads it: the adapter of C2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % GROUPS:
            raise UserError(
                f"width: expected a multiple of {GROUPS}, the groups of the head's GroupNorm, got "
                f"{self.width}; change it"
            )
        if self.head_width not in (None, self.width, 2 * self.width):
            raise UserError(
                f"head_width: expected the width {self.width} or twice that, got "
                f"{self.head_width}; change it"
            )


class DetectorDecoder(DenseDecoder):
    """A pyramid and a head on the taps C2 to C5 of an encoder.

    Args:
        genotype: of both.
        feature_info: the taps.
        outputs: K + 5 for K classes.
        config: sizes.

    Attributes:
        fpn: the pyramid.
        head: the head.
        outputs: K + 5.

    Shapes: taps ``[N, C_i, H_i, W_i]`` to float32 ``[N, K + 5, P]``, see `FCOSHead`; there are no
    auxiliary outputs.
    """

    genotype: NASFCOSGenotype
    config: DetectorConfig

    def __init__(
        self,
        genotype: NASFCOSGenotype,
        feature_info: Sequence[FeatureInfo],
        outputs: int,
        config: DetectorConfig,
    ) -> None:
        super().__init__()
        self.genotype, self.config, self.outputs, self.with_aux = genotype, config, outputs, False
        widen = config.head_width == 2 * config.width
        if genotype.fpn is None and widen:
            raise UserError(
                f"head_width: expected the width {config.width} for the stock pyramid, which "
                f"cannot be widened, got {config.head_width}; leave it out"
            )
        self.fpn: Pyramid = (
            FPN(feature_info, config.width)
            if genotype.fpn is None
            else SearchedFPN(
                genotype,
                feature_info,
                config.width,
                config.cat,
                widen=widen,
                faithful=config.faithful,
            )
        )
        self.head = head_of(genotype, self.fpn.channels, outputs, config)

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.head(self.fpn(taps)), []


class HeadOnPyramid(DenseDecoder):
    """The head alone, on P3 to P7 of a `FrozenPyramid`."""

    genotype: NASFCOSGenotype
    config: DetectorConfig

    def __init__(self, genotype: NASFCOSGenotype, outputs: int, config: DetectorConfig) -> None:
        super().__init__()
        self.genotype, self.config, self.outputs, self.with_aux = genotype, config, outputs, False
        self.head = head_of(genotype, config.head_width or config.width, outputs, config)

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.head(taps), []


def head_of(
    genotype: NASFCOSGenotype, channels: int, outputs: int, config: DetectorConfig
) -> FCOSHead:
    """The head of a genotype on maps of so many channels."""
    classes = outputs - EXTRA
    return FCOSHead(genotype.head, channels, classes, config.centerness, config.normalized)


class FrozenPyramid(Encoder):
    """An encoder with a trained pyramid, as the encoder of the heads that are searched on it: its
    taps are P3 to P7."""

    name: ClassVar[str] = "pyramid"

    def __init__(self, encoder: Encoder, fpn: Pyramid) -> None:
        super().__init__()
        self.encoder, self.fpn = encoder, fpn
        self.feature_info = tuple(FeatureInfo("fpn", fpn.channels, stride) for stride in STRIDES)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels: list[Tensor] = self.fpn(self.encoder(images))
        return levels

    @property
    def label(self) -> str:
        return f"{self.encoder.label} with its pyramid"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "encoder": self.encoder.describe()}

    def load_strict(self, state: Mapping[str, Tensor], source: str) -> None:
        self.encoder.load_strict(state, source)

    def first(self) -> list[nn.Module]:
        return [self]


class Detector(DenseNetwork):
    """An encoder with a `DetectorDecoder`, or a `FrozenPyramid` with a `HeadOnPyramid`."""

    def __init__(self, encoder: Encoder, decoder: DetectorDecoder | HeadOnPyramid) -> None:
        super().__init__(encoder, decoder)


def build_detector(
    encoder: Encoder, genotype: NASFCOSGenotype, outputs: int, config: DetectorConfig
) -> Detector:
    """A detector on (not a copy of) an encoder with taps C2 to C5; ``outputs`` is K + 5."""
    return Detector(encoder, DetectorDecoder(genotype, encoder.feature_info, outputs, config))
