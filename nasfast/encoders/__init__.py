"""Encoders with torchvision's key names, and the reader of their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nasfast.encoders.base import Encoder, FeatureInfo, tensor_mismatch
from nasfast.encoders.mobilenet_v2 import MobileNetV2
from nasfast.encoders.resnet import FORMS, ResNet, size_of
from nasfast.utils.errors import UserError, about, cause, out_of_memory
from nasfast.utils.files import parse_json
from nasfast.utils.seals import require_tensors
from nasfast.utils.tensors import load_saved

__all__ = [
    "PACKAGED_WEIGHTS",
    "Encoder",
    "FeatureInfo",
    "MobileNetV2",
    "ResNet",
    "encoder_of",
    "load_encoder",
    "read_metadata",
    "read_weights",
    "tensor_mismatch",
]

PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "mobilenet_v2_035_synthetic.safetensors"
"""A small encoder of our own, trained on the synthetic set by ``nasfast pretrain``."""


WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net"),
    *("state_dict_ema", "model_ema"),
)
"""Keys that checkpoints of training scripts hold a network's weights under, in order of choice."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
"""Of keys: by DataParallel and averages, by torch.compile, and by modules around the network."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata from ``.safetensors``, or tensors from ``.pth``/``.pt``.

    Pickles are read with ``weights_only=True``: no code of the file is run. Of a checkpoint that
    holds the weights under a name of `WRAPPERS`, beside an optimizer or arguments, they are taken
    from there; the prefixes of `PREFIXES`, where all keys have one, are dropped.

    Raises:
        UserError: there is no such file, its suffix is unknown, or it has no dict of tensors.
    """
    if path.is_dir():
        raise UserError(
            f"weights: expected a .safetensors, .pth or .pt file, got the directory {path}; give a "
            "file in it"
        )
    if not path.is_file():
        raise UserError(f"weights: no file {path}; give a .safetensors, .pth or .pt file")
    if path.suffix == ".safetensors":
        with _open(path) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = require_tensors(path, tensors, file.metadata() or {})
        return _bare(tensors), metadata
    if path.suffix not in {".pth", ".pt"}:
        raise UserError(
            f"weights: expected a .safetensors, .pth or .pt file, got {path.name}; convert it first"
        )
    try:
        state = load_saved(path)
    except UserError as error:
        raise UserError(
            f"weights: expected a state dict in {path}, got {error}; "
            "save it again with torch.save(model.state_dict(), path)"
        ) from error
    while isinstance(state, Mapping) and not _is_state(state):
        inner = next((state[name] for name in WRAPPERS if name in state), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not _is_state(state):
        keys = f" of {', '.join(map(str, state))[:80]}" if isinstance(state, Mapping) else ""
        raise UserError(
            f"weights: expected a dict of tensors in {path}, alone or as one of "
            f"{', '.join(WRAPPERS)}, got a {type(state).__name__}{keys}; save model.state_dict() "
            "alone"
        )
    return _bare(state), {}


def _is_state(state: Mapping[object, object]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrapped the module whose state it is."""
    tensors = {key: value for key, value in state.items() if key != "n_averaged"}
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None):
        if not tensors:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


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
        if out_of_memory(error):
            raise
        raise UserError(
            f"weights: expected a complete safetensors file, got {path} ({cause(error)}); "
            "restore it from a copy or give another"
        ) from error


def load_encoder(
    path: Path | None = None, rows: int = 7, *, stride_in_1x1: bool | None = None
) -> Encoder:
    """Build the encoder that a weight file belongs to and load it strictly.

    Args:
        path: torchvision-style weights of MobileNet-v2, a ResNet or a ResNeXt of
            `nasfast.encoders.resnet.FORMS`, which their keys and shapes tell; ``None`` takes the
            packaged small MobileNet-v2. A file's metadata (``nasfast.encoder``) may say the width
            of a MobileNet-v2, else 1.0, and ``stride_in_1x1`` of a ResNet, else false.
        rows: of MobileNet-v2, whatever the file has of later ones; other encoders have none to
            leave out.
        stride_in_1x1: of a ResNet, whatever the file says.

    Raises:
        UserError: the file cannot be read, or holds another network.
    """
    path = path or PACKAGED_WEIGHTS
    state, metadata = read_weights(path)
    described = metadata.get("nasfast.encoder", "{}")
    size = size_of(state)
    if size is not None and size not in FORMS:
        raise UserError(
            f"weights {path}: expected those of {', '.join((MobileNetV2.name, *FORMS))}, got "
            f"{size}; give another file"
        )
    if size is not None and rows < 7:
        raise UserError(
            f"weights {path}: expected a MobileNet-v2, whose first {rows} rows the networks have, "
            f"got {size}; give weights of MobileNet-v2"
        )
    build: Callable[[], MobileNetV2 | ResNet]
    try:
        known = parse_json(described)
        with torch.device("meta"):  # nothing is allocated before the shapes have been compared
            if size is None:
                width = known.get("width", 1.0)
                build = functools.partial(MobileNetV2, width, rows=rows)
            else:
                strided = known.get("stride_in_1x1", False)
                strided = strided if stride_in_1x1 is None else stride_in_1x1
                build = functools.partial(ResNet, size, stride_in_1x1=bool(strided))
            with about(f"weights {path}"):
                bare = build()
            bare.check(state, str(path))
    except UserError:
        raise
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"weights {path}: expected the metadata nasfast.encoder to be a JSON object with the "
            f"width of the encoder, got {described[:80]!r}; give another file"
        ) from error
    encoder = build()
    encoder.load_strict(state, str(path))
    return encoder.eval()


def encoder_of(description: Mapping[str, Any], **rows: int) -> Encoder:
    """The encoder of `Encoder.describe`, with random weights.

    Raises:
        ValueError: it is none that is known.
        KeyError: the description lacks something.
    """
    name = description["name"]
    if name == MobileNetV2.name:
        expand = description.get("expand_first", False)
        return MobileNetV2(description["width"], expand_first=expand, **rows)
    if name == ResNet.name:
        options = {key: description[key] for key in ("stride_in_1x1", "frozen_norm")}
        return ResNet(description["size"], **options)
    raise ValueError(f"encoder: expected {MobileNetV2.name} or {ResNet.name}, got {name!r}")
