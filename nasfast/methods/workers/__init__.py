"""Candidates evaluated by many processes; what they give does not depend on how many."""

from nasfast.methods.workers.base import Engine, Evaluator, G, InProcess, Job
from nasfast.methods.workers.crew import Crew, cores
from nasfast.methods.workers.dispatch import WorkerError

__all__ = ["Crew", "Engine", "Evaluator", "G", "InProcess", "Job", "WorkerError", "cores"]
