"""How many workers there are, where they run, and what runs them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from nasfast.device import resolve_device
from nasfast.evaluation.candidate import G
from nasfast.utils.errors import UserError
from nasfast.workers.dispatcher import Dispatcher
from nasfast.workers.process_pool import ProcessPool, start_server
from nasfast.workers.protocol import Builder, Engine, InProcess, Pool
from nasfast.workers.ray_pool import RayPool


def cores() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class WorkerConfig:
    """The workers of a search. Only ``threads`` changes results, in their last digits."""

    workers: int = 1
    """One and processes: candidates are evaluated in this process."""
    devices: tuple[str, ...] = ("cpu",)
    """Of one kind. Worker i takes device i modulo their number, and this process the first."""
    threads: int = 1
    """That each computes with."""
    engine: Literal["process", "ray"] = "process"

    @classmethod
    def of(
        cls,
        *,
        workers: int | None,
        devices: str,
        threads: int,
        engine: Literal["process", "ray"],
        batch: int,
    ) -> WorkerConfig:
        """The workers of a search's settings.

        Args:
            workers: how many at most; no more than the batch has candidates and, on a CPU, the
                machine has cores. None for as many as the cores, or on CUDA the devices, keep
                busy. A GPU runs the kernels of several processes in turns, and each needs memory of
                its own for context and features: more than one to a device is the user's choice.
                With Ray None is a whole batch: the cluster decides how many of them run at once.
            devices: names, separated by commas.
            threads: of each worker.
            engine: "process", or "ray".
            batch: candidates between updates, more than which are never in training.

        Raises:
            UserError: no such device, devices of two kinds, or Ray is not installed.
        """
        names = tuple(str(resolve_device(name.strip())) for name in devices.split(","))
        kinds = sorted({name.partition(":")[0] for name in names})
        if len(kinds) > 1:
            raise UserError(
                f"devices: expected devices of one kind, got {devices}; rewards "
                "differ between kinds, so give devices of one"
            )
        if engine == "ray" and importlib.util.find_spec("ray") is None:
            raise UserError(
                "engine: expected one that is installed, got ray; "
                "pip install 'nasfast[distributed]', or leave --engine out"
            )
        if engine == "ray":
            fitting = batch
        elif kinds == ["cuda"]:
            fitting = len(names)
        else:
            fitting = max(1, cores() // threads)
        most = min(batch, cores()) if engine == "process" and kinds == ["cpu"] else batch
        made = cls(min(workers or fitting, most), names, threads, engine)
        if made.workers > 1 and engine == "process":
            start_server()  # it imports while the search opens its data
        return made

    @property
    def shares_devices(self) -> bool:
        """Whether processes of this machine can read what this process has put on their GPU."""
        return self.engine == "process" and self.workers > 1 and self.devices[0] != "cpu"

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        workers = f"{self.workers} workers of " if self.workers > 1 else ""
        return f"{', '.join(self.devices[: self.workers])}, {workers}{threads}"

    def engine_for(
        self, build: Builder[G], on_device: Mapping[str, Builder[G]] = MappingProxyType({})
    ) -> Engine[G]:
        """Workers that begin to build their evaluators at once.

        Args:
            build: makes an evaluator on any device.
            on_device: what processes make theirs with instead on certain devices.
        """
        if self.engine == "ray":
            kind = self.devices[0].partition(":")[0]
            cpus = max(self.threads, min(self.workers * self.threads, cores()))
            pool: Pool[G] = RayPool(build, kind, self.threads, cpus)
        elif self.workers == 1:
            return InProcess()
        else:
            builders = [(device, on_device.get(device, build)) for device in self.devices]
            pool = ProcessPool(builders, self.threads)
        return Dispatcher(pool, self.workers)
