import os
import platform
import subprocess
import sys

import pytest

from nasfast.utils.memory import SETTINGS

# a block of 24 MiB is written and freed 20 times, between others that live on, as in a training
STEPS = """
import resource
import nasfast
import torch

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    maps = [torch.ones(6 * 2**20) for _ in range(4)]
    del maps[0], maps[-1]
    torch.ones(6 * 2**20)

for _ in range(3):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""
PAGES = 20 * 4 * 24 * 2**20 // 4096


def faults_with(**environment: str) -> int:
    unset = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    unset.pop("GLIBC_TUNABLES", None)
    run = subprocess.run(
        [sys.executable, "-c", STEPS],
        env=unset | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    assert faults_with() < PAGES // 20
    for setting in (
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ):
        assert faults_with(**setting) > PAGES // 4, setting
