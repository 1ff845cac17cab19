"""An evaluator that does what a plan says; workers of another process import it from here."""

import contextlib
import functools
import os
import random
import signal
import time

import torch

from nasfast.runs.records import Evaluation
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.training.loop import Runtime
from nasfast.workers import Job

GENOTYPE = FastNASSpace().sample(random.Random(0))
COSTS = {"params": 123, "macs": 456}


def jobs(count, gates=None):
    return [Job(index, GENOTYPE, gates or {}) for index in range(count)]


class Toy:
    """An evaluator that does by index what a plan says, and otherwise rewards the index.

    "once: ..." is done the first time only, of which a file in `place` is left.
    """

    seed = 0
    feedback = "stage0"
    remedy = "none"

    def __init__(self, plan, place, heartbeat=lambda: None):
        self.plan, self.place, self.seconds = plan, place, {}
        self.inputs = {"plan": repr(plan)}
        self.runtime = Runtime(torch.device("cpu"), heartbeat)

    def costs(self, genotype):
        return COSTS

    def __call__(self, genotype, index, gates):
        todo, mark = self.plan.get(index, ""), self.place / str(index)
        once, _, after = todo.partition("once: ")
        if after:
            todo = once if mark.exists() else after
            mark.touch()
        match todo:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(3)
            case "say why":
                os._exit(2)
            case "defect":
                raise KeyError("no such thing")
            case "refuse":
                raise FileNotFoundError(2, "No such file or directory", "/no/where")
            case "sleep":
                mark.write_text(str(os.getpid()))
                mark.rename(self.place / "asleep")  # only now it is seen, whole
                time.sleep(60)
        metrics = {
            "threads": float(torch.get_num_threads()),
            "deterministic": float(torch.are_deterministic_algorithms_enabled()),
        }
        rewards, files = {"stage0": float(index)}, {"index.txt": str(index).encode()}
        return Evaluation(
            rewards, {"stage0": metrics}, COSTS, gates.get("stage0"), {}, "stage0", files=files
        )


def toy(plan, place, device):
    """What a worker builds."""
    if "unborn" in plan.values():
        os.kill(os.getpid(), signal.SIGKILL)
    if "refused" in plan.values():
        raise FileNotFoundError(2, "No such file or directory", str(place / device))
    return Toy({} if "other" in plan.values() else plan, place)


def evaluate(plan, place, workers, count=4, show=lambda running: None, **options):
    """What the workers return for a plan."""
    engine = workers.engine_for(functools.partial(toy, plan, place))
    with contextlib.closing(engine):
        return list(
            engine.evaluate(Toy(plan, place, **options), jobs(count, {"stage0": 0.5}), show)
        )
