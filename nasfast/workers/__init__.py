"""Candidates evaluated by many processes; what they give does not depend on how many."""

from nasfast.workers.config import Crew, cores
from nasfast.workers.dispatcher import WorkerError
from nasfast.workers.protocol import Engine, Evaluator, G, InProcess, Job

__all__ = ["Crew", "Engine", "Evaluator", "G", "InProcess", "Job", "WorkerError", "cores"]
