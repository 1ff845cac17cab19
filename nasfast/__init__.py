"""nasfast: fast neural architecture search for dense prediction."""

import os as _os

# By default a waiting OpenMP thread spins 300,000 times before it sleeps. Where another process
# needs the core, that makes a training step up to 10x slower (docs/results.md); fewer spins cost
# nothing. libgomp reads this when torch loads it: it holds where nasfast is imported before torch.
if "OMP_WAIT_POLICY" not in _os.environ:
    _os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# torch first: nasfast._C then binds to the OpenMP runtime that torch has loaded, and both share one
# thread pool (two pools in a process cost about 1000x on small parallel regions).
import torch as _torch  # noqa: F401

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``nasfast.FeatureCache``, imported at its first use."""
    if name == "FeatureCache":
        import nasfast.cache

        return nasfast.cache.FeatureCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
