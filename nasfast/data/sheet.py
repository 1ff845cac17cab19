"""A sheet with some images of a data set."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

COLUMNS, WIDTH, HEIGHT, LINE, GAP = 4, 320, 240, 18, 8  # the last four in pixels
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def draw_sheet(
    tiles: Mapping[str, Tensor], legend: Mapping[str, tuple[int, int, int]]
) -> Image.Image:
    """Images in rows of four with their captions, and what the colours mean below.

    Args:
        tiles: uint8 [3, h, w] of any sizes, by caption.
        legend: RGB by name.
    """
    rows, keys = -(-len(tiles) // COLUMNS), -(-len(legend) // (2 * COLUMNS))
    width, step = COLUMNS * (WIDTH + GAP) + GAP, HEIGHT + LINE + GAP
    sheet = Image.new("RGB", (width, GAP + rows * step + keys * LINE + GAP), WHITE)
    draw = ImageDraw.Draw(sheet)
    for i, (caption, pixels) in enumerate(tiles.items()):
        left, top = GAP + i % COLUMNS * (WIDTH + GAP), GAP + i // COLUMNS * step
        tile = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        scale = min(WIDTH / tile.width, HEIGHT / tile.height)
        tile = tile.resize(
            (max(1, round(tile.width * scale)), max(1, round(tile.height * scale))),
            Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST,
        )
        sheet.paste(tile, (left, top))
        draw.text((left, top + tile.height + 2), caption[:50], BLACK)
    for i, (name, color) in enumerate(legend.items()):
        left = GAP + i % (2 * COLUMNS) * (WIDTH + GAP) // 2
        top = GAP + rows * step + i // (2 * COLUMNS) * LINE
        draw.rectangle((left, top + 2, left + 12, top + 14), color, BLACK)
        draw.text((left + 18, top + 2), name[:20], BLACK)
    return sheet
