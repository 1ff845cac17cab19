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
from nasfast.methods.flags import HELP
from nasfast.methods.registry import DEFAULT, METHODS, method_named
from nasfast.searches.sampling import SamplingSearch, SamplingSettings
from nasfast.utils.cli import flag_value, reports_errors, say
from nasfast.utils.errors import UserError
from nasfast.utils.files import expanded, require_place
from nasfast.utils.interrupt import Interrupt


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What to write; the other flags are those of the search."""

    out: Path | None = None
    """Table to write, replaced where it exists."""
    bundle: Path | None = None
    """Folder to write for a machine without nasfast; it must not exist."""


def _split(argv: Sequence[str]) -> tuple[ProfileConfig, list[str]]:
    """The command's own settings, and what is left for the search."""
    values = {name: flag_value(argv, f"--{name}") for name in ("out", "bundle")}
    given = {name: expanded(Path(value)) for name, value in values.items() if value is not None}
    if len(given) != 1:
        got = "both" if given else "none"
        raise UserError(
            f"profile: expected --out TABLE.json or --bundle DIR, got {got}; give one of them"
        )
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
    settings = method.parse_search(words)
    assert isinstance(settings, SamplingSettings)
    if not getattr(settings, "samples", True):
        raise UserError(
            "profile: expected a search that samples networks, got one by gradient; give "
            "--strategy predictor"
        )
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
    # weights: any strategy takes them, and nothing is searched
    settings = dataclasses.replace(
        settings, objective=("score", "latency:1"), constraint=(), latency_table=None
    )
    console = Console()
    with Interrupt() as interrupt:
        search, _ = method.build(settings, interrupt, console)
        try:
            costing = search.phase.costing if isinstance(search, SamplingSearch) else None
        finally:
            search.close()
        assert costing is not None and costing.latencies is not None  # noqa: PT018
        _write(config, costing.latencies, interrupt, console)
    return 0


def _write(
    config: ProfileConfig, latencies: Latencies[Any], interrupt: Interrupt, console: Console
) -> None:
    target = latencies.target
    if config.bundle is not None:
        write_bundle(config.bundle, target, latencies.draw, interrupt.check)
        script = shlex.quote(str(config.bundle / "on_target.py"))
        say(console, f"{config.bundle}: copy it to the target and run there")
        say(console, f"  python {script} TABLE.json")
        return
    assert config.out is not None
    say(console, f"latency  {target}: networks and operators are timed ..")
    profile = measured_profile(target, latencies.draw, interrupt.check)
    profile.write(config.out)
    say(
        console,
        f"{config.out}: {profile}\n  nasfast search --latency-table "
        f"{shlex.quote(str(config.out))} --objective score latency  # on any machine",
    )
