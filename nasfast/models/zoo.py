"""The zoo: named architectures of all methods.

No genotype, log or checkpoint of the published IR-NAS searches is public. These are
**reconstructions**, not the published networks.

Known are cells that the authors had changed by hand, for their comparison with the ones they found:
for each task one with other operations and one with other inputs. Inferred is which change made
which, and so the cell that both came from. Known are the sizes of the networks (layers, nodes, F)
and the 0.63 M parameters of the denoiser. Its path is inferred from them: of both readings of the
cell and all 29 paths only this one has 0.63 times 2^20, a convolution that nothing reads included.
Other cells may have as many. Nothing is known of the deraining network's path; two groups of
offsets need an even number of channels, which F = 15 has at levels 1 and 2 only: this path is the
narrowest that can run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nasfast.models.restorer import RestorerConfig
from nasfast.spaces.ir_nas import IRNASGenotype


@dataclass(frozen=True)
class ZooEntry:
    """A published architecture, and what it was searched for."""

    method: str
    """Search method that trains and evaluates it."""
    genotype: IRNASGenotype
    network: RestorerConfig
    """Size of the network around the genotype."""
    task: Mapping[str, Any]
    """Name as "task", and settings other than the defaults."""
    channels: int
    """Of the images."""


ZOO = {
    "irnas-denoise": ZooEntry(
        method="restoration",
        genotype=IRNASGenotype(
            nodes=(
                (("conv3x3", 0), ("conv3x3", 1)),
                (("dil3x3", 1), ("dil3x3", 2)),
                (("skip", 0), ("def3x3", 2)),
                (("def3x3", 0), ("def3x3", 4)),
                (("skip", 1), ("skip", 5)),
            ),
            levels=(0, 0, 0, 1),
        ),
        network=RestorerConfig(width=20, dead_reduce=True),
        task={"task": "denoising"},
        channels=1,
    ),
    "irnas-derain": ZooEntry(
        method="restoration",
        genotype=IRNASGenotype(
            nodes=(
                (("skip", 0), ("def3x3", 1)),
                (("def3x3", 0), ("conv3x3", 1)),
                (("skip", 0), ("def3x3", 2)),
                (("conv3x3", 1), ("def3x3", 2)),
            ),
            levels=(1, 1, 1),
        ),
        network=RestorerConfig(width=15),
        task={"task": "deraining"},
        channels=3,
    ),
}
"""By name."""
