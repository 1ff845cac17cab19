"""What the methods for segmentation networks differ in: the decoders that they search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nasfast.encoders import Encoder
from nasfast.models.build import build_segmenter
from nasfast.models.decoders import EncoderDecoder
from nasfast.spaces.base import Space
from nasfast.spaces.fast_nas import FastNASSpace


@dataclass(frozen=True)
class Decoders:
    """A space of decoders on the taps of an encoder."""

    method: str
    """Name of the search method."""
    space: Space[Any]
    build: Callable[[Encoder, Any, int, Any], EncoderDecoder]
    """A network of encoder, genotype, outputs and the decoder's configuration."""
    rows: int = 7
    """Rows of MobileNet-v2 that the encoder has."""


FAST_NAS = Decoders("segmentation", FastNASSpace(), build_segmenter)
