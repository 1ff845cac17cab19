"""What says that a search by gradient collapsed: it chose nothing, or mostly skips.

Identities let gradients through and learn at once, so their alphas grow before the convolutions
are any good (Liang et al., DARTS+, 2019, section 3; Chu et al., FairDARTS, ECCV 2020, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nasfast.runs.records import Record
from nasfast.spaces.ir_nas import PRIMITIVES, IRNASGenotype

STAGE = "supernet"
"""Name of the one stage in the records of a search by gradient."""
LEAST_MOVE = 0.1
"""Of the entropy of the operations, as a share of log K, in a search that chose."""
REMEDY = (
    "in a new run choose the operations by perturbation (--bilevel.architecture.selection "
    "perturbation) and bound the skips (--bilevel.architecture.max-skips), or sample architectures "
    "(--strategy predictor)"
)


def signs_of_collapse(genotype: IRNASGenotype, before: float, now: float) -> tuple[str, ...]:
    """Each in a few words; none of a healthy search.

    Args:
        genotype: derived architecture.
        before: entropy in nats of the operations of an edge, on average, when the search began.
        now: the same, when the architecture was derived.
    """
    signs = []
    if genotype.skips * 2 >= (count := 2 * len(genotype.nodes)):
        signs.append(f"{genotype.skips} of {count} operations are skips")
    if abs(before - now) < LEAST_MOVE * math.log(len(PRIMITIVES)):
        signs.append(
            f"the entropy of the operations went from {before:.2f} to {now:.2f} only: no operation "
            "was preferred by much"
        )
    return tuple(signs)


def collapse_warning(records: Sequence[Record]) -> str | None:
    """One line about the last architecture of a search by gradient, with what to do.

    None where it is healthy, where the architecture has not learned yet, and of other searches.
    """
    tables = [record.evaluation.metrics.get(STAGE, {}) for record in records]
    if not any("architecture_loss" in metrics for metrics in tables):
        return None
    genotype = IRNASGenotype.from_json(records[-1].genotype)
    before, now = (tables[index]["alpha_entropy"] for index in (0, -1))
    signs = signs_of_collapse(genotype, before, now)
    return f"the search may have collapsed: {'; '.join(signs)}; {REMEDY}" if signs else None
