"""Depth estimation: losses, scores, and how a network is used."""

from nasfast.tasks.depth.losses import DepthSettings
from nasfast.tasks.depth.processor import DepthMap, DepthProcessor
from nasfast.tasks.depth.scores import DepthScores
from nasfast.tasks.depth.task import DepthTask

__all__ = ["DepthMap", "DepthProcessor", "DepthScores", "DepthSettings", "DepthTask"]
