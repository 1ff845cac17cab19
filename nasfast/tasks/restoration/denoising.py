"""Removal of additive white Gaussian noise (IR-NAS: BSD500 at sigma 30, 50, 70)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nasfast.tasks.restoration.base import Name, Predict, RestorationTask
from nasfast.tasks.restoration.baselines import dct_filter, non_local_means
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class Denoising(RestorationTask):
    """Independent Gaussian noise on every value, neither clipped nor rounded."""

    task: Name = field(default="denoising", init=False)

    sigma: float | tuple[float, ...] = 30.0
    """Deviation of the noise on the scale 0..255; several are drawn from uniformly (blind)."""

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 < sigma <= 255 for sigma in self.sigmas):
            raise UserError(
                "denoising: expected sigma above 0 and at most 255 (the scale of 8-bit images), "
                f"got {self.sigma}"
            )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The deviations that are drawn from."""
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma,)

    @property
    def label(self) -> str:
        return "denoising, sigma " + "/".join(f"{sigma:g}" for sigma in self.sigmas)

    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        sigma = self.sigmas[0]
        if len(self.sigmas) > 1:
            sigma = self.sigmas[int(torch.randint(len(self.sigmas), (), generator=generator))]
        noise = torch.randn(clean.shape, generator=generator)
        return clean + noise * (sigma / 255)

    def conditions(self) -> tuple[Denoising, ...]:
        return tuple(Denoising(sigma) for sigma in self.sigmas)

    def baselines(self) -> dict[str, Predict]:
        """The noisy image, and filters that know sigma; ValueError when there are several."""
        if len(self.sigmas) > 1:
            raise ValueError(
                f"denoising: the filters need one sigma, got {self.sigma}; compare under each of "
                "conditions()"
            )
        sigma = self.sigmas[0] / 255
        return {
            "identity": lambda images: images,
            "non-local means": lambda images: non_local_means(images, sigma),
            "sliding DCT": lambda images: dct_filter(images, sigma),
        }
