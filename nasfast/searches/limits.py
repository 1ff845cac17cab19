"""What networks of a sampling search may cost at most: what is beyond is not trained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nasfast.report.numbers import cost_text
from nasfast.runs.objectives import COSTS
from nasfast.utils.config import count_of
from nasfast.utils.errors import UserError

_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES = {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9} | {
    f"{letter}iB": 2.0 ** (10 * power) for power, letter in enumerate("KMG", 1)
}


@dataclass(frozen=True)
class Limit:
    """The most that one of the costs of a network may be."""

    cost: str
    """Its name in evaluations: "params"."""
    most: float
    setting: str
    """What the user gave: "--max-params 0.3M"."""

    @property
    def flag(self) -> str:
        """What the user is to change: "--max-params", or the constraint."""
        return self.setting if "<" in self.setting else self.setting.split()[0]

    @classmethod
    def of(cls, cost: str, value: str | int) -> Limit:
        """The limit of a count such as "0.3M"; UserError for another form."""
        return cls(cost, count_of(value, f"max_{cost}"), f"--max-{cost} {value}")


@dataclass(frozen=True)
class Limits:
    """Those of a search; without any, nothing is beyond them."""

    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError where a cost has two limits."""
        first: dict[str, Limit] = {}
        for limit in self.limits:
            if first.setdefault(limit.cost, limit) is not limit:
                raise UserError(
                    f"constraint: expected one limit of {limit.cost}, got "
                    f"{first[limit.cost].setting} and {limit.setting}; leave one out"
                )

    def __bool__(self) -> bool:
        return bool(self.limits)

    def exceeded(self, costs: Mapping[str, float]) -> dict[str, float]:
        """Those of the costs that are beyond their limits, by name."""
        return {
            limit.cost: costs[limit.cost]
            for limit in self.limits
            if limit.cost in costs and costs[limit.cost] > limit.most
        }

    def summary(self, rejected: Iterable[Mapping[str, float]]) -> str:
        """How many were rejected, from what `exceeded` gave for each: "rejected 12 above
        --max-params 0.3M"."""
        found = list(rejected)
        above = Counter(cost for costs in found for cost in costs)
        counts = [(above[limit.cost], limit.setting) for limit in self.limits if above[limit.cost]]
        if len(counts) == 1:
            return f"rejected {len(found)} above {counts[0][1]}"
        parts = ", ".join(f"{count} above {setting}" for count, setting in counts)
        return f"rejected {len(found)}: {parts}"

    def refusal(self, costs: Sequence[Mapping[str, float]]) -> UserError:
        """The error where nothing keeps to the limits; `costs` are those of what was tried, as far
        as they were found."""
        settings = " and ".join(limit.setting for limit in self.limits)
        least = {
            limit: min(cost[limit.cost] for cost in costs if limit.cost in cost)
            for limit in self.limits
            if any(limit.cost in cost for cost in costs)
        }
        smallest = " and ".join(
            f"{_text(limit.cost, value)} {limit.cost}" for limit, value in least.items()
        )
        beyond = [limit for limit, value in least.items() if value > limit.most]
        flags = " or ".join(limit.flag for limit in beyond or self.limits)
        return UserError(
            f"search: expected architectures within {settings}, got {len(costs):,} in a row "
            f"beyond; the smallest had {smallest}: raise {flags} in a new run"
        )


def _text(cost: str, value: float) -> str:
    """Exact for counts."""
    return cost_text(cost, value) if cost in ("latency", "memory") else f"{value:,.0f}"


_CONSTRAINT = re.compile(r"(\w+) *(<=|<|>=|>|=+|:) *(.+)")


def constraint(text: str) -> Limit:
    """The limit of "latency<20ms", "params<0.3M", "macs<1.5G" or "memory<64MB".

    Raises:
        UserError: another form.
    """
    match = _CONSTRAINT.fullmatch(text.strip())
    if match is None or match[1] not in COSTS or match[2] not in ("<", "<="):
        raise UserError(
            f"constraint: expected COST<VALUE of {', '.join(COSTS)}, such as latency<20ms, "
            f"params<0.3M, macs<1.5G or memory<64MB, got {text!r}; correct it"
        )
    cost, value = match[1], match[3].strip()
    units = {"latency": _SECONDS, "memory": _BYTES}.get(cost)
    setting = f'--constraint "{text}"'
    if units is None:
        return Limit(cost, count_of(value, f"constraint {cost}"), setting)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(\D+)", value)
    if found is None or found[2] not in units or float(found[1]) == 0:
        example = "20ms" if cost == "latency" else "64MB"
        raise UserError(
            f"constraint: expected a {cost} with its unit, one of {', '.join(units)}, such as "
            f"{example}, got {value!r}; correct it"
        )
    return Limit(cost, float(found[1]) * units[found[2]], setting)
