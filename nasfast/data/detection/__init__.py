"""Detection datasets: images with boxes."""

from nasfast.data.detection.base import BoxSample, BoxSubset, DetectionDataset

__all__ = ["BoxSample", "BoxSubset", "DetectionDataset"]
