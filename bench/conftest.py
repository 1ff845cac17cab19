"""Options of the benchmarks."""

from __future__ import annotations

import pytest
from harness import machine_line, table

Tables = dict[str, dict[str, dict[str, object]]]  # title, case, implementation
TABLES = pytest.StashKey[Tables]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nasfast benchmarks")
    group.addoption("--seconds", type=float, default=5.0, help="of each case, about")
    group.addoption("--spread", type=float, default=1.0, help="deviation of the offsets, pixels")
    group.addoption(
        "--compile",
        action="store_true",
        help="also what torch.compile takes long to build",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> Tables:
    """What is printed when all is done."""
    return pytestconfig.stash[TABLES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tables = config.stash[TABLES]
    for title in sorted(tables, key=lambda title: title == "skipped"):  # in order, that one last
        terminalreporter.write_sep("-", title)
        terminalreporter.write_line(table("case", tables[title]))
    if tables:
        terminalreporter.write_line(machine_line())
