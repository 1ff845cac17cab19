"""The file that a search or a training continues from."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nasfast.utils.errors import UserError, text_for_user
from nasfast.utils.files import atomic_write
from nasfast.utils.tensors import load_saved


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a checkpoint atomically. `state`: tensors and plain Python values only."""
    buffer = io.BytesIO()  # torch hides why it cannot write to a file, such as a full disk
    torch.save(dict(state), buffer)
    atomic_write(path, buffer.getbuffer())


def load_checkpoint(path: Path, remedy: str) -> dict[str, Any] | None:
    """The state last saved, on the CPU; None where there is no file.

    Args:
        path: the file.
        remedy: what to do where it cannot be read.

    Raises:
        UserError: the file is damaged or not a checkpoint.
    """
    if not path.exists():
        return None
    try:
        state = load_saved(path)
    except UserError as error:
        raise _refuse(path, str(error), remedy) from error
    if not isinstance(state, dict):
        raise _refuse(path, f"a {type(state).__name__}", remedy)
    return state


@contextmanager
def restoring(path: Path, remedy: str) -> Iterator[None]:
    """The block puts a loaded state to use: what is wrong with it becomes a UserError.

    Raises:
        UserError: the state lacks something, or is that of something else.
    """
    try:
        yield
    except Exception as error:  # whatever a foreign state makes of torch and of Python
        if text_for_user(error) is not None:
            raise
        raise _refuse(path, f"another one ({_described(error)})", remedy) from error


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _refuse(path: Path, got: str, remedy: str) -> UserError:
    return UserError(
        f"{path}: expected the checkpoint that nasfast wrote there, got {got}; {remedy}"
    )
