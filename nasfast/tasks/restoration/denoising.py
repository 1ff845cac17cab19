"""Removal of white Gaussian noise (IR-NAS: BSD500 at sigma 30, 50, 70), or of real noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nasfast.data.restoration import ANY_TASK, CLEAN_FOLDER, ImageSet
from nasfast.tasks.restoration.base import Name, Predict, RestorationTask
from nasfast.tasks.restoration.baselines import dct_filter, noise_deviation, non_local_means
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class Denoising(RestorationTask):
    """Real pairs where the data has them; else independent Gaussian noise on every value of clean
    images, neither clipped nor rounded."""

    task: Name = field(default="denoising", init=False)
    pairs: ClassVar[str] = "noisy"

    sigma: Literal["real"] | float | tuple[float, ...] = 30.0
    """Deviation of the noise on the scale 0..255; several are drawn from uniformly (blind).
    ``real``, which it becomes where the data has pairs: no noise is added."""

    def __post_init__(self) -> None:
        if self.sigma == "real":
            return
        if not self.sigmas or not all(0 < sigma <= 255 for sigma in self.sigmas):
            raise UserError(
                "denoising: expected sigma above 0 and at most 255 (the scale of 8-bit images), "
                f"got {self.sigma}"
            )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The deviations that are drawn from; none where the noise is real."""
        if self.sigma == "real":
            return ()
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma,)

    @property
    def label(self) -> str:
        if self.sigma == "real":
            return "denoising, real noise"
        return "denoising, sigma " + "/".join(f"{sigma:g}" for sigma in self.sigmas)

    def check(self, images: ImageSet) -> None:
        super().check(images)
        if None in images.degradations and len(images.degradations) > 1:
            raise UserError(
                "denoising: expected pairs alone or clean images alone, got both in "
                f"{images.name}; keep them apart"
            )
        if self.sigma == "real" and None in images.degradations:
            raise UserError(
                f"denoising: expected pairs in {CLEAN_FOLDER}/ + {self.pairs}/ or {ANY_TASK}/, as "
                f"the noise is real, got clean images in {images.name}; give their noisy ones, or "
                "a sigma"
            )

    def of(self, images: ImageSet) -> Denoising:
        self.check(images)
        return self if None in images.degradations else Denoising("real")

    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        sigma = self.sigmas[0]
        if len(self.sigmas) > 1:
            sigma = self.sigmas[int(torch.randint(len(self.sigmas), (), generator=generator))]
        noise = torch.randn(clean.shape, generator=generator)
        return clean + noise * (sigma / 255)

    def conditions(self) -> tuple[Denoising, ...]:
        return tuple(Denoising(sigma) for sigma in self.sigmas) or (self,)

    def baselines(self) -> dict[str, Predict]:
        """The noisy image, and filters that know sigma, or estimate it of real noise; ValueError
        when there are several."""
        if len(self.sigmas) > 1:
            raise ValueError(
                f"denoising: the filters need one sigma, got {self.sigma}; compare under each of "
                "conditions()"
            )

        def sigma(images: Tensor) -> float:
            return self.sigmas[0] / 255 if self.sigmas else max(noise_deviation(images), 1e-3)

        return {
            "identity": lambda images: images,
            "non-local means": lambda images: non_local_means(images, sigma(images)),
            "sliding DCT": lambda images: dct_filter(images, sigma(images)),
        }
