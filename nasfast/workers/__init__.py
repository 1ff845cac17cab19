"""Candidates evaluated by many processes; what they give does not depend on how many."""

from nasfast.workers.config import WorkerConfig, cores
from nasfast.workers.dispatcher import WorkerError
from nasfast.workers.protocol import Engine, InProcess, Job

__all__ = ["Engine", "InProcess", "Job", "WorkerConfig", "WorkerError", "cores"]
