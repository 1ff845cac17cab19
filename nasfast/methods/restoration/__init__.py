"""Restoration networks by gradient: cells and widths (IR-NAS, CVPR 2020)."""

import dataclasses
from pathlib import Path

from nasfast.methods.base import Method, Source
from nasfast.methods.restoration.evaluate import evaluate, parse_evaluate
from nasfast.methods.restoration.search import SearchConfig, build, continued, parse
from nasfast.methods.restoration.train import TrainConfig, Trainer, parse_train, resolve
from nasfast.models.restorer import FORMAT
from nasfast.models.zoo import ZOO
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.tasks.restoration.base import RestorationTask
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.deraining import Deraining

_TASKS: dict[str, tuple[RestorationTask, int]] = {
    "irnas-denoise": (Denoising(), 1),
    "irnas-derain": (Deraining(), 3),
}
ARCHITECTURES = {
    name: Source(
        ZOO[name].genotype.to_json(),
        Path("runs") / name,
        {
            "network": dataclasses.asdict(ZOO[name].config),
            "task": task.describe(),
            "channels": channels,
        },
    )
    for name, (task, channels) in _TASKS.items()
}
"""The zoo, each with the task that it was searched for and its channels."""

RESTORATION = Method(
    name="restoration",
    search_config=SearchConfig,
    parse_search=parse,
    continued=continued,
    build=build,
    space=IRNASSpace().name,
    genotype=IRNASGenotype.from_json,
    zoo=ARCHITECTURES,
    train_config=TrainConfig,
    parse_train=parse_train,
    resolve=resolve,
    trainer=Trainer,
    format=FORMAT,
    parse_evaluate=parse_evaluate,
    evaluate=evaluate,
)
