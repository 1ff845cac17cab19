"""Networks from genotypes, and from the descriptions in model files.

A space adds the function that builds its networks, and a new kind of network a line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import nn

from nasfast.encoders import Encoder, FeatureInfo, MobileNetV2, encoder_of
from nasfast.models.decoders import Decoder, DecoderConfig, EncoderDecoder
from nasfast.models.detector import EXTRA, Detector, DetectorConfig, build_detector
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.models.templates import TemplateConfig, TemplateDecoder, TemplateNetwork
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.spaces.nas_fcos import NASFCOSSpace
from nasfast.spaces.template_nas import TemplateNASGenotype, TemplateNASSpace


def build_decoder(
    genotype: FastNASGenotype,
    feature_info: Sequence[FeatureInfo],
    outputs: int,
    config: DecoderConfig,
) -> Decoder:
    """A decoder on the taps of an encoder, for maps of ``outputs`` channels."""
    return Decoder(genotype, feature_info, outputs, config)


def build_segmenter(
    encoder: Encoder, genotype: FastNASGenotype, outputs: int, config: DecoderConfig
) -> EncoderDecoder:
    """A network on (not a copy of) an encoder."""
    return EncoderDecoder(encoder, build_decoder(genotype, encoder.feature_info, outputs, config))


def build_templates(
    encoder: Encoder, genotype: TemplateNASGenotype, outputs: int, config: TemplateConfig
) -> TemplateNetwork:
    """A network on (not a copy of) an encoder of TEMPLATE_ROWS rows."""
    decoder = TemplateDecoder(genotype, encoder.feature_info, outputs, config)
    return TemplateNetwork(encoder, decoder)


def build_restorer(
    genotype: IRNASGenotype, config: RestorerConfig, channels: int, scale: int = 1
) -> Restorer:
    """A network for images of ``channels`` channels, which it enlarges ``scale`` times."""
    return Restorer(genotype, config, channels, scale)


class Family(NamedTuple):
    """One kind of network in model files."""

    network: type[nn.Module]
    space: str
    """Value of "space" in its genotypes' JSON form."""
    configs: Mapping[str, type[Any]]
    """Configurations in its descriptions, by key."""
    describe: Callable[[Any], dict[str, Any]]
    """What `build` needs to build a network again, as plain JSON."""
    build: Callable[[Mapping[str, Any]], nn.Module]
    """The network of a description whose configurations have been read."""


def _describe_dense(model: EncoderDecoder) -> dict[str, Any]:
    encoder, decoder = model.encoder, model.decoder
    return {
        "genotype": decoder.genotype.to_json(),
        "decoder": asdict(decoder.config),
        "outputs": decoder.conv_clf.out_channels,
        "encoder": encoder.describe(),
    }


def _describe_detector(model: Detector) -> dict[str, Any]:
    decoder = model.decoder
    return {
        "genotype": decoder.genotype.to_json(),
        "decoder": asdict(decoder.config),
        "outputs": decoder.outputs,
        "encoder": model.encoder.describe(),
    }


def _read_detector(description: Mapping[str, Any]) -> Detector:
    genotype = NASFCOSSpace().from_json(description["genotype"])
    outputs = description["outputs"]
    if type(outputs) is not int or outputs <= EXTRA:
        raise ValueError(f"outputs: expected an integer above {EXTRA}, got {outputs!r}")
    encoder = encoder_of(description["encoder"])
    return build_detector(encoder, genotype, outputs, description["decoder"])


def _mobilenet(description: Mapping[str, Any], **rows: int) -> MobileNetV2:
    encoder = encoder_of(description["encoder"], **rows)
    if not isinstance(encoder, MobileNetV2):
        raise ValueError(f"encoder: expected {MobileNetV2.name}, got {encoder.name!r}")
    return encoder


def _read_segmenter(description: Mapping[str, Any]) -> EncoderDecoder:
    # version 1 has the classes alone
    outputs = description.get("outputs") or len(description["classes"])
    genotype = FastNASSpace().from_json(description["genotype"])
    return build_segmenter(
        encoder_of(description["encoder"]), genotype, outputs, description["decoder"]
    )


def _read_templates(description: Mapping[str, Any]) -> TemplateNetwork:
    genotype = TemplateNASSpace().from_json(description["genotype"])
    encoder = _mobilenet(description, rows=TEMPLATE_ROWS)
    return build_templates(encoder, genotype, description["outputs"], description["decoder"])


def _describe_restorer(model: Restorer) -> dict[str, Any]:
    return {
        "genotype": model.genotype.to_json(),
        "restorer": asdict(model.config),
        "channels": model.channels,
        "scale": model.scale,
    }


def _read_restorer(description: Mapping[str, Any]) -> Restorer:
    genotype = IRNASGenotype.from_json(description["genotype"])
    channels, scale = description["channels"], description["scale"]
    for name in ("channels", "scale"):
        if type(description[name]) is not int or description[name] < 1:
            raise ValueError(f"{name}: expected an integer from 1, got {description[name]!r}")
    return build_restorer(genotype, description["restorer"], channels, scale)


TEMPLATE_ROWS = 3
"""Of MobileNet-v2 below the layers of templates."""
SEGMENTER = "nasfast.segmenter"
TEMPLATES = "nasfast.templates"
RESTORER = "nasfast.restorer"
DETECTOR = "nasfast.detector"
FAMILIES = {
    SEGMENTER: Family(
        EncoderDecoder,
        FastNASSpace().name,
        {"decoder": DecoderConfig},
        _describe_dense,
        _read_segmenter,
    ),
    TEMPLATES: Family(
        TemplateNetwork,
        TemplateNASSpace().name,
        {"decoder": TemplateConfig},
        _describe_dense,
        _read_templates,
    ),
    RESTORER: Family(
        Restorer,
        IRNASSpace().name,
        {"restorer": RestorerConfig},
        _describe_restorer,
        _read_restorer,
    ),
    DETECTOR: Family(
        Detector,
        NASFCOSSpace().name,
        {"decoder": DetectorConfig},
        _describe_detector,
        _read_detector,
    ),
}
"""By the key of the description in a file's metadata."""


def family_of(network: nn.Module) -> tuple[str, Family]:
    """Key and family of a network."""
    return next(item for item in FAMILIES.items() if type(network) is item[1].network)
