"""Measure a trained network: ``nasfast evaluate MODEL``.

MODEL is a model.safetensors of ``nasfast train``, a directory that holds it, a run, or a file of
``nasfast export``, which is measured as it runs where it is deployed. Reports the task's metrics,
size and latency; the latency of an export beside that of the network it was made from.
``nasfast evaluate MODEL --help`` shows the flags of the task of MODEL.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from nasfast.inference.exported import EXPORT_SUFFIXES
from nasfast.methods.registry import method_of_model
from nasfast.utils.cli import reports_errors
from nasfast.utils.files import atomic_write


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints a table and writes evaluation.json beside the model, or for an export
    ``NAME.evaluation.json``."""
    argv = sys.argv[1:] if argv is None else argv
    method = method_of_model(argv)
    config = method.parse_evaluate(argv, __doc__)
    result, table = method.evaluate(config)
    model = config.path
    exported = f"{model.name}." if model.suffix in EXPORT_SUFFIXES else ""
    path = model.with_name(f"{exported}evaluation.json")
    Console().print(table)
    atomic_write(path, json.dumps(result, indent=2) + "\n")
    return 0
