"""Decoders of compact segmentation networks (Fast NAS, CVPR 2019)."""

import tyro

from nasfast.methods.base import EvaluateConfig, Method
from nasfast.methods.segmentation.evaluate import evaluate
from nasfast.methods.segmentation.search import SearchConfig, build, continued, parse
from nasfast.methods.segmentation.train import TrainConfig, Trainer, resolve
from nasfast.models.segmenter import FORMAT
from nasfast.spaces.fast_nas import FastNASSpace

SEGMENTATION = Method(
    name="segmentation",
    search_config=SearchConfig,
    parse_search=parse,
    continued=continued,
    build=build,
    space=FastNASSpace().name,
    genotype=FastNASSpace().from_json,
    zoo={},
    train_config=TrainConfig,
    parse_train=lambda argv, found, description: tyro.cli(
        TrainConfig, args=argv, description=description, prog="nasfast.train"
    ),
    resolve=resolve,
    trainer=Trainer,
    format=FORMAT,
    parse_evaluate=lambda argv, description: tyro.cli(
        EvaluateConfig, args=argv, description=description, prog="nasfast.evaluate"
    ),
    evaluate=evaluate,
)
