"""Candidates evaluated by many processes; what they give does not depend on how many."""

from nasfast.methods.workers.base import Builder, Engine, Evaluator, G, Job
from nasfast.methods.workers.crew import Crew, cores
from nasfast.methods.workers.dispatch import WorkerError

__all__ = ["Builder", "Crew", "Engine", "Evaluator", "G", "Job", "WorkerError", "cores"]
