"""Settings of a search of template networks, its presets, and those of a full training."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro

from nasfast.evaluation.stages import Stage0Config, Stage1Config
from nasfast.methods.segmentation.decoders import Decoders
from nasfast.methods.segmentation.settings import DecoderSearchConfig
from nasfast.methods.segmentation.train import DecoderTrainConfig
from nasfast.models.build import TEMPLATE_ROWS, build_templates
from nasfast.models.templates import FULL_TEMPLATES, TemplateConfig
from nasfast.spaces.template_nas import TemplateNASSpace
from nasfast.strategies import PPOConfig

DESCRIPTION = """Search a segmentation network of at most about 0.3 M parameters: ``nasfast search
templates``.

``--data DIR`` takes CamVid, Cityscapes, PASCAL VOC, or a folder with images/, masks/ and
classes.txt; without it, generated street scenes. ``--max-params 0.3M`` and ``--max-macs 1.5G``
bound the candidates. ``--resume RUN [--budget N]`` continues a run. (Template-NAS, WACV 2020)
"""
TEMPLATES = Decoders("templates", TemplateNASSpace(), build_templates, TEMPLATE_ROWS)


@dataclasses.dataclass(frozen=True)
class SearchConfig(DecoderSearchConfig):
    """Settings of a search of template networks; a preset gives the defaults."""

    decoders: ClassVar[Decoders] = TEMPLATES

    method: Annotated[Literal["templates"], tyro.conf.Positional] = "templates"
    """What to search."""
    decoder: TemplateConfig = dataclasses.field(default_factory=TemplateConfig)
    """Size of the candidates' layers of templates."""


PRESETS = {
    "demo": SearchConfig(
        preset="demo",
        strategy="auto",
        batch=PPOConfig.short_budget().batch_size,
        budget=8,
        decoder=TemplateConfig(agg_size=32),
        stage0=Stage0Config(
            samples=384, crop=96, shorter_side=96, epochs=3, batch_size=16, lr=7e-3
        ),
        stage1=Stage1Config(crop=96, shorter_side=96, batch_size=16, polyak_decay=0.9),
        ppo=PPOConfig.short_budget(),
    ),
    "quick": SearchConfig(
        preset="quick",
        strategy="auto",
        batch=PPOConfig.short_budget().batch_size,
        budget=24,
        stage0=Stage0Config(
            samples=320, crop=160, shorter_side=240, epochs=4, batch_size=16, lr=7e-3
        ),
        stage1=Stage1Config(crop=224, shorter_side=260, batch_size=16, polyak_decay=0.9),
        ppo=PPOConfig.short_budget(),
    ),
    "paper": SearchConfig(
        preset="paper",
        batch=8,
        budget=2000,
        val_crop=512,
        resize_longer=1024,
        stage0=Stage0Config(
            samples=1000, crop=320, shorter_side=321, epochs=5, batch_size=32, lr=7e-3, aux_weight=0
        ),
        stage1=Stage1Config(
            epochs=5,
            crop=321,
            shorter_side=321,
            batch_size=32,
            encoder_lr=5e-4,
            encoder_optimizer="adam",
            decoder_lr=2e-3,
            aux_weight=0,
            gate_epochs=True,
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig(DecoderTrainConfig):
    """Settings of a full training of a template network."""

    decoders: ClassVar[Decoders] = TEMPLATES

    decoder: TemplateConfig = FULL_TEMPLATES
    """Size of the layers of templates; the default is that of the published final networks."""
