"""Image files: what a folder holds of them, and the one reader of their pixels."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nasfast.utils.errors import UserError, cause

T = TypeVar("T")
S = TypeVar("S")

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}
WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
MAX_PIXELS = 2**28
"""16384 x 16384, 0.8 GB in colour. Pillow's own limit is a third of it and a guess; satellite and
microscope images are larger."""
ORIENTATION = 0x0112  # tag of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""
ASIDE = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
"""Those that exchange height and width."""
_OPENING = threading.Lock()


class FaultyFiles(UserError):
    """Files that cannot be used; the text is that of the first and counts the others."""

    def __init__(self, faults: Sequence[str]) -> None:
        count = len(faults) - 1
        more = f" (and {count} more, which nasfast check lists)" if count else ""
        super().__init__(faults[0] + more)
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Listing:
    """What a folder holds, by name; hidden files, such as ``._a.png`` of macOS, are no images."""

    images: tuple[Path, ...]
    hidden: tuple[Path, ...]
    others: tuple[Path, ...]
    """Files whose suffix is none of `IMAGE_SUFFIXES`."""
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Header:
    """What a file says of its image before the pixels are read."""

    mode: str
    size: tuple[int, int]
    """(height, width) of the upright image."""
    turned: bool
    """Whether reading it turns or mirrors the pixels as they are stored."""


def list_folder(folder: Path) -> Listing:
    """The content of a folder. UserError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise UserError(
            f"data: expected a folder of images, got {str(folder)!r}, which cannot be read: "
            f"{error.strerror}; check the path and its permissions"
        ) from error
    files = [folder / name for name, is_folder in found if not is_folder]
    seen = [path for path in files if not path.name.startswith(".")]
    return Listing(
        images=tuple(path for path in seen if path.suffix.lower() in IMAGE_SUFFIXES),
        hidden=tuple(path for path in files if path.name.startswith(".")),
        others=tuple(path for path in seen if path.suffix.lower() not in IMAGE_SUFFIXES),
        folders=tuple(folder / name for name, is_folder in found if is_folder),
    )


def by_stem(files: Iterable[Path], ending: str = "") -> dict[str, Path]:
    """Stem, less its ending -> path, of the files with that ending.

    Raises:
        UserError: two files share a stem.
    """
    found: dict[str, Path] = {}
    for path in files:
        if path.stem.endswith(ending):
            first = found.setdefault(path.stem.removesuffix(ending), path)
            if first is not path:
                raise UserError(
                    f"{first} and {path.name}: expected one image of the name {path.stem!r}, got "
                    "two; rename or remove one"
                )
    return found


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """An image file, its pixels not read yet; whatever goes wrong in the block names the file."""
    try:
        with _OPENING:  # for a limit of our own, that of the process has to rest
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{kind} {path} is too large: expected at most {MAX_PIXELS} pixels, got "
                    f"{image.height}x{image.width}; cut it into tiles"
                )
            yield image
    except (UserError, MemoryError):
        raise
    except Exception as error:  # by the damage: OSError, SyntaxError, struct.error, ..
        text = getattr(error, "strerror", None) or cause(error)
        raise UserError(
            f"{kind} {path} cannot be read: {text}; replace the file or take it out of the folder"
        ) from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright; Pillow does it itself for TIFF."""
    try:
        # that of a PNG's class would read the pixels
        orientation = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # damaged metadata are none
        return None
    return None if image.format == "TIFF" else TURNS.get(orientation)  # type: ignore[arg-type]


def measure(path: Path, kind: str = "image") -> Header:
    """Mode and size from a file's header.

    Raises:
        UserError: the file cannot be read, or its image is too large.
    """
    with _opened(path, kind) as image:
        turn, (width, height) = _turn(image), image.size
        if turn in ASIDE:
            width, height = height, width
        return Header(image.mode, (height, width), turn is not None)


def open_image(path: Path, kind: str = "image") -> Image.Image:
    """An upright image with its pixels; `kind` is what an error calls it.

    Raises:
        UserError: the file cannot be read, or its image is too large.
    """
    with _opened(path, kind) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says; reads its pixels."""
    image.load()
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def require_eight_bits(path: Path, mode: str) -> None:
    """Raise UserError for an image of more than 8 bits a channel: how its values map to 0..255
    depends on the camera, and files do not say."""
    if mode in WIDE_MODES:
        raise UserError(f"image {path} has mode {mode}: expected 8 bits a channel; convert it")


def read_image(path: Path, channels: int = 3) -> Tensor:
    """Pixels of an image file, upright, uint8 ``[channels, H, W]``. Transparency is dropped.

    Args:
        path: the file.
        channels: 1 converts to grey (ITU-R 601 luma, PIL's "L"), 3 to RGB.

    Raises:
        UserError: the file cannot be read, is too large, or has more than 8 bits a channel.
    """
    image = open_image(path)
    require_eight_bits(path, image.mode)
    return planes(image, channels)


def planes(image: Image.Image, channels: int) -> Tensor:
    """Pixels of an image, uint8 ``[channels, H, W]``."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(image.convert(MODES[channels]))))
    return pixels.permute(2, 0, 1).contiguous()


def identity(path: Path) -> str:
    """SHA-256 (hex) of a file, and whether reading it turns the image.

    Raises:
        UserError: the file cannot be read.
    """
    with _opened(path, "image") as image:
        turned = "" if _turn(image) is None else " upright"
        return hashlib.sha256(path.read_bytes()).hexdigest() + turned


def for_each(function: Callable[[T], S], items: Iterable[T]) -> list[S]:
    """What a function of one file gives for each, in threads.

    Raises:
        FaultyFiles: it raised a UserError for some.
    """

    def attempt(item: T) -> S | UserError:
        try:
            return function(item)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(attempt, items))
    faults = [str(result) for result in results if isinstance(result, UserError)]
    if faults:
        raise FaultyFiles(faults)
    return results  # type: ignore[return-value]
