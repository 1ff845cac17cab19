"""Write the report of a run again: ``nasfast report RUN [--baseline RUN]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nasfast.methods.registry import method_named
from nasfast.report import write_report
from nasfast.runs.study import Study
from nasfast.utils.cli import reports_errors


def rewrite(run: Annotated[Path, tyro.conf.Positional], baseline: Path | None = None) -> None:
    """Write the report of a run again.

    Args:
        run: run directory of the search.
        baseline: run directory of a search of the same budget to compare with.
    """
    other = Study.open(baseline, read_only=True) if baseline is not None else None
    study = Study.open(run, read_only=True)
    method = method_named(study.method)
    print(write_report(study, method.report_of(study.config), baseline=other))


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    tyro.cli(rewrite, args=argv, prog="nasfast report")
    return 0
