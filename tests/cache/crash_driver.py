"""Forks processes that fill, and processes that read; kills fillers at random.

    crash_driver.py DIRECTORY SEED FILLERS KILLS

Imports torch once. Each round has a cache of its own; rounds go on until there were enough kills.
Prints one line of JSON: the kills, and per round how often each sample was encoded, published and
by whom. Exits with 1, and says why, where a reader saw what is not the truth.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nasfast.cache import CacheConfig, FeatureCache, places
from nasfast.cache.segment import Filler

COUNT, CHUNK = 120, 4


def truth(index: int) -> dict[str, Tensor]:
    values = torch.arange(3 * 8 * 8) * (index + 1)
    return {
        "tap": (values % 2039).half().view(3, 8, 8),
        "labels": (values[:64] % 251).to(torch.uint8).view(8, 8),
    }


def log(file: int, event: str, indices: list[int]) -> None:
    """One atomic line; a process that is killed wrote it whole or not at all."""
    os.write(file, f"{event} {os.getpid()} {' '.join(map(str, indices))}\n".encode())


def fill(config: CacheConfig, key: dict[str, str], events: int) -> None:
    write, pwrite = Filler.write, os.pwrite

    def slow_pwrite(file: int, data: bytes | memoryview, offset: int) -> int:
        """A disk that takes its time, and less than it is given."""
        time.sleep(0.0002)
        return pwrite(file, memoryview(data)[: len(data) // 2 + 1], offset)

    def noted_write(filler: Filler, rows: Tensor, blocks: Tensor) -> None:
        write(filler, rows, blocks)
        log(events, "published", rows.tolist())

    def encode(indices: Tensor) -> dict[str, Tensor]:
        log(events, "encoded", sorted(set(indices.tolist())))  # without copies that fill the batch
        samples = [truth(i) for i in indices.tolist()]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    os.pwrite = slow_pwrite
    Filler.write = noted_write  # type: ignore[method-assign]
    FeatureCache.load_or_build(key, COUNT, encode, config, chunk=CHUNK)


def read(config: CacheConfig, key: dict[str, str], seed: int) -> None:
    """Read at random until all is published; whatever is served must be the truth."""
    chance, left = random.Random(seed), set(range(COUNT))
    while True:
        try:
            cache = FeatureCache.open(key, config)
            break
        except FileNotFoundError:
            time.sleep(0.0005)
    while left:
        index = chance.choice(sorted(left))
        try:
            sample = cache.sample(index)
        except RuntimeError as error:
            if "is not there yet" not in str(error):
                raise
            time.sleep(0.0002)
            continue
        for name, array in truth(index).items():
            if not torch.equal(sample[name], array):
                raise AssertionError(f"sample {index}: {name} is not the truth")
        left.discard(index)
    assert cache.verify() == []


def fork(run: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    fillers, kills = int(sys.argv[3]), int(sys.argv[4])
    chance, config = random.Random(seed), CacheConfig(directory / "cache")
    ram = directory / "ram"
    places.ram_directory = lambda: ram
    torch.set_num_threads(1)
    rounds, killed = [], 0
    while killed < kills or not rounds:
        key = {"round": str(len(rounds))}
        path = directory / f"events{len(rounds)}"
        events = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def start() -> int:
            return fork(lambda: fill(config, key, events))  # noqa: B023  (forks at once)

        readers = [fork(lambda: read(config, key, seed + i)) for i in range(2)]  # noqa: B023
        alive, dead = [start() for _ in range(fillers)], []
        while alive:
            if killed < kills:
                time.sleep(chance.uniform(0, 0.02))
                victim = chance.choice(alive)
                os.kill(victim, signal.SIGKILL)
                if chance.random() < 0.5:
                    time.sleep(0.005)  # a zombie meanwhile
            else:
                victim = alive[0]
            status = os.waitpid(victim, 0)[1]
            alive.remove(victim)
            if os.WIFSIGNALED(status):
                killed += 1
                dead.append(victim)
                alive.append(start())
            elif status:
                return 1
        if any(os.waitpid(reader, 0)[1] for reader in readers):
            return 1
        os.close(events)
        lines = [line.split() for line in path.read_text().splitlines()]
        notes = [(event, int(pid), list(map(int, rows))) for event, pid, *rows in lines]
        rounds.append({"killed": dead, "events": notes})
    print(json.dumps({"killed": killed, "rounds": rounds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
