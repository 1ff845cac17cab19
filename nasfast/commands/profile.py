"""Time a target's operators: ``nasfast profile [METHOD] --out TABLE.json``.

The table says how long the operators of a search's networks take on this machine, and some networks
as a whole. ``nasfast search METHOD --latency-table TABLE.json`` predicts latencies from it on
another machine. The other flags are those of ``nasfast search METHOD``: data, preset, and what
decides the networks and their images; ``--latency-backend`` says what computes.

``--bundle DIR`` writes instead what a machine without nasfast needs, with Python, NumPy and
onnxruntime alone: copy DIR there, run ``python DIR/on_target.py TABLE.json``, bring the table back.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from nasfast.latency import Latencies, measured_profile, write_bundle
from nasfast.methods.base import Method
from nasfast.methods.flags import HELP
from nasfast.methods.registry import DEFAULT, METHODS, method_named
from nasfast.searches.base import SearchSettings
from nasfast.searches.sampling import SamplingSearch, SamplingSettings
from nasfast.utils.cli import flag_value, reports_errors, say
from nasfast.utils.errors import UserError
from nasfast.utils.files import expanded, require_place
from nasfast.utils.interrupt import Interrupt
from nasfast.utils.locks import writing

NEEDED = {"objective": ("score", "latency:1"), "strategy": "random"}
"""Settings of a search that has latencies and samples networks; it does not begin."""
_FLAGS = ("--objective", "score", "latency:1", "--strategy", "random")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What to write; the other flags are those of the search."""

    out: Path | None = None
    """Table to write, replaced where it exists."""
    bundle: Path | None = None
    """Folder to write for a machine without nasfast; it must not exist."""

    def __post_init__(self) -> None:
        """UserError where not exactly one is given."""
        given = [place for place in (self.out, self.bundle) if place is not None]
        if len(given) != 1:
            got = "both" if given else "none"
            raise UserError(
                f"profile: expected --out TABLE.json or --bundle DIR, got {got}; give one of them"
            )


def _split(argv: Sequence[str]) -> tuple[ProfileConfig, list[str]]:
    """The command's own settings, and what is left for the search."""
    values = {name: flag_value(argv, f"--{name}") for name in ("out", "bundle")}
    given = {name: expanded(Path(value)) for name, value in values.items() if value is not None}
    rest, skip = list[str](), False
    for word in argv:
        own = word.partition("=")[0] in ("--out", "--bundle")
        if not own and not skip:
            rest.append(word)
        skip = own and "=" not in word
    return ProfileConfig(**given), rest


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not HELP.isdisjoint(argv):
        tyro.cli(ProfileConfig, args=["--help"], prog="nasfast profile", description=__doc__)
    config, words = _split(argv)
    named = words[0] if words and words[0] in METHODS else None
    method = method_named(named or DEFAULT)
    write(config, method, method.parse_search([*words, *_FLAGS]), Console())
    return 0


def write(
    config: ProfileConfig, method: Method, settings: SearchSettings, console: Console
) -> None:
    """Write what the configuration says.

    Args:
        config: where to.
        method: whose networks.
        settings: of a search with `NEEDED`, which decide the networks and the target.
        console: for what is said.

    Raises:
        UserError: the place is taken.
        StopRequested: after Ctrl-C.
    """
    assert isinstance(settings, SamplingSettings)
    if config.bundle is not None:
        if config.bundle.exists():
            raise UserError(
                f"profile: {config.bundle} exists and is never overwritten; give another --bundle"
            )
        require_place(config.bundle, "give another --bundle")
        settings = dataclasses.replace(
            settings, latency_backend="onnxruntime", device="cpu", devices=None
        )
    else:
        assert config.out is not None
        if config.out.is_dir():
            raise UserError(
                f"profile: expected a file for --out, got the directory {config.out}; give "
                f"{config.out / 'table.json'}"
            )
        if not config.out.exists():
            require_place(config.out, "give another --out")
    settings = dataclasses.replace(settings, constraint=(), latency_table=None)
    place = config.bundle or config.out
    assert place is not None
    place.parent.mkdir(parents=True, exist_ok=True)
    with writing(place), Interrupt() as interrupt:
        search, _ = method.build(settings, interrupt, console)
        try:
            costing = search.phase.costing if isinstance(search, SamplingSearch) else None
        finally:
            search.close()
        assert costing is not None and costing.latencies is not None  # noqa: PT018
        _write(config, costing.latencies, interrupt, console)


def _write(
    config: ProfileConfig, latencies: Latencies[Any], interrupt: Interrupt, console: Console
) -> None:
    target = latencies.target
    if config.bundle is not None:
        write_bundle(config.bundle, target, latencies.space, latencies.draw, interrupt.check)
        script = shlex.quote(str(config.bundle / "on_target.py"))
        say(console, f"{config.bundle}: copy it to the target and run there")
        say(console, f"  python {script} TABLE.json")
        return
    assert config.out is not None
    say(console, f"latency  {target}: networks and operators are timed ..")
    profile = measured_profile(target, latencies.space, latencies.draw, interrupt.check)
    profile.write(config.out)
    say(
        console,
        f"{config.out}: {profile}\n  nasfast search --latency-table "
        f"{shlex.quote(str(config.out))} --objective score latency  # on any machine",
    )
