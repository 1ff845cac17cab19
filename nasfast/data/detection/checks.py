"""What a detection data set holds, and what about it would mislead a search."""

from __future__ import annotations

from pathlib import Path

from nasfast.data.checks import Findings
from nasfast.data.detection.base import DetectionSplits


def check_detection(
    splits: DetectionSplits, root: Path | None = None, *, test: bool = False
) -> Findings:
    """Findings about data for detection, from what its opening has read.

    Args:
        splits: the data.
        root: its folder; None for data that is drawn.
        test: read the test part too, count everything and draw some, for facts and tiles.
    """
    raise NotImplementedError
