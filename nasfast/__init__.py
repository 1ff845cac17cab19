"""nasfast: fast neural architecture search for dense prediction."""

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING

# By default a waiting OpenMP thread spins 300,000 times before it sleeps. Where another process
# needs the core, that makes a training step up to 10x slower (docs/results.md); fewer spins cost
# nothing. libgomp reads this when torch loads it: it holds where nasfast is imported before torch.
if "OMP_WAIT_POLICY" not in _os.environ:
    _os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# torch first: nasfast._C then binds to the OpenMP runtime that torch has loaded, and both share one
# thread pool (two pools in a process cost about 1000x on small parallel regions).
import torch as _torch  # noqa: F401

from nasfast.utils.memory import keep_freed_memory as _keep_freed_memory

if TYPE_CHECKING:
    from nasfast import models, ops
    from nasfast.api import model_info, profile, search, study, train
    from nasfast.cache import FeatureCache
    from nasfast.inference.model import load
    from nasfast.models.zoo import create_model, list_models

_keep_freed_memory()

__version__ = "0.1.0"
__all__ = [
    "FeatureCache",
    "__version__",
    "create_model",
    "list_models",
    "load",
    "model_info",
    "models",
    "ops",
    "profile",
    "search",
    "study",
    "train",
]
# where each is, imported at its first use; nasfast.search, .study and .train are the functions
_HOMES = {
    "FeatureCache": "nasfast.cache",
    "create_model": "nasfast.models.zoo",
    "list_models": "nasfast.models.zoo",
    "load": "nasfast.inference.model",
    "model_info": "nasfast.api",
    "profile": "nasfast.api",
    "search": "nasfast.api",
    "study": "nasfast.api",
    "train": "nasfast.api",
}


if not TYPE_CHECKING:  # so that checkers and editors know every name

    def __getattr__(name: str) -> object:
        if name in ("models", "ops"):
            return _importlib.import_module(f"nasfast.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
