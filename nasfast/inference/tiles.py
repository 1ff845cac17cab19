"""Images of any size through a network, tile by tile: the output comes from top to bottom, in
bands, so that memory does not grow with the number of tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nasfast.models.layers import resize
from nasfast.tasks.processor import Tiling
from nasfast.utils.errors import UserError

STRIP = 1 << 22
"""Values of an output that are brought to the result's size at once."""


@dataclass(frozen=True)
class Axis:
    """Tiles along one side of an image."""

    side: int
    """Of the image."""
    tiling: Tiling
    fixed: int | None = None
    """The only side that the network takes; None: any."""
    least: int = 1
    """The least side that the network takes."""

    @cached_property
    def tile(self) -> int:
        """Length of every tile."""
        if self.fixed:
            return self.fixed
        limit, multiple = self.tiling.side, self.tiling.multiple
        whole = math.ceil(max(self.side, self.least) / multiple) * multiple
        return whole if whole <= max(limit, self.least) else limit // multiple * multiple

    @cached_property
    def starts(self) -> list[int]:
        """Where tiles begin, evenly spread. The last may end behind the image.

        Raises:
            UserError: tiles are too small to overlap as they should.
        """
        tiling, multiple = self.tiling, self.tiling.multiple
        last = math.ceil(max(self.side - self.tile, 0) / multiple) * multiple
        if not last:
            return [0]
        overlap = 2 * tiling.halo + tiling.blend
        advance = (self.tile - overlap) // multiple * multiple
        if advance < 1:
            least = overlap + multiple
            raise UserError(
                f"tile: expected at least {least} pixels (tiles of this network overlap by "
                f"{overlap}), got {self.fixed or tiling.side}"
                + ("; export the network with a larger --size" if self.fixed else "")
            )
        count = math.ceil(last / advance)
        return [last * i // count // multiple * multiple for i in range(count + 1)]

    @property
    def padded(self) -> int:
        """End of the last tile."""
        return self.starts[-1] + self.tile

    def weights(self, count: int) -> Tensor:
        """Share of each tile in each of its ``count`` outputs, ``[tiles, count]``. At each position
        the shares of all tiles sum to one."""
        within = (torch.arange(count, dtype=torch.float64) + 0.5) * (self.tile / count)
        rows = [
            self._from(i, start + within) - self._from(i + 1, start + within)
            for i, start in enumerate(self.starts)
        ]
        return torch.stack(rows).float()

    def _from(self, index: int, at: Tensor) -> Tensor:
        """Share of this tile and all behind it at some positions: a ramp in the middle of the
        overlap with the tile before."""
        if index in (0, len(self.starts)):
            return torch.full_like(at, float(index == 0))
        middle = (self.starts[index - 1] + self.tile + self.starts[index]) / 2
        return ((at - middle) / max(self.tiling.blend, 1e-6) + 0.5).clamp(0, 1)


def output_bands(
    network: Callable[[Tensor], Tensor], images: Tensor, rows: Axis, columns: Axis
) -> Iterator[Tensor]:
    """Output map of images in bands from top to bottom, ``[N, outputs, r, w]``, at the network's
    resolution. It belongs to the image from 0 to ``padded`` along both axes.

    Args:
        network: pieces of images to outputs, ``[N, outputs, p, q]``, of any resolution. Pieces are
            smaller than the tile at the end of the image: the network pads them.
        images: ``[N, c, H, W]``.
        rows: tiles along H.
        columns: tiles along W.
    """
    rest: Tensor | None = None
    for i, top in enumerate(rows.starts):
        band: Tensor | None = None
        for j, left in enumerate(columns.starts):
            output = network(images[..., top : top + rows.tile, left : left + columns.tile])
            if not (_aligned(rows, output.shape[-2]) and _aligned(columns, output.shape[-1])):
                output = resize(output, (rows.tile, columns.tile))
            height, width = output.shape[-2:]
            if band is None:
                whole = columns.padded * width // columns.tile
                band = output.new_zeros(*output.shape[:-1], whole)
                down, across = (
                    axis.weights(count).to(output.device)
                    for axis, count in ((rows, height), (columns, width))
                )
            begin = left * width // columns.tile
            band[..., begin : begin + width] += output * across[j]
        assert band is not None
        band *= down[i][:, None]
        if rest is not None:
            band[..., : rest.shape[-2], :] += rest
        after = rows.starts[i + 1] - top if i + 1 < len(rows.starts) else rows.tile
        final = after * band.shape[-2] // rows.tile
        yield band[..., :final, :]
        rest = band[..., final:, :]


def _aligned(axis: Axis, count: int) -> bool:
    """Whether tiles of ``count`` outputs begin at whole outputs of the map."""
    return all(start * count % axis.tile == 0 for start in axis.starts)


def resized_bands(
    bands: Iterator[Tensor], steps: tuple[float, float], size: tuple[int, int]
) -> Iterator[Tensor]:
    """Bilinear resize, with half-pixel centres, of a map that comes in bands from top to bottom.

    Args:
        bands: ``[N, K, r, w]``.
        steps: pixels of the map for one pixel of the result, down and across.
        size: (H, W) of the result.

    Yields:
        Strips ``[N, K, R, W]`` of about STRIP values.
    """
    height, width = size
    done = first = 0  # rows of the result that are done; row of the map that the buffer begins with
    buffer: Tensor | None = None
    for band in itertools.chain(bands, [None]):
        if band is not None:
            band = _sample(band, -1, steps[1], 0, width, 0)
            buffer = band if buffer is None else torch.cat([buffer, band], -2)
        assert buffer is not None
        known = first + buffer.shape[-2]
        # rows that lie above the last known one, and in the end all
        ready = height if band is None else min(height, math.ceil((known - 0.5) / steps[0] - 0.5))
        strip = max(1, STRIP // buffer[..., :1, :].numel())
        for begin in range(done, ready, strip):
            yield _sample(buffer, -2, steps[0], begin, min(begin + strip, ready), first)
        done = max(done, ready)
        unused = min(max(math.floor((done + 0.5) * steps[0] - 0.5) - first, 0), known - first - 1)
        buffer, first = buffer[..., unused:, :], first + unused


def _sample(x: Tensor, axis: int, step: float, begin: int, end: int, first: int) -> Tensor:
    """Pixels begin .. end - 1 of an axis resized by 1 / step, of which x holds what starts at
    ``first``."""
    if step == 1:
        return x.narrow(axis, begin - first, end - begin)
    at = (torch.arange(begin, end, dtype=torch.float64) + 0.5) * step - 0.5 - first
    at = at.clamp(0, x.shape[axis] - 1)
    low = at.long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (at - low).to(x).view(-1, *([1] * (-1 - axis)))
    return torch.lerp(
        x.index_select(axis, low.to(x.device)), x.index_select(axis, high.to(x.device)), share
    )
