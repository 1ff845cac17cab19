"""How good estimated joints are: AP and AR by OKS as COCO, PCKh as MPII defines it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nasfast.data.keypoints import Skeleton
from nasfast.tasks.detection.scores import check_packages

FIGURES = (
    *("ap", "ap50", "ap75", "ap_medium", "ap_large"),
    *("ar", "ar50", "ar75", "ar_medium", "ar_large"),
)
"""COCO's 10 of keypoints, in its order. Medium people have 32^2 to 96^2 square pixels."""
UNCOUNTED = ("pelvis", "thorax")
"""Joints that MPII leaves out of the mean."""
PCKH = (0.5, 0.1)
"""Distances, in sizes of the head, within which a joint is right."""


@dataclass(frozen=True)
class People:
    """Labelled people and their estimates, in pixels of the data's images, on the CPU."""

    joints: Tensor  # float32 [P, J, 2]
    visible: Tensor  # uint8 [P, J]; 0: not labelled
    areas: Tensor  # float32 [P]
    heads: Tensor  # float32 [P]; 0: not known
    images: Tensor  # int64 [P]: of which image
    found: Tensor  # float32 [P, J, 2]
    confidence: Tensor  # float32 [P, J]


@dataclass(frozen=True)
class KeypointScores:
    """What a network is worth. What the data do not define is left out: AP where COCO has no
    constants for the joints, PCKh where no size of a head is known.

    The reward is the mean OKS of the people, or without OKS, PCKh@0.5: it tells networks apart
    that have been trained for seconds, of whose people none is near enough for AP.
    """

    figures: Mapping[str, float]
    """COCO's by the names in `FIGURES`, "oks", "pckh@0.5" and "pckh@0.1", in 0..1."""
    joints: tuple[float | None, ...] = ()
    """Of each joint the mean of the term of OKS, or the share within half a head; None for one that
    nobody has."""
    by: str = "OKS"
    """What `joints` are."""

    @property
    def reward(self) -> float:
        return self.figures["oks" if "oks" in self.figures else "pckh@0.5"]

    def as_dict(self) -> dict[str, float]:
        """AP first, or PCKh@0.5 where there is none; "score" is the reward."""
        return {**self.figures, "score": self.reward}


def similarities(people: People, sigmas: Sequence[float]) -> Tensor:
    """Terms of object keypoint similarity, float64 ``[P, J]``: exp(-d^2 / (2 s^2 (2 sigma)^2)), d
    the distance, s^2 the area. OKS is their mean over the labelled joints of a person."""
    squares = (people.found.double() - people.joints.double()).square().sum(-1)
    variances = (2 * torch.tensor(sigmas, dtype=torch.float64)).square()
    return torch.exp(-squares / variances / people.areas.double()[:, None] / 2)


def oks_ap(people: People, sigmas: Sequence[float]) -> dict[str, float]:
    """COCO's figures, of one estimate for each labelled person, by faster-coco-eval.

    The score of an estimate is the mean of its joints' confidences. People without labelled joints
    are no part of it: COCO would excuse an estimate that lies on one of them.

    Raises:
        UserError: faster-coco-eval is not installed.
    """
    check_packages()
    from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped]

    seen = people.visible > 0
    truth, found = [], []
    for number, (image, joints, visible, area) in enumerate(
        zip(
            people.images.tolist(),
            people.joints.double(),
            people.visible,
            people.areas.tolist(),
            strict=True,
        )
    ):
        own = joints[seen[number]]
        low, high = own.amin(0), own.amax(0)
        entry = {"image_id": image + 1, "category_id": 1, "iscrowd": 0, "area": area}
        truth.append(
            {
                **entry,
                "id": number + 1,
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "keypoints": _triples(joints, visible),
                "num_keypoints": int(seen[number].sum()),
            }
        )
        found.append(
            {
                "image_id": image + 1,
                "category_id": 1,
                "keypoints": _triples(people.found[number].double(), people.confidence[number]),
                "score": people.confidence[number].mean().item(),
            }
        )
    expected = COCO(
        {
            "images": [{"id": image + 1} for image in sorted(set(people.images.tolist()))],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": truth,
        }
    )
    evaluation: Any = COCOeval_faster(
        expected, expected.loadRes(found), "keypoints", kpt_oks_sigmas=list(sigmas)
    )
    evaluation.run()
    figures = zip(FIGURES, evaluation.stats[: len(FIGURES)].tolist(), strict=True)
    return {name: value for name, value in figures if value >= 0}


def _triples(points: Tensor, last: Tensor) -> list[float]:
    values: list[float] = torch.cat([points, last.double()[:, None]], 1).flatten().tolist()
    return values


def within(people: People, share: float) -> Tensor:
    """Whether an estimate is within a share of the head's size of its joint, bool ``[P, J]``."""
    distances = (people.found.double() - people.joints.double()).norm(dim=-1)
    near: Tensor = distances <= share * people.heads.double()[:, None]
    return near


def keypoint_scores(people: People, skeleton: Skeleton) -> KeypointScores:
    """All that the data define of the figures."""
    seen = people.visible > 0
    figures: dict[str, float] = {}
    joints: tuple[float | None, ...] = ()
    by = "OKS"
    if skeleton.sigmas is not None:
        terms = similarities(people, skeleton.sigmas)
        figures |= oks_ap(people, skeleton.sigmas)
        figures["oks"] = ((terms * seen).sum(1) / seen.sum(1)).mean().item()
        joints = _means(terms, seen)
    heads = seen & (people.heads > 0)[:, None]
    counted = heads & torch.tensor([name not in UNCOUNTED for name in skeleton.joints])
    if counted.any():
        for share in PCKH:
            figures[f"pckh@{share}"] = within(people, share)[counted].double().mean().item()
    if skeleton.sigmas is None:
        figures.setdefault("pckh@0.5", 0.0)
        joints, by = _means(within(people, 0.5).double(), heads), "PCKh@0.5"
    return KeypointScores(figures, joints, by)


def _means(values: Tensor, seen: Tensor) -> tuple[float | None, ...]:
    """Of each joint, over those who have it."""
    sums, counts = (values * seen).sum(0).tolist(), seen.sum(0).tolist()
    return tuple(s / n if n else None for s, n in zip(sums, counts, strict=True))
