"""Measure a trained network: ``nasfast evaluate MODEL``.

MODEL is a model.safetensors of ``nasfast train``, or the directory that holds it. Reports the
task's metrics, parameters, multiply-adds and latency. ``nasfast evaluate MODEL --help`` shows the
flags of MODEL's task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from nasfast.methods.registry import method_of_model
from nasfast.utils.cli import reports_errors
from nasfast.utils.files import atomic_write


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints a table and writes evaluation.json beside the model."""
    argv = sys.argv[1:] if argv is None else argv
    method = method_of_model(argv)
    config = method.parse_evaluate(argv, __doc__)
    result, table = method.evaluate(config)
    path = config.path.with_name("evaluation.json")
    atomic_write(path, json.dumps(result, indent=2) + "\n")
    Console().print(table)
    return 0
