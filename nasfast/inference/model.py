"""A trained network with all that it takes to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasfast.data.images import read_image
from nasfast.device import resolve_device
from nasfast.models.io import MODEL_FILE, load_model
from nasfast.models.layers import resize
from nasfast.tasks.processor import Prediction, Preprocessing, Processor
from nasfast.tasks.registry import processor_of
from nasfast.utils.errors import UserError


class Model(nn.Module):
    """A trained network in evaluation mode, which predicts on images.

    Args:
        network: gives maps ``[N, outputs, h, w]``, alone or first in a tuple.
        processor: what goes in, and what comes out.
        description: of the model file.

    Attributes:
        classes: names of the classes, empty where the task has none.
        preprocessing: what `predict` does to an image's values.
        genotype: the architecture, in its JSON form.
        task: name of the task, such as "segmentation" or "denoising".
    """

    def __init__(
        self, network: nn.Module, processor: Processor, description: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.network, self.processor, self.description = network, processor, dict(description)
        self.classes: tuple[str, ...] = processor.classes
        self.preprocessing: Preprocessing = processor.preprocessing
        self.genotype: object = description["genotype"]
        self.task: str = processor.task
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Outputs at the size of the result: preprocessed images ``[N, c, H, W]`` to float32
        ``[N, outputs, scale * H, scale * W]``."""
        output = self.network(images)
        output = output[0] if isinstance(output, tuple) else output
        scale = self.processor.scale
        return resize(output.float(), (scale * images.shape[-2], scale * images.shape[-1]))

    @torch.inference_mode()
    def predict(self, image: Path | str) -> Prediction:
        """The task's result for an image, at the image's own size."""
        pixels = read_image(Path(image), self.preprocessing.channels)
        output = self(self.preprocessing(pixels[None].to(self.device)))[0]
        return self.processor.prediction(output, pixels)


def load(path: Path | str, device: str = "auto") -> Model:
    """A trained network.

    Args:
        path: a model.safetensors, the directory of a training, or a run.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: there is none, or the file is damaged.
    """
    file = find_model(Path(path))
    network, description = load_model(file)
    model = Model(network, processor_of(description), description)
    return model.to(resolve_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def find_model(path: Path) -> Path:
    """The model file that a path means: itself, that of a training, or the last one of a run.

    Raises:
        UserError: there is none; the message says how to make one.
    """
    if path.is_file():
        return path
    found: Sequence[Path] = [path / MODEL_FILE, *path.glob(f"train-*/{MODEL_FILE}")]
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError(
            f"{path}: expected a model.safetensors, a training or a run with one, got none; "
            f"`nasfast train {path}` makes it"
        )
    return max(found, key=lambda file: file.stat().st_mtime)
