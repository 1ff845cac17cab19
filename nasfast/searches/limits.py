"""What networks of a sampling search may cost at most: what is beyond is not trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nasfast.utils.config import count_of
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class Limit:
    """The most that one of the costs of a network may be."""

    cost: str
    """Its name in evaluations: "params"."""
    most: float
    setting: str
    """What the user gave: "--max-params 0.3M"."""

    @classmethod
    def of(cls, cost: str, value: str | int) -> Limit:
        """The limit of a count such as "0.3M"; UserError for another form."""
        return cls(cost, count_of(value, f"max_{cost}"), f"--max-{cost} {value}")


@dataclass(frozen=True)
class Limits:
    """Those of a search; without any, nothing is beyond them."""

    limits: tuple[Limit, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.limits)

    def exceeded(self, costs: Mapping[str, float]) -> dict[str, float]:
        """The costs that are beyond their limits, by name."""
        return {
            limit.cost: costs[limit.cost] for limit in self.limits if costs[limit.cost] > limit.most
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
        """The error where nothing keeps to the limits; `costs` are those of what was tried."""
        settings = " and ".join(limit.setting for limit in self.limits)
        least = {limit: min(cost[limit.cost] for cost in costs) for limit in self.limits}
        smallest = " and ".join(f"{value:,.0f} {limit.cost}" for limit, value in least.items())
        beyond = [limit for limit, value in least.items() if value > limit.most]
        flags = " or ".join(limit.setting.split()[0] for limit in beyond or self.limits)
        return UserError(
            f"search: expected architectures within {settings}, got {len(costs):,} in a row "
            f"beyond; the smallest had {smallest}: raise {flags} in a new run"
        )
