"""Encoders with torchvision's key names, and the reader of their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nasfast.encoders.mobilenet_v2 import FeatureInfo, MobileNetV2, tensor_mismatch
from nasfast.utils.errors import UserError, cause

__all__ = [
    "PACKAGED_WEIGHTS",
    "FeatureInfo",
    "MobileNetV2",
    "load_encoder",
    "read_metadata",
    "read_weights",
    "tensor_mismatch",
]

PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "mobilenet_v2_035_synthetic.safetensors"
"""A small encoder of our own, trained on the synthetic set by ``nasfast pretrain``."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata from ``.safetensors``, or tensors from ``.pth``/``.pt``.

    Pickles are read with ``weights_only=True``: no code of the file is run.

    Raises:
        UserError: there is no such file, its suffix is unknown, or it is not a flat dict of
            tensors.
    """
    if not path.is_file():
        raise UserError(f"weights: no file {path}; give a .safetensors, .pth or .pt file")
    if path.suffix == ".safetensors":
        with _open(path) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    if path.suffix not in {".pth", ".pt"}:
        raise UserError(
            f"weights: expected a .safetensors, .pth or .pt file, got {path.name}; convert it first"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"weights: {path} could not be read as a plain state dict ({cause(error)}); "
            "save it again with torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(
            f"weights: expected a flat dict of tensors in {path}, got {type(state).__name__}; "
            "save model.state_dict() alone"
        )
    return state, {}


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a ``.safetensors`` file, without its tensors.

    Raises:
        UserError: the file is not one.
    """
    with _open(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights: expected a complete safetensors file, got {path} ({cause(error)}); "
            "restore it from a copy or give another"
        ) from error


def load_encoder(path: Path | None = None) -> MobileNetV2:
    """Build the encoder that a weight file belongs to and load it strictly.

    Args:
        path: torchvision-style MobileNet-v2 weights; ``None`` takes the packaged small encoder.
            The width comes from the file's metadata (``nasfast.encoder``) or is 1.0.

    Raises:
        UserError: the file cannot be read, or holds another network.
    """
    path = path or PACKAGED_WEIGHTS
    state, metadata = read_weights(path)
    described = metadata.get("nasfast.encoder", "{}")
    try:
        width = float(json.loads(described).get("width", 1.0))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"weights {path}: expected the metadata nasfast.encoder to be a JSON object with the "
            f"width of the encoder, got {described!r}; give another file"
        ) from error
    encoder = MobileNetV2(width)
    encoder.load_strict(state, str(path))
    return encoder.eval()
