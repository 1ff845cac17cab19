"""Detection of objects: targets, losses, post-processing, scores."""

from nasfast.tasks.detection.losses import DetectionLoss
from nasfast.tasks.detection.postprocess import PostProcessing
from nasfast.tasks.detection.processor import DetectionProcessor, Detections
from nasfast.tasks.detection.scores import DetectionScores
from nasfast.tasks.detection.task import DetectionTask

__all__ = [
    "DetectionLoss",
    "DetectionProcessor",
    "DetectionScores",
    "DetectionTask",
    "Detections",
    "PostProcessing",
]
