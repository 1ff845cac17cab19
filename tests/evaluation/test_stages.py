import collections
import copy
import dataclasses
import itertools
import math
import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from nasfast.cache import FeatureCache, tensors_fingerprint
from nasfast.data import SyntheticStreets, split_for_search
from nasfast.encoders import MobileNetV2
from nasfast.evaluation.frozen_encoder import FrozenEncoder
from nasfast.evaluation.stages import Stage0Config, Stage1Config
from nasfast.methods.segmentation.search import Inputs, make_evaluator
from nasfast.methods.segmentation.settings import SearchConfig
from nasfast.methods.segmentation.tasks import Opened
from nasfast.models.build import build_segmenter
from nasfast.models.decoders import DecoderConfig
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.cost import count_macs
from nasfast.training.loop import Runtime
from nasfast.training.metrics import ConfusionMatrix
from nasfast.training.polyak import PolyakAverage
from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import StopRequested

SPACE = FastNASSpace()
GENOTYPE = SPACE.from_json(
    [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]]
)
OTHER = SPACE.from_json([[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]])
NOTHING = SPACE.from_json([[10, *[[0, 0, 10, 10]] * 3], [[0, 0], [1, 1], [2, 2]]])
DECODER = DecoderConfig(agg_size=8)
STAGE0 = Stage0Config(samples=8, crop=32, shorter_side=32, epochs=2, batch_size=4)
STAGE1 = Stage1Config(crop=32, shorter_side=32, batch_size=4)
RUNTIME = Runtime(torch.device("cpu"))


def make_encoder():
    torch.manual_seed(3)
    return MobileNetV2(0.35)


def make(cache_dir, stage0=STAGE0, stage1=STAGE1, *, teacher=None, runtime=RUNTIME, **settings):
    train = SyntheticStreets(10, size=(48, 64), cache_in_memory=True)
    val = SyntheticStreets(1, size=(48, 64), stream="val")
    splits = split_for_search(train, val, seed=0, fraction=0.3)
    usual = {"seed": 7, "cache_dir": cache_dir, "decoder": DECODER}
    config = SearchConfig(stage0=stage0, stage1=stage1, **usual | settings)
    opened = Opened(splits, SegmentationTask(splits), "classes")
    features = Inputs(opened, make_encoder(), teacher).features(config, runtime)
    evaluator = make_evaluator(config, features)
    evaluator.features = features
    return evaluator


def test_rungs_change_no_training_and_stop_it(evaluation, cache_dir):
    halving = make(cache_dir, dataclasses.replace(STAGE0, stop_early=0.5))
    whole = halving(GENOTYPE, 4, {})
    assert list(whole.rewards) == ["stage0.1", "stage0", "stage1"]
    assert whole.rewards == evaluation.rewards | {"stage0.1": whole.rewards["stage0.1"]}
    stopped = halving(GENOTYPE, 4, {"stage0.1": 1.0})
    assert stopped.rewards == {"stage0.1": whole.rewards["stage0.1"]}


@pytest.mark.parametrize(
    ("epochs", "first", "rungs"), [(1, 1, None), (4, 4, None), (5, 1, [1, 2, 4]), (8, 3, [3, 6])]
)
def test_rungs_double(epochs, first, rungs):
    if rungs is not None:
        config = Stage0Config(epochs=epochs, first_rung=first, stop_early=0.5)
        assert config.rungs == rungs
        assert dataclasses.replace(config, stop_early=0.0).rungs == []
        return
    with pytest.raises(UserError) as caught:
        Stage0Config(epochs=epochs, first_rung=first, stop_early=0.5)
    assert str(caught.value) == (
        f"Stage0Config.first_rung: expected fewer than the {epochs} epochs of the stage, got "
        f"{first}; lower it, or leave stop_early out"
    )


def outcome(evaluation):
    """All of an evaluation but its wall time."""
    return dataclasses.replace(evaluation, seconds={})


def evaluate_elsewhere(cache_dir):
    torch.set_num_threads(1)  # as in all tests: sums depend on it
    torch.manual_seed(random.SystemRandom().getrandbits(32))
    return outcome(make(cache_dir)(GENOTYPE, 4, {}))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def evaluator(cache_dir):
    return make(cache_dir)


@pytest.fixture(scope="module")
def evaluation(evaluator):
    return evaluator(GENOTYPE, 4, {})


def test_evaluation(evaluator, evaluation):
    assert list(evaluation.rewards) == list(evaluation.metrics) == ["stage0", "stage1"]
    for stage, reward in evaluation.rewards.items():
        metrics = evaluation.metrics[stage]
        assert list(metrics) == ["miou", "mean_accuracy", "fw_iou"]
        assert 0 < reward < 1
        assert reward == pytest.approx(math.prod(metrics.values()) ** (1 / 3))
    stages = ("stage0_train", "stage0_validate", "stage1_train", "stage1_validate")
    assert tuple(evaluation.seconds) == stages
    assert all(seconds > 0 for seconds in evaluation.seconds.values())
    assert evaluator.seconds["encode"] > 0
    assert evaluation.gate is None
    assert evaluation.failure is None


def test_cost_is_that_of_the_network_in_use_at_the_validation_size(evaluator, evaluation):
    final = dataclasses.replace(DECODER, aux_cell=False)
    model = build_segmenter(make_encoder(), GENOTYPE, 8, final)
    aux = sum(p.numel() for p in model.decoder.aux_heads.parameters())
    assert evaluation.params == sum(p.numel() for p in model.parameters()) - aux
    assert evaluator.features.val_size == (48, 64)
    assert evaluation.macs == count_macs(model, (48, 64))
    assert evaluator.costs(GENOTYPE) == evaluation.costs


def test_same_index_same_evaluation_after_others(evaluator, evaluation):
    """And no generator of the process is touched."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    evaluator(OTHER, 5, {})
    assert outcome(evaluator(GENOTYPE, 4, {})) == outcome(evaluation)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_same_evaluation_in_another_process(cache_dir, evaluation, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(evaluate_elsewhere, cache_dir).result() == outcome(evaluation)


def test_without_stage1(cache_dir, evaluation):
    alone = make(cache_dir, stage1=Stage1Config(epochs=0))(GENOTYPE, 4, {})
    assert alone.rewards == {"stage0": evaluation.rewards["stage0"]}


def test_stage1_may_be_scored_and_gated_after_every_epoch(cache_dir, evaluation):
    """The last epoch gives what it gives without: scoring changes nothing of the training."""
    whole = make(cache_dir, stage1=dataclasses.replace(STAGE1, epochs=2, polyak_decay=0.0))
    stage1 = dataclasses.replace(STAGE1, epochs=2, polyak_decay=0.0, gate_epochs=True)
    gated = make(cache_dir, stage1=stage1)
    rewards = gated(GENOTYPE, 4, {}).rewards
    assert list(rewards) == ["stage0", "stage1.1", "stage1.2"]
    assert rewards["stage1.2"] == whole(GENOTYPE, 4, {}).rewards["stage1"]
    stopped = gated(GENOTYPE, 4, {"stage1.1": rewards["stage1.1"]}).rewards
    assert stopped == {name: rewards[name] for name in ("stage0", "stage1.1")}


def test_weights_are_replaced_by_their_average(cache_dir):
    """With a decay of almost one the average stays at the initial weights, whatever the step."""

    def evaluate(scale):
        one_step = {"batch_size": 8, "epochs": 1, "polyak_decay": 1 - 1e-16}
        rates = {"encoder_lr": scale, "decoder_lr": scale}
        stage0 = dataclasses.replace(STAGE0, lr=scale, **one_step)
        stage1 = dataclasses.replace(STAGE1, **rates, **one_step)
        return outcome(make(cache_dir, stage0, stage1)(GENOTYPE, 4, {}))

    assert evaluate(0.1) == evaluate(0.001)


def test_encoder_is_left_alone(evaluator, evaluation):
    state = make_encoder().state_dict()
    assert all(torch.equal(v, state[k]) for k, v in evaluator.features.encoder.state_dict().items())
    assert not any(p.requires_grad for p in evaluator.features.encoder.parameters())
    assert not evaluator.features.encoder.training


def test_a_candidate_of_nothing_is_legal(evaluator):
    evaluation = evaluator(NOTHING, 0, {})
    assert list(evaluation.rewards) == ["stage0", "stage1"]


def test_caches_are_reused(cache_dir, evaluator, evaluation, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()}
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "_encode", None)
        again = make(cache_dir)
    assert {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()} == files
    assert outcome(again(GENOTYPE, 4, {})) == outcome(evaluation)


def test_a_crop_does_not_depend_on_who_encodes_it(tmp_path, monkeypatch):
    encoders, load = {}, FeatureCache.load_or_build

    def load_or_build(key, count, encode, *args, **options):
        encoders[count] = encode
        return load(key, count, encode, *args, **options)

    monkeypatch.setattr(FeatureCache, "load_or_build", load_or_build)
    cache = make(tmp_path).features._train_cache
    together = cache.batch(torch.arange(cache.count))
    for i in reversed(range(cache.count)):
        alone = encoders[cache.count](torch.tensor([i]))
        assert torch.equal(alone["labels"], together["labels"][i : i + 1])
        torch.testing.assert_close(alone["tap3"], together["tap3"][i : i + 1])
    assert not torch.equal(together["labels"][0], together["labels"][1])


def test_distillation(cache_dir, evaluator, tmp_path):
    encoder = make_encoder()
    teacher = build_segmenter(encoder, OTHER, 8, DecoderConfig(8, 1, False))
    own = tmp_path / "own"
    stage0 = dataclasses.replace(STAGE0, kd_weight=30.0)
    distilled = make(own, stage0=stage0, teacher=teacher)
    names = {path.name for path in own.iterdir()}
    shared = names & {path.name for path in evaluator.features._val_cache.paths[0].parent.iterdir()}
    assert shared == {evaluator.features._val_cache.paths[0].name}
    assert distilled.inputs == evaluator.inputs | {
        "teacher": tensors_fingerprint(teacher.state_dict())
    }
    # a network that has hardly learned may give all pixels one class, with the teacher and without
    assert any(
        distilled(GENOTYPE, seed, {}).metrics["stage0"]
        != evaluator(GENOTYPE, seed, {}).metrics["stage0"]
        for seed in range(4, 12)
    )
    assert not any(p.requires_grad for p in teacher.parameters())

    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        changed.decoder.conv_clf.bias += 1
    make(own, stage0=stage0, teacher=changed)
    assert len(list(own.iterdir())) == 3


def test_val_crop(tmp_path):
    assert make(tmp_path, val_crop=32).features.val_size == (32, 32)


@pytest.mark.parametrize(
    ("stage", "loss"),
    [("stage0", "nan after 2"), ("stage1", "inf after 1")],  # 8 crops, 7 frames, 4 a step
)
def test_a_loss_that_is_not_finite_is_a_failure(cache_dir, stage, loss):
    stages = {"stage0": STAGE0, "stage1": STAGE1}
    stages[stage] = dataclasses.replace(stages[stage], aux_weight=1e300)
    failed = make(cache_dir, **stages)(GENOTYPE, 4, {})
    assert failed.failure == f"{stage}: training loss is {loss} steps"


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
def test_weights_that_the_last_step_made_infinite_are_a_failure(evaluator, monkeypatch, stage):
    last = {"stage0": STAGE0.epochs, "stage1": STAGE0.epochs + 1}[stage]
    calls = itertools.count(1)
    copy_to_parameters = PolyakAverage.copy_to_parameters

    def overflow(average):
        copy_to_parameters(average)
        if next(calls) == last:
            for weight in average._live:
                weight.data.fill_(math.inf)

    monkeypatch.setattr(PolyakAverage, "copy_to_parameters", overflow)
    failed = evaluator(GENOTYPE, 4, {})
    assert failed.failure == f"{stage}: the network's logits are not finite"
    assert list(failed.rewards) == (["stage0"] if stage == "stage1" else [])


@pytest.mark.parametrize("weights", [*itertools.product((0.0, 0.15), repeat=2)])
def test_auxiliary_heads_rest_at_weight_0(cache_dir, evaluation, monkeypatch, weights):
    stages = [dataclasses.replace(s, aux_weight=w) for s, w in zip((STAGE0, STAGE1), weights)]
    loss, heads = SegmentationTask.loss, []

    def spy(task, output, aux, targets, **options):
        heads.append(len(aux))
        return loss(task, output, aux, targets, **options)

    monkeypatch.setattr(SegmentationTask, "loss", spy)
    done = make(cache_dir, *stages)(GENOTYPE, 4, {})
    stage0, stage1 = (3 if weight else 0 for weight in weights)
    assert heads == [stage0] * 4 + [stage1]
    assert done.params == evaluation.params


@pytest.mark.parametrize(("samples", "often"), [(4, {1}), (7, {1}), (14, {2}), (17, {2, 3})])
def test_crops_are_drawn_from_all_frames(tmp_path, monkeypatch, samples, often):
    frames = []

    load = SegmentationTask.load_batch

    def spy(task, data, indices, transform, generator=None):
        if generator is not None:  # validation is not drawn
            frames.extend(indices)
        return load(task, data, indices, transform, generator)

    monkeypatch.setattr(SegmentationTask, "load_batch", spy)
    made = make(tmp_path, dataclasses.replace(STAGE0, samples=samples))
    assert len(made.features.task.search_train) == 7
    assert len(frames) == samples
    assert frames[:7] != list(range(7))[:samples]
    assert set(collections.Counter(frames).values()) == often
    assert set(frames) <= set(range(7))


def test_inputs_are_hashes_of_what_was_read(evaluator, tmp_path):
    splits = evaluator.features.task.splits
    assert evaluator.inputs == {
        "encoder": tensors_fingerprint(make_encoder().state_dict()),
        "training data": splits.search_train.fingerprint(),
        "validation data": splits.search_val.fingerprint(),
        "teacher": "none",
        "padding of the images": "32",
    }
    other = make(tmp_path, seed=8)  # other crops of the same
    assert other.inputs == evaluator.inputs
    caches = other.features._train_cache, evaluator.features._train_cache
    assert not torch.equal(*(cache.batch(torch.tensor([0]))["tap0"] for cache in caches))


@pytest.mark.cuda
def test_everything_lives_on_the_device(tmp_path, monkeypatch):
    places = collections.defaultdict(set)
    loss, compute = SegmentationTask.loss, ConfusionMatrix.compute

    def spy_loss(task, output, aux, targets, **options):
        places["decoder"].update(x.device.type for x in (output, *aux))
        places["labels"].add(targets["labels"].device.type)
        return loss(task, output, aux, targets, **options)

    def spy_compute(matrix, omit):
        places["counts"].add(matrix._counts.device.type)
        return compute(matrix, omit)

    monkeypatch.setattr(SegmentationTask, "loss", spy_loss)
    monkeypatch.setattr(ConfusionMatrix, "compute", spy_compute)
    on_cuda = make(tmp_path, runtime=Runtime(torch.device("cuda")))
    for cache in (on_cuda.features._train_cache, on_cuda.features._val_cache):
        assert all(array.is_cuda for array in cache.batch(torch.tensor([0])).values())
        assert cache.device.type == "cuda"
    before = torch.cuda.get_rng_state()
    evaluation = on_cuda(GENOTYPE, 4, {})
    assert list(evaluation.rewards) == ["stage0", "stage1"]
    assert places == {"decoder": {"cuda"}, "labels": {"cuda"}, "counts": {"cuda"}}
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_heartbeat_stops_at_any_step(cache_dir, tmp_path):
    def beating(beat, folder=cache_dir):
        return make(folder, runtime=Runtime(RUNTIME.device, beat))

    beats = itertools.count()
    beating(lambda: next(beats))(GENOTYPE, 4, {})
    # 2 epochs of 2 steps, 1 batch of validation, 1 step, 1 batch of validation
    assert next(beats) == 4 + 1 + 1 + 1

    def stop():
        raise StopRequested

    for left in (0, 5, 6):
        script = itertools.chain([lambda: None] * left, [stop])
        evaluator = beating(lambda script=script: next(script)())
        with pytest.raises(StopRequested):
            evaluator(GENOTYPE, 4, {})
    with pytest.raises(StopRequested):
        beating(stop, tmp_path)  # while it encodes
    assert list(tmp_path.iterdir()) == []
