"""What restoration networks minimise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from nasfast.tasks.restoration.fidelity import ssim
from nasfast.utils.errors import UserError

SSIM_FLOOR = 1e-3


@dataclass(frozen=True)
class RestorationLoss:
    """(mean squared error + ``ssim_weight`` * log10(1 / SSIM)) / 2, the loss of IR-NAS.

    The two terms are averaged, not added, as the published learning rates were tuned with it; a
    weight of 0 still halves the error. SSIM is the mean over the batch, with zero padding. Below
    1e-3, where the logarithm would grow without bound or be undefined, it counts as 1e-3 and only
    the squared error teaches.
    """

    ssim_weight: float = 0.6
    """lambda of the paper: 0.6 or 0.5 for denoising, 0 for a squared error alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.ssim_weight < math.inf:
            raise UserError(
                f"RestorationLoss: expected ssim_weight (lambda) of at least 0 and finite, got "
                f"{self.ssim_weight}; 0.6 is the published one"
            )

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Loss of images ``[N, C, H, W]``, a float32 scalar, also under autocast."""
        prediction = prediction.float()
        loss = F.mse_loss(prediction, target)
        if self.ssim_weight:
            similarity = ssim(prediction, target, padding=True).mean().clamp(min=SSIM_FLOOR)
            loss = loss - self.ssim_weight * similarity.log10()
        return loss / 2
