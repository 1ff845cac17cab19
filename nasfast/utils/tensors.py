"""Tensors that torch saved, read without running any code of the file."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from nasfast.utils.errors import UserError, out_of_memory


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements, in their order."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().data if len(plain) else memoryview(b"")


def load_saved(path: Path) -> object:
    """What ``torch.save`` wrote, on the CPU: tensors and plain Python values.

    Raises:
        UserError: the file is damaged, or holds something else; the text is what it is instead.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # torch does not look at the checksums
            if broken is not None:
                raise UserError(f"a damaged file: the checksum of {broken} does not match")
        elif _is_begun(path):
            raise UserError("an incomplete file")
        # the first kind of object in others' checkpoints that is no tensor: their arguments
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # by the damage: of torch, zipfile, pickle, a builtin or the system
        named = isinstance(error, OSError) and error.filename is not None
        if named or out_of_memory(error) or isinstance(error, UserError):
            raise
        raise UserError(_found(error)) from error


def _found(error: Exception) -> str:
    """What a file is. torch's own words advise to read it with ``weights_only=False``, which runs
    what the file says."""
    text = str(error)
    pickled = re.search(r"GLOBAL ([\w.]+)", text)
    if pickled:
        return f"a pickled {pickled[1]}"
    return "a TorchScript archive" if "TorchScript" in text else "nothing that torch.save wrote"


def _is_begun(path: Path) -> bool:
    """Whether a file begins as an archive does, whose directory is at its end."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
