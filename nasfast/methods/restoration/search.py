"""From settings to a search for a restoration network."""

from __future__ import annotations

import dataclasses
import functools

import torch
from rich.console import Console

from nasfast.data import folder_of
from nasfast.data.checks import check_images
from nasfast.methods.base import warn
from nasfast.methods.restoration.sampled import sampled_search
from nasfast.methods.restoration.settings import SearchConfig
from nasfast.searches.bilevel import SupernetSearch
from nasfast.searches.sampling import SamplingSearch
from nasfast.tasks.restoration.patches import ImagePatches, patch_side
from nasfast.training.loop import Runtime
from nasfast.utils.cli import say
from nasfast.utils.interrupt import Interrupt


def build(
    config: SearchConfig, interrupt: Interrupt, console: Console
) -> tuple[SupernetSearch | SamplingSearch, SearchConfig]:
    """Open the images and prepare the search of the strategy."""
    workers = (
        config.worker_config(note=functools.partial(say, console))
        if config.samples
        else config.worker_config(1)
    )
    runtime = Runtime(torch.device(workers.devices[0]), interrupt.check)
    config.task.require_reduction(config.network.reduction)
    data = config.task.open(config.data, config.channels)
    given = config.task
    config = dataclasses.replace(config, task=given.of(data.train))
    warn(check_images(data, folder_of(config.data)), console)
    for part in (data.val, data.train):
        part.read_all()  # before a run is made: a file may be damaged
    halves = data.halves()
    say(
        console,
        f"task     {config.task.instead_of(given)}\n"
        f"data     {data.train.name}: {len(halves[0])} images for the weights, {len(halves[1])} "
        f"for the architecture, {len(data.val)} to score\n"
        f"device   {workers}, {runtime.precision}\n"
        f"space    {config.supernet.space.size():.2e} networks; strategy {config.strategy}",
    )
    config = fit_to_scale(config, console)
    if config.samples:
        return sampled_search(config, data, workers, runtime), config
    bilevel, reduction = config.bilevel, config.network.reduction
    crop = patch_side(bilevel.crop, reduction, data.train)
    weights, architecture = (
        ImagePatches(half, config.task, crop, crops=bilevel.crops) for half in halves
    )
    search = SupernetSearch(
        config.task,
        halves=(weights, architecture),
        val=data.val,
        supernet=config.supernet,
        network=config.network,
        bilevel=bilevel,
        strategy=config.strategy,
        temperature=config.temperature,
        runtime=runtime,
        seed=config.seed,
    )
    return search, config


def fit_to_scale(config: SearchConfig, console: Console) -> SearchConfig:
    """Patches that the task's scale divides."""
    task, bilevel, recipe = config.task, config.bilevel, config.recipe
    given = recipe.crop if config.samples else bilevel.crop
    fitted = task.fitting(given)
    if fitted != given:
        say(console, f"patches  {fitted} pixels instead of {given}: a multiple of {task.scale}")
    return dataclasses.replace(
        config,
        bilevel=dataclasses.replace(bilevel, crop=task.fitting(bilevel.crop)),
        recipe=dataclasses.replace(recipe, crop=task.fitting(recipe.crop)),
    )
