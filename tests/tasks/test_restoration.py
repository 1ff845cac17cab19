"""Patches, loss, evaluation and the descriptions of restoration tasks."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from nasfast.data.restoration import ImagePair, ImageSet, ImageSource, open_images
from nasfast.tasks.restoration import TASKS, task_from_json
from nasfast.tasks.restoration.dehazing import Dehazing
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.deraining import Deraining
from nasfast.tasks.restoration.fidelity import psnr, ssim
from nasfast.tasks.restoration.inpainting import Inpainting
from nasfast.tasks.restoration.loss import RestorationLoss
from nasfast.tasks.restoration.patches import ImagePatches, rescaled_crop
from nasfast.tasks.restoration.scoring import costs, evaluate, image_generator
from nasfast.tasks.restoration.super_resolution import SuperResolution
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError


class Given(ImageSource):
    """An image made in a test."""

    def __init__(self, name, clean, degraded, folder):
        self.name, self.size = name, tuple(clean.shape[1:])
        self.degradation = folder
        self._pair = ImagePair(name, clean, degraded)

    def read(self):
        return self._pair

    def identify(self):
        return self.name


def random_images(*sizes, channels=1, paired=None):
    """Clean images, or pairs with the folder's name of their degraded ones."""
    draw = torch.Generator().manual_seed(3)
    cleans = [torch.randint(0, 256, (channels, *s), generator=draw).byte() for s in sizes]
    sources = [
        Given(f"{i}.png", clean, 255 - clean if paired else None, paired)
        for i, clean in enumerate(cleans)
    ]
    return ImageSet("random", channels, sources)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- descriptions

floats = st.floats(0.001, 0.99)
tasks = st.one_of(
    st.builds(
        Denoising, st.just("real") | st.floats(0.5, 255) | st.tuples(st.just(30.0), st.just(0.5))
    ),
    st.builds(Dehazing, st.tuples(floats, st.floats(1, 10)), st.tuples(st.just(0.0), floats)),
    st.builds(Deraining, density=st.tuples(st.just(0.0), floats), angle=st.just((-5.0, 5.0))),
    st.builds(SuperResolution, st.sampled_from([2, 3, 4])),
    st.builds(Inpainting, floats, floats, st.integers(1, 64)),
)


@given(tasks)
def test_description_round_trip(task):
    description = json.loads(json.dumps(task.describe()))
    assert task_from_json(description) == task
    assert TASKS[description["task"]] is type(task)


def test_descriptions_of_nothing_known():
    names = "denoising, deraining, super-resolution, inpainting, dehazing"
    for description, got in (({"task": "haze"}, "'haze'"), ({}, "None"), ([], "[]")):
        with pytest.raises(UserError) as error:
            task_from_json(description)
        assert str(error.value) == f"task: expected one of {names}, got {got}"
    with pytest.raises(ValueError, match="super-resolution: unknown setting 'sigma'"):
        task_from_json({"task": "super-resolution", "sigma": 3})


# --- patches


@given(
    st.integers(24, 70), st.integers(24, 70), st.floats(0.8, 1.2), st.floats(0, 1), st.floats(0, 1)
)
def test_rescaled_crop_is_a_crop_of_the_rescaled_image(height, width, scale, down, right):
    crop = 16
    image = 64 + random_images((height, width))[0].clean // 2  # PIL clips between the passes
    size = round(scale * width), round(scale * height)
    whole = np.asarray(Image.fromarray(image[0].numpy()).resize(size, Image.Resampling.BICUBIC))
    top, left = int(down * (size[1] - crop)), int(right * (size[0] - crop))
    wanted = whole[top : top + crop, left : left + crop]
    got = rescaled_crop(image, scale, top, left, crop)[0].numpy()
    assert np.abs(got.astype(int) - wanted).max() <= 1  # and rounds


@pytest.mark.parametrize("channels", [1, 3])
def test_batches(channels):
    images = random_images((20, 33), (40, 17), channels=channels)
    patches = ImagePatches(images, Denoising(30.0), 16, crops=3)
    assert len(patches) == 6
    chance = generator()
    batches = list(patches.epoch(4, chance))
    assert [len(b) for b in batches] == [4, 2]
    assert sorted(torch.cat(batches).tolist()) == [0, 1, 2, 3, 4, 5]
    inputs, targets = patches.batch(batches[0], chance)
    for images in (inputs, targets):
        assert images.shape == (4, channels, 16, 16)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert 255 * (inputs - targets).std().item() == pytest.approx(30, rel=0.1)
    assert ((255 * targets).round() / 255 - targets).abs().max() < 1e-6


def test_batches_follow_the_generator_bit_for_bit():
    patches = ImagePatches(random_images((30, 40), (40, 30)), Denoising((30.0, 50.0)), 16)
    first, again, other = (patches.batch([0, 1, 0], generator(s)) for s in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[1], other[1])


def test_without_augmentation_patches_are_windows():
    images = random_images((12, 13))
    windows = F.unfold(images[0].clean[None].float(), 8)[0].T  # [5 * 6, 64]
    index = {tuple(window.tolist()): i for i, window in enumerate(windows)}
    patches, chance = ImagePatches(images, Denoising(), 8, augment=False), generator()
    seen = set()
    for _ in range(40):
        _, targets = patches.batch([0] * 8, chance)
        seen |= {index[tuple(t.tolist())] for t in (255 * targets).round().flatten(1)}
    assert seen == set(range(30))


def test_augmentation_turns_and_mirrors_but_does_not_flip_more_than_that():
    """Eight orientations, told apart where the image is not rescaled: in one half of the patches,
    and in half of the others, which cannot become smaller than the crop."""
    images = random_images((16, 16))
    clean = images[0].clean
    ways = [w for k in range(4) for w in (clean.rot90(k, (1, 2)), clean.rot90(k, (1, 2)).flip(2))]
    patches, chance = ImagePatches(images, Denoising(), 16), generator()
    counts = [0] * 8
    for _ in range(50):
        _, targets = patches.batch([0] * 8, chance)
        for target in (255 * targets).round().byte():
            for i, way in enumerate(ways):
                counts[i] += torch.equal(target, way)
    assert 260 < sum(counts) < 340
    assert min(counts) > 15


def test_pairs_are_cut_alike_and_mirrored_but_not_turned():
    images = random_images((16, 16), channels=3, paired="rainy")
    inputs, targets = ImagePatches(images, Deraining(), 16).batch([0] * 64, generator())
    assert (inputs + targets - 1).abs().max() < 1.5 / 255  # bicubic rounding of both
    clean = images[0].clean
    whole = [t for t in (255 * targets).round().byte() if torch.equal(t, clean)]
    mirrored = [t for t in (255 * targets).round().byte() if torch.equal(t, clean.flip(2))]
    assert min(len(whole), len(mirrored)) > 10
    assert len(whole) + len(mirrored) > 40  # the others are enlarged


def test_super_resolution_patches():
    patches = ImagePatches(random_images((40, 40)), SuperResolution(3), 24)
    inputs, targets = patches.batch([0, 0], generator())
    assert inputs.shape == (2, 1, 8, 8)
    assert targets.shape == (2, 1, 24, 24)
    with pytest.raises(ValueError) as error:
        ImagePatches(random_images((40, 40)), SuperResolution(3), 32)
    assert str(error.value) == ("crop: expected a positive multiple of the scale 3, got 32")


def test_images_must_hold_a_patch():
    with pytest.raises(ValueError) as error:
        ImagePatches(random_images((64, 64), (63, 80)), Denoising(), 64)
    assert str(error.value) == (
        "crop: expected images of at least 64x64 pixels, the size of a patch, got 1.png of "
        "63x80 (height x width); choose a smaller patch or leave the image out"
    )
    with pytest.raises(ValueError) as error:
        ImagePatches(random_images((64, 64)), Denoising(), 64, crops=0)
    assert str(error.value) == "crops: expected at least 1 patch of each image, got 0"


PAIRS, CLEAN = random_images((20, 20), paired="rainy"), random_images((20, 20))


@pytest.mark.parametrize(
    ("task", "images", "text"),
    [
        (
            Inpainting(),
            PAIRS,
            "inpainting: expected clean images, which it degrades itself, got the pairs of random; "
            "give the folder of the clean images alone",
        ),
        (
            Denoising(),
            PAIRS,
            "denoising: expected pairs in clean/ + noisy/ or degraded/, got rainy/ in random; "
            "choose the task of these pairs",
        ),
        (
            Denoising("real"),
            CLEAN,
            "denoising: expected pairs in clean/ + noisy/ or degraded/, as the noise is real, got "
            "clean images in random; give their noisy ones, or a sigma",
        ),
        (
            Denoising(),
            CLEAN + random_images((20, 20), paired="noisy"),
            "denoising: expected pairs alone or clean images alone, got both in random; keep them "
            "apart",
        ),
        (
            Dehazing(),
            CLEAN,
            "dehazing: expected colour images, got random with 1 channel (grey); open it with 3 "
            "channels",
        ),
    ],
)
def test_images_that_the_task_does_not_take(task, images, text):
    for use in (
        lambda: ImagePatches(images, task, 16),
        lambda: evaluate(lambda x: x, task, images),
        lambda: task.of(images),
    ):
        with pytest.raises(ValueError) as error:
            use()
        assert str(error.value) == text


def test_pairs_make_the_noise_real():
    pairs = random_images((20, 20), paired="noisy")
    task = Denoising((30.0, 50.0)).of(pairs)
    assert task == Denoising("real")
    assert Denoising(50.0).of(CLEAN) == Denoising(50.0)
    assert [condition.label for condition in task.conditions()] == ["denoising, real noise"]
    assert list(task.baselines()) == ["identity", "non-local means", "sliding DCT"]
    (kept,) = evaluate(lambda images: images, task, pairs, keep=[0]).kept
    torch.testing.assert_close(kept.degraded, 1 - kept.clean)


# --- loss


@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_loss_is_half_of_both_terms(weight):
    target = torch.rand(3, 1, 20, 24)
    prediction = target + 0.1 * torch.randn_like(target)
    wanted = F.mse_loss(prediction, target)
    wanted -= weight * ssim(prediction, target, padding=True).mean().log10()
    loss = RestorationLoss(weight)(prediction, target)
    assert loss.item() == pytest.approx(wanted.item() / 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(RestorationLoss(weight)(prediction, target), loss)
        assert RestorationLoss(weight)(prediction.bfloat16(), target).dtype == torch.float32


def test_loss_where_the_logarithm_is_undefined():
    target = torch.rand(1, 1, 32, 32)
    prediction = (1 - target).requires_grad_()
    assert ssim(prediction, target, padding=True).item() < 0
    loss = RestorationLoss(0.6)(prediction, target)
    wanted = F.mse_loss(prediction, target) + 0.6 * 3
    assert loss.item() == pytest.approx(wanted.item() / 2)
    loss.backward()
    torch.testing.assert_close(prediction.grad, (prediction.detach() - target) / target.numel())


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_lambda_out_of_range(weight):
    with pytest.raises(ValueError) as error:
        RestorationLoss(weight)
    assert str(error.value) == (
        f"RestorationLoss: expected ssim_weight (lambda) of at least 0 and finite, got {weight}; "
        "0.6 is the published one"
    )


# --- evaluation


def half(images):
    return images / 2


def test_scores_are_of_each_image_then_means():
    images = random_images((20, 31), (31, 20))
    scores = evaluate(half, Denoising(50.0), images, keep=[1], seed=4)
    for score, pair in zip(scores.images, images):
        clean = pair.clean.float() / 255
        noisy = Denoising(50.0).degrade(clean, image_generator(4, pair.name))
        restored = half(noisy).clamp(0, 1)
        assert score.psnr == pytest.approx(psnr(restored[None], clean[None]).item())
        assert score.ssim == pytest.approx(ssim(restored[None], clean[None]).item())
    assert scores.psnr == pytest.approx((scores.images[0].psnr + scores.images[1].psnr) / 2)
    assert scores.ssim == pytest.approx((scores.images[0].ssim + scores.images[1].ssim) / 2)
    (kept,) = scores.kept
    assert kept.name == "1.png"
    assert torch.equal(kept.degraded, noisy)
    assert torch.equal(kept.restored, restored)
    assert kept.degraded.min() < 0  # as it came
    assert json.loads(json.dumps(scores.to_json()))["images"][1]["name"] == "1.png"
    assert scores.as_dict() == {"psnr": scores.psnr, "ssim": scores.ssim}
    assert scores.reward == scores.ssim + scores.psnr / 100


def test_an_image_is_degraded_alike_in_any_company():
    images = random_images((20, 31), (31, 20), (20, 31))
    alone = [evaluate(half, Denoising(), images[i : i + 1]).images[0] for i in range(3)]
    assert tuple(alone) == evaluate(half, Denoising(), images).images
    assert tuple(alone[::-1]) == evaluate(half, Denoising(), images[::-1]).images
    assert evaluate(half, Denoising(), images, seed=1).images != tuple(alone)


def test_overlapping_patches_score_higher_as_they_average_noise():
    images = random_images((64, 112))
    shapes = []

    def identity(images):
        shapes.append(tuple(images.shape))
        return images

    whole = evaluate(identity, Denoising(20.0), images)
    overlap = evaluate(identity, Denoising(20.0), images, protocol="overlap", keep=[0])
    assert shapes == [(1, 1, 64, 112), (2, 1, 64, 64)]
    assert overlap.psnr > whole.psnr
    error = overlap.kept[0].degraded - overlap.kept[0].clean
    ratio = error[..., 48:64].var() / error[..., :48].var()  # two patches meet in 16 columns
    assert ratio.item() == pytest.approx(0.5, abs=0.1)
    (kept,) = overlap.kept
    wanted = ssim(kept.restored[None], kept.clean[None], padding=True).item()
    assert overlap.ssim == pytest.approx(wanted)


def test_overlap_with_pairs_is_the_whole_image():
    images = random_images((70, 100), paired="degraded")
    (kept,) = evaluate(half, Deraining(), images, protocol="overlap", keep=[0]).kept
    torch.testing.assert_close(kept.degraded, 1 - kept.clean)
    torch.testing.assert_close(kept.restored, (1 - kept.clean) / 2)


def test_runtime_gives_device_precision_and_heartbeat():
    beats, seen = [], []

    def predict(images):
        seen.append((images.is_contiguous(memory_format=torch.channels_last), images.shape))
        return F.conv2d(images, torch.ones(3, 3, 1, 1) / 3)

    runtime = Runtime(torch.device("cpu"), heartbeat=lambda: beats.append(1))
    images = random_images((20, 20), channels=3)
    (kept,) = evaluate(predict, Denoising(), images, runtime=runtime, keep=[-1]).kept
    assert kept.restored.dtype == torch.float32
    assert (len(beats), seen) == (1, [(True, (1, 3, 20, 20))])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"channels": 3},
            "evaluate: expected images of 3 channels, which the method was made for, got 1 channel "
            "(grey); open random with 3 channels",
        ),
        (
            {"images": random_images()},
            "evaluate: expected at least one image, got none; choose another split",
        ),
        (
            {"task": SuperResolution(2), "protocol": "overlap"},
            "evaluate: the protocol 'overlap' needs a task of scale 1, got super-resolution of "
            "scale 2; use 'whole'",
        ),
        (
            {"protocol": "overlap"},
            "evaluate: the protocol 'overlap' needs images of at least 64x64 pixels, got 0.png of "
            "20x24 (height x width); use 'whole'",
        ),
        (
            {"predict": lambda images: images[..., 1:]},
            "evaluate: expected a restored image [1, 20, 24] for 0.png, got [1, 20, 23]",
        ),
    ],
)
def test_errors_of_evaluate(arguments, text):
    usual = {"predict": half, "task": Denoising(), "images": random_images((20, 24))}
    with pytest.raises(ValueError) as error:
        evaluate(**(usual | arguments))
    assert str(error.value) == text


def test_every_task_runs_on_drawn_images():
    data = open_images("synthetic", 3)
    for cls in TASKS.values():
        task = cls()
        inputs, targets = ImagePatches(data.train, task, 48).batch([0, 1], generator())
        assert targets.shape[-1] == task.scale * inputs.shape[-1]
        for condition in task.conditions():
            for method in condition.baselines().values():
                assert evaluate(method, condition, data.test[:1], channels=3).psnr > 5


def test_images_read_during_an_evaluation_can_be_trained_on():
    data = open_images("synthetic", 1)
    evaluate(half, Denoising(), data.val)
    inputs, targets = ImagePatches(data.val, Denoising(), 32).batch([0, 1, 0, 1], generator())
    weight = torch.ones(1, 1, 3, 3, requires_grad=True)
    RestorationLoss()(F.conv2d(inputs, weight, padding=1), targets).backward()
    assert weight.grad.isfinite().all()


def test_costs_are_those_of_the_first_image():
    network = torch.nn.Conv2d(3, 5, 3, padding=1)
    images = random_images((20, 24), (40, 40), channels=3)
    assert costs(network, SuperResolution(2), images) == {
        "params": 5 * 28,
        "macs": 10 * 12 * 5 * 27,
        "memory": 4 * (5 * 28 + 10 * 12 * (3 + 5)),
    }
