"""Crops of people, and the generated ones."""

import pytest
import torch

from nasfast.data.keypoints import (
    KeypointParts,
    Person,
    PersonSample,
    PersonTrainTransform,
    PersonValTransform,
    SyntheticPeople,
    batch,
    divide,
    mapped,
)
from nasfast.data.keypoints.transforms import FILL, flipped

TRAIN = PersonTrainTransform((96, 64), jitter=0.1)


def dotted(box, places, size=(200, 240)):
    """White dots of 3 x 3 pixels on black, at the joints of a person."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for x, y in places:
        image[:, y - 1 : y + 2, x - 1 : x + 2] = 255
    joints = torch.tensor(places) + 0.5
    return PersonSample(image, Person(0, box, joints, torch.full((len(places),), 2), 1.0))


def brightest(image, joint):
    """Centre of the light around a joint, in pixels of the crop."""
    x, y = (int(v) for v in joint)
    part = image[0, y - 4 : y + 5, x - 4 : x + 5].float()
    rows, columns = torch.meshgrid(*[torch.arange(9) + 0.5] * 2, indexing="ij")
    weight = part / part.sum()
    return (weight * columns).sum() + x - 4, (weight * rows).sum() + y - 4


def test_a_crop_holds_the_box_and_its_joints():
    """A box of 40 x 60, in the shape of the crop and 1.25 times as large: 50 x 75 to 64 x 96."""
    sample = dotted((100, 70, 140, 130), [(110, 80), (130, 120)])
    crop = PersonValTransform((96, 64))(sample)
    assert crop.image.shape == (3, 96, 64)
    scale = 64 / 50
    for joint, (x, y) in zip(crop.joints, sample.person.joints, strict=True):
        assert joint.tolist() == pytest.approx(
            [32 + scale * (x.item() - 120), 48 + scale * (y.item() - 100)], abs=1e-4
        )
        assert brightest(crop.image, joint) == pytest.approx(joint.tolist(), abs=0.15)
    back = mapped(crop.joints, crop.to_image)
    assert torch.allclose(back, sample.person.joints, atol=1e-3)


def test_large_people_are_averaged_and_beyond_the_image_is_grey():
    sample = dotted((-300, -250, 540, 470), [(40, 40), (200, 160)])
    crop = PersonValTransform((96, 64))(sample)
    assert crop.image[:, 0, 0].tolist() == list(FILL)
    noise = dotted((0, 0, 240, 200), [(40, 40)])
    noise.image[:] = 255 * ((torch.arange(200)[:, None] + torch.arange(240)) % 2)
    inner = PersonValTransform((32, 32))(noise).image[:, 10:22, 6:26].float()
    assert (inner - 127.5).abs().max() < 35  # without averaging: black and white


def test_augmented_crops_keep_joints_on_their_dots():
    sample = dotted((100, 70, 140, 130), [(112, 90), (128, 90), (120, 112)])
    generator, turned = torch.Generator().manual_seed(0), set()
    for _ in range(8):
        crop = TRAIN(sample, (1, 0, 2), generator)
        back = mapped(crop.joints, crop.to_image)
        mirrored = bool(crop.to_image[:, :2].det() < 0)
        turned.add(mirrored)
        order = [1, 0, 2] if mirrored else [0, 1, 2]
        assert torch.allclose(back, sample.person.joints[order], atol=1e-3)
        for joint in crop.joints:
            assert brightest(crop.image, joint) == pytest.approx(joint.tolist(), abs=0.6)
    assert turned == {False, True}
    with pytest.raises(ValueError, match=r"expected a torch\.Generator, got None"):
        TRAIN(sample, (1, 0, 2))
    with pytest.raises(ValueError, match="expected turn from 0 to 180, got 200"):
        PersonTrainTransform(96, turn=200)
    with pytest.raises(ValueError, match=r"expected scale_range .low, high. with 0 < low <= high"):
        PersonTrainTransform(96, scale_range=(0, 1))


def test_mirrored_twice_is_the_same():
    data = SyntheticPeople(1)
    crop = PersonValTransform((96, 64))(data[0])
    mirrored = data.skeleton.mirrored
    names = data.skeleton.joints
    assert names[mirrored[names.index("left_knee")]] == "right_knee"
    assert names[mirrored[0]] == "nose"
    twice = flipped(flipped(crop, mirrored), mirrored)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(crop, twice, strict=True))


def test_generated_people():
    data = SyntheticPeople(12)
    again, val = SyntheticPeople(12), SyntheticPeople(12, stream="val")
    assert data.fingerprint() == again.fingerprint() != val.fingerprint()
    assert torch.equal(data[3].image, again[3].image)
    assert not torch.equal(data[3].image, val[3].image)
    for sample in data:
        person = sample.person
        seen = person.joints[person.visible > 0]
        assert len(seen) >= 4
        left, top, right, bottom = person.box
        x, y = seen.unbind(1)
        assert bool(((x > left - 3) & (x < right + 3) & (y > top - 3) & (y < bottom + 3)).all())
        assert 100 < person.area < (right - left) * (bottom - top)
        assert 7 < person.head < 20
    visible = torch.stack([person.visible for person in data.people()])
    assert set(visible.unique().tolist()) == {0, 1, 2}  # beyond the image, hidden, seen
    images = batch(data, range(4), PersonValTransform(32)).images
    assert images.shape == (4, 3, 32, 32)


def test_an_image_is_not_in_both_halves():
    train = SyntheticPeople(20)
    splits = divide(KeypointParts(train, train), seed=0, fraction=0.2)
    learned, held_out = (
        {person.image for person in part.people()}
        for part in (splits.search_train, splits.search_val)
    )
    assert (len(learned), len(held_out)) == (16, 4)
    assert not learned & held_out
    assert len(splits.search_train) + len(splits.search_val) == len(train)
