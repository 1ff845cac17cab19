"""Crops, and the images that they are cut from."""

from __future__ import annotations

from typing import Literal

from nasfast.data.base import Samples
from nasfast.utils.errors import UserError

MOST = 2
"""Factor to which images are enlarged for a crop, at most."""


def enlarging(
    flag: str,
    side: int,
    images: Samples,
    of: Literal["shorter side", "width"] = "shorter side",
) -> str | None:
    """Which images are enlarged to fill crops of this side; None where all are large enough.

    Args:
        flag: that the side was given by.
        side: in pixels.
        images: that the crops are cut from.
        of: what of an image has to be as long; the shorter side where crops are square.

    Raises:
        UserError: every image would be enlarged to more than twice its size.
    """
    sides = [size[1] if of == "width" else min(size) for size in images.sizes()]
    if side > MOST * max(sides):
        raise UserError(
            f"{flag}: expected at most {MOST * max(sides)}, twice the {of} of the largest "
            f"of the {len(sides)} images, got {side}; lower it"
        )
    small = sum(each < side for each in sides)
    if not small:
        return None
    return (
        f"{small} of {len(sides)} images are enlarged, by up to {side / min(sides):.2f}, as "
        f"{flag} {side} is more than their {of}"
    )
