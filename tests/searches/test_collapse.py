"""What counts as a collapse of a search by gradient."""

import math

import pytest

from nasfast.runs.records import Evaluation, Record
from nasfast.searches.collapse import collapse_warning, signs_of_collapse
from nasfast.spaces.ir_nas import IRNASGenotype

START = math.log(6)


def cell(skips, nodes=3):
    ops = iter(["skip"] * skips + ["conv3x3"] * (2 * nodes - skips))
    return IRNASGenotype(tuple(((next(ops), 0), (next(ops), 1)) for _ in range(nodes)), (0, 1, 0))


@pytest.mark.parametrize(
    ("skips", "now", "signs"),
    [
        (2, 1.2, ()),
        (3, 1.2, ("3 of 6 operations are skips",)),
        (6, 0.0, ("6 of 6 operations are skips",)),
        (0, 1.654, ("the entropy of the operations went from 1.79 to 1.65 only: no operation ",)),
        (6, 1.654, ("6 of 6 operations are skips", "the entropy of the operations went from")),
        (0, START * 0.899, ()),
        (0, START * 0.901, ("the entropy",)),
    ],
)
def test_signs(skips, now, signs):
    found = signs_of_collapse(cell(skips), START, now)
    assert len(found) == len(signs)
    assert all(text.startswith(sign) for text, sign in zip(found, signs, strict=True))


def record(index, genotype, stage="supernet", **metrics):
    form = genotype.to_json()
    evaluation = Evaluation({stage: 0.5}, {stage: metrics}, {}, None, {}, stage)
    return Record(index, form, form, 0, evaluation, None, "2026-01-01T00:00:00+00:00")


def test_the_warning_is_of_the_last_record_of_a_search_that_learned():
    warm_up = record(0, cell(6), alpha_entropy=START)
    skips = record(1, cell(5), alpha_entropy=1.654, architecture_loss=0.1)
    healthy = record(2, cell(1), alpha_entropy=1.2, architecture_loss=0.1)
    assert collapse_warning([warm_up, skips]) == (
        "the search may have collapsed: 5 of 6 operations are skips; the entropy of the operations "
        "went from 1.79 to 1.65 only: no operation was preferred by much; in a new run choose the "
        "operations by perturbation (--bilevel.architecture.selection perturbation) and bound the "
        "skips (--bilevel.architecture.max-skips), or sample architectures (--strategy predictor)"
    )
    assert collapse_warning([warm_up, skips, healthy]) is None
    assert collapse_warning([warm_up]) is None
    assert collapse_warning([]) is None
    assert collapse_warning([record(0, cell(6), "stage0", psnr=20.0)]) is None
