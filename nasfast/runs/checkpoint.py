"""The file that a search or a training continues from."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nasfast.utils.errors import UserError, cause
from nasfast.utils.files import atomic_write


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a checkpoint atomically. `state`: tensors and plain Python values only."""
    buffer = io.BytesIO()  # torch hides why it cannot write to a file, such as a full disk
    torch.save(dict(state), buffer)
    atomic_write(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state last saved, on the CPU; None where there is no file.

    Raises:
        UserError: the file is damaged or not a checkpoint.
    """
    if not path.exists():
        return None
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # by the damage: of torch, pickle, a builtin or the system
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise _refuse(path, cause(error)) from error
    if not isinstance(state, dict):
        raise _refuse(path, f"a {type(state).__name__}")
    return state


def _refuse(path: Path, got: str) -> UserError:
    return UserError(
        f"{path}: expected a checkpoint that nasfast wrote, got {got}; restore it from a copy"
    )
