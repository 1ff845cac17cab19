"""Bootstrap intervals of AP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nasfast.tasks.detection.scores import ImageBoxes, coco_evaluation
from nasfast.utils.statistics import Estimate, estimate


def ap_intervals(
    images: Sequence[ImageBoxes], classes: int, resamples: int, seed: int = 0
) -> dict[str, Estimate]:
    """AP and AP50, as COCO defines them, with 95 % intervals.

    The intervals are percentiles of the bootstrap: as many images are drawn with replacement.

    Args:
        images: objects and detections.
        classes: how many.
        resamples: draws of the images.
        seed: of the draws.

    Raises:
        UserError: faster-coco-eval is not installed.
    """
    evaluation = coco_evaluation(images, classes, separate_eval=True)
    settings, count = evaluation.params, len(images)
    settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
    settings.maxDets = settings.maxDets[-1:]
    evaluation.evaluate()
    matches = evaluation._evalImgs_cpp  # class by class, image by image
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    found = []
    for order in [list(range(count)), *drawn.tolist()]:
        evaluation._evalImgs_cpp = [
            matches[label * count + i] for label in range(classes) for i in order
        ]
        evaluation.accumulate()
        precision = torch.as_tensor(evaluation.eval["precision"])  # -1 without an object
        found.append([part[part >= 0].mean() for part in (precision, precision[0])])
    ap, ap50 = torch.tensor(found, dtype=torch.float64).unbind(1)
    return {"ap": estimate(ap), "ap50": estimate(ap50)}
