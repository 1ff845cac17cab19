"""Small networks of the four spaces, as they are deployed."""

import functools
import random

import torch

from nasfast.encoders import MobileNetV2
from nasfast.inference.model import Model
from nasfast.models.build import build_detector, build_restorer, build_segmenter, build_templates
from nasfast.models.decoders import DecoderConfig
from nasfast.models.detector import DetectorConfig
from nasfast.models.restorer import RestorerConfig
from nasfast.models.templates import TemplateConfig
from nasfast.spaces import FastNASSpace, IRNASSpace, NASFCOSSpace, TemplateNASSpace
from nasfast.tasks.registry import processor_of

_IR_NAS = IRNASSpace(layers=2, nodes=3)


def _restorer(genotype, **config):
    scale = 2 if config else 1
    return build_restorer(genotype, RestorerConfig(4, 6, 5, 3, **config), 3, scale)


SPACES = {
    "fast_nas": (
        FastNASSpace(),
        lambda g: build_segmenter(MobileNetV2(0.1), g, 2, DecoderConfig(8)),
        {"classes": ["road", "sky"]},
    ),
    "template_nas": (
        TemplateNASSpace(),
        lambda g: build_templates(MobileNetV2(0.1, rows=3), g, 2, TemplateConfig(8)),
        {"classes": ["road", "sky"]},
    ),
    "ir_nas": (_IR_NAS, _restorer, {"task": {"task": "denoising"}, "channels": 3}),
    "super_resolution": (
        _IR_NAS,
        functools.partial(_restorer, residual=True),
        {"task": {"task": "super-resolution"}, "channels": 3},
    ),
    "nas_fcos": (
        NASFCOSSpace("joint"),
        lambda g: build_detector(MobileNetV2(0.1), g, 7, DetectorConfig(32, normalized=True)),
        {"task": "detection", "classes": ["car", "dog"]},
    ),
}
IMAGE = (1, 3, 64, 96)


def deployed(name, genotype):
    """A network with initial weights."""
    _, build, description = SPACES[name]
    description = description | {"genotype": genotype.to_json()}
    return Model(build(genotype), processor_of(description), description)


def samples(name, count, device="meta"):
    """Networks of a space."""
    rng = random.Random(0)
    space, *_ = SPACES[name]
    with torch.device(device):
        return [deployed(name, space.sample(rng)) for _ in range(count)]
