"""Restored images side by side with what they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nasfast.tasks.restoration import RestorationTask
from nasfast.tasks.restoration.pictures import file_stem
from nasfast.tasks.restoration.scoring import Scores
from nasfast.training.pictures import png, strip
from nasfast.utils.files import atomic_write


def write_strips(folder: Path, task: RestorationTask, scores: Mapping[str, Scores]) -> None:
    """One PNG for each image that was kept: clean, degraded, the last baseline, the network.

    `scores` holds the network last. Nothing is written where no image was kept.
    """
    names = list(scores)
    chosen = names[-2:] if len(names) > 2 else names[-1:]
    for index, first in enumerate(scores[chosen[-1]].kept):
        panels = {"clean": first.clean, "degraded": first.degraded}
        for name in chosen:
            entry = scores[name].kept[index]
            ratio = next(image.psnr for image in scores[name].images if image.name == entry.name)
            panels[f"{name}, {ratio:.2f} dB"] = entry.restored
        folder.mkdir(exist_ok=True)
        atomic_write(folder / f"{file_stem(first.name, task.label)}.png", png(strip(panels)))
