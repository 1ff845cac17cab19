"""OKS, AP and PCKh worked out by hand, and against pycocotools."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch

from nasfast.data.keypoints import COCO, MPII, Skeleton, load_keypoint_splits
from nasfast.tasks.keypoints.scores import FIGURES, People, keypoint_scores, oks_ap

EXACT = {"abs": 1e-6, "rel": 0}


def people(joints, found, *, visible=None, area=10_000.0, head=0.0, images=None, confidence=None):
    """Of lists of points, a person each."""
    joints, found = torch.tensor(joints, dtype=torch.float32), torch.tensor(found)
    count, parts = joints.shape[:2]
    seen = torch.tensor(visible) if visible else torch.full((count, parts), 2)
    return People(
        joints,
        seen.to(torch.uint8),
        torch.full((count,), area),
        torch.full((count,), head),
        torch.arange(count) if images is None else torch.tensor(images),
        found,
        torch.ones(count, parts) if confidence is None else torch.tensor(confidence),
    )


def test_oks_by_hand():
    """A wrist off by 2 sigma sqrt(area) = 12.4 pixels has the term exp(-1/2); what is not labelled
    does not count."""
    skeleton = Skeleton(("left_wrist", "right_wrist", "nose"))
    truth = [[[10.0, 10.0], [50.0, 50.0], [0.0, 0.0]]]
    off = [[[10.0, 10.0], [50.0, 62.4], [99.0, 99.0]]]
    scores = keypoint_scores(people(truth, off, visible=[[2, 1, 0]]), skeleton)
    oks = (1 + math.exp(-0.5)) / 2
    assert scores.figures["oks"] == pytest.approx(oks, **EXACT)
    assert scores.reward == scores.figures["oks"]
    assert scores.joints[:2] == pytest.approx((1, math.exp(-0.5)), **EXACT)
    assert scores.joints[2] is None
    # 0.803 is above the thresholds 0.5, 0.55 .. 0.8
    assert scores.figures["ap"] == pytest.approx(0.7, **EXACT)
    assert scores.figures["ar"] == pytest.approx(0.7, **EXACT)
    assert next(iter(scores.as_dict())) == "ap"
    assert "pckh@0.5" not in scores.figures


def test_two_people_of_an_image_are_told_apart():
    """One is found, one is missed by an estimate with more confidence: precision is 0, then 1/2."""
    skeleton = Skeleton(("nose",))
    both = people(
        [[[10.0, 10.0]], [[90.0, 90.0]]],
        [[[10.0, 10.0]], [[500.0, 500.0]]],
        images=[3, 3],
        confidence=[[0.2], [0.9]],
    )
    found = oks_ap(both, skeleton.sigmas)
    assert found["ap"] == pytest.approx(51 / 101 * 0.5, **EXACT)  # of recall 0, 0.01 .. 0.5
    assert found["ar"] == pytest.approx(0.5, **EXACT)


def test_pckh_by_hand():
    """Heads of 20 pixels: right within 10 at 0.5, within 2 at 0.1. MPII counts neither pelvis nor
    thorax, and no one whose head is not known."""
    truth = torch.full((1, 16, 2), 100.0)
    off = truth.clone()
    distances = [0, 1.9, 2.0, 2.1, 9.9, 10.0, 50, 50, 10.1, 0, 0, 0, 0, 0, 0, 0]
    off[0, :, 0] += torch.tensor(distances)
    visible = [[2] * 15 + [0]]
    known = people(truth.tolist(), off.tolist(), visible=visible, head=20.0)
    scores = keypoint_scores(known, MPII)
    assert scores.figures["pckh@0.5"] == pytest.approx(12 / 13, **EXACT)
    assert scores.figures["pckh@0.1"] == pytest.approx(9 / 13, **EXACT)
    assert scores.reward == scores.figures["pckh@0.5"]
    assert list(scores.as_dict()) == ["pckh@0.5", "pckh@0.1", "score"]  # no OKS for MPII's joints
    assert (scores.by, scores.joints[5], scores.joints[8]) == ("PCKh@0.5", 1, 0)
    assert scores.joints[15] is None
    unknown = keypoint_scores(people(truth.tolist(), off.tolist(), visible=visible), MPII)
    assert unknown.figures == {"pckh@0.5": 0.0}


def plain_pckh(truth, found, visible, heads, share):
    """Joint by joint."""
    right = counted = 0
    for p in range(len(truth)):
        for k in range(truth.shape[1]):
            if visible[p, k] and heads[p] > 0 and k not in (6, 7):
                counted += 1
                right += np.linalg.norm(truth[p, k] - found[p, k]) / heads[p] <= share
    return right / counted


def test_pckh_against_a_plain_loop():
    generator = np.random.default_rng(0)
    truth = generator.uniform(0, 300, (20, 16, 2)).astype(np.float32)
    found = truth + generator.normal(0, 12, truth.shape).astype(np.float32)
    visible, heads = generator.integers(0, 3, (20, 16)), generator.uniform(0, 60, 20)
    heads[:3] = 0
    some = People(
        *map(torch.tensor, (truth, visible, np.ones(20), heads, np.arange(20), found)),
        torch.ones(20, 16),
    )
    figures = keypoint_scores(some, MPII).figures
    for share in (0.5, 0.1):
        expected = plain_pckh(truth, found, visible, heads, share)
        assert figures[f"pckh@{share}"] == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("part", ["train", "val"])
def test_agrees_with_pycocotools(data_root, part):
    from pycocotools.coco import COCO as Annotations
    from pycocotools.cocoeval import COCOeval

    root = data_root / "coco-mini" / "keypoints"
    data = getattr(load_keypoint_splits(root), part)
    generator = torch.Generator().manual_seed(1)
    persons = data.people()
    truth = torch.stack([person.joints for person in persons])
    areas = torch.tensor([person.area for person in persons])
    noise = 0.12 * areas.sqrt()[:, None, None] * torch.rand(len(persons), 1, 1, generator=generator)
    found = truth + noise * torch.randn(truth.shape, generator=generator)
    confidence = torch.rand(truth.shape[:2], generator=generator)
    some = People(
        truth,
        torch.stack([person.visible for person in persons]),
        areas,
        torch.zeros(len(persons)),
        torch.tensor([person.image for person in persons]),
        found,
        confidence,
    )
    assert data.skeleton == COCO
    figures = oks_ap(some, COCO.sigmas)
    results = [
        {
            "image_id": data.annotated[person.image].image_id,
            "category_id": 1,
            "keypoints": torch.cat([points.double() - 0.5, sure[:, None]], 1).flatten().tolist(),
            "score": sure.mean().item(),
        }
        for person, points, sure in zip(persons, found, confidence, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = Annotations(root / f"annotations/person_keypoints_{part}2017.json")
        evaluation = COCOeval(expected, expected.loadRes(results), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [figures[name] for name in FIGURES] == pytest.approx(evaluation.stats, **EXACT)
    assert 0.2 < figures["ap"] < 0.9
