"""Memory of the process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST = (2**30, 2**25)
"""Bytes up to which a block comes from memory that is kept; the second is the most that older
versions of the GNU C library accept."""
SETTINGS = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Let the GNU C library keep what is freed, for the next allocation; True if it does from now.

    By default it gives large blocks back to the system at every step of a training, and the system
    hands out their pages again one by one, zeroed: up to a fifth of the time of a step on a virtual
    machine (docs/results.md). The process then keeps as much memory as it once needed, except
    blocks of more than 1 GiB. Where the environment has one of :data:`SETTINGS`, or
    ``glibc.malloc...`` in ``GLIBC_TUNABLES``, nothing is changed.
    """
    if any(name in environ for name in SETTINGS):
        return False
    if "glibc.malloc" in environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    kept = any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST)
    return kept and bool(mallopt(TRIM_THRESHOLD, -1))
