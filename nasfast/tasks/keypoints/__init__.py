"""Joints of people: heatmaps, scores, trained networks in use."""

from nasfast.tasks.keypoints.processor import KeypointProcessor, Poses
from nasfast.tasks.keypoints.scores import KeypointScores
from nasfast.tasks.keypoints.task import KeypointTask

__all__ = ["KeypointProcessor", "KeypointScores", "KeypointTask", "Poses"]
