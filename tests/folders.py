"""Small folders of images and masks, as people have them."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (8, 12)  # height, width


def save_image(path, seed=0, size=SIZE, **options):
    """Random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_mask(path, values, size=SIZE):
    """Bands of the values, one below the other."""
    rows = np.resize(np.repeat(values, -(-size[0] // len(values))), size[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(rows[:, None], size[1], 1).astype(np.uint8)).save(path)


def write_folder(
    root, stems="abcdefghijkl", values=(0, 1), classes=("no", "yes"), size=SIZE
) -> Path:
    """images/, masks/ and classes.txt."""
    for i, stem in enumerate(stems):
        save_image(root / "images" / f"{stem}.png", i, size)
        save_mask(root / "masks" / f"{stem}.png", values, size)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return root


def write_lists(root, train, val):
    for name, stems in (("train", train), ("val", val)):
        (root / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
