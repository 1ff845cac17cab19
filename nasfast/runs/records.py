"""What a search writes down about each architecture: one line of records.jsonl each."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Evaluation:
    """What training one architecture gave."""

    rewards: dict[str, float]
    """Per stage, in order: {"stage0": 0.41, "stage1": 0.52}; without "stage1" where the gate
    stopped the candidate. Where it failed, those of the stages before."""
    metrics: dict[str, dict[str, float]]
    """Per stage: "miou", "mean_accuracy", "fw_iou"."""
    gate: float | None
    """Running mean of rewards that stage 0 had to beat; None for the first candidate."""
    params: int
    """Of the network in eval mode, without auxiliary heads."""
    macs: int
    """Multiply-accumulates of the same network at the validation size."""
    seconds: dict[str, float]
    """Wall time of each step: "stage0_train", "stage0_validate", .."""
    failure: str | None = None
    """Stage and cause where one failed, e.g. "stage1: out of memory"; None for a success."""

    def __post_init__(self) -> None:
        if not self.rewards and self.failure is None:
            raise ValueError(
                "Evaluation: expected a reward or a failure, got neither; give the failure's cause"
            )

    def to_json(self) -> dict[str, object]:
        """Plain JSON of all fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: object, where: str = "evaluation") -> Self:
        """Inverse of `to_json`; ValueError names the field, its expected type and the value."""
        return cls(**_fields(obj, where, _EVALUATION))


@dataclass(frozen=True)
class Record:
    """One architecture of a search."""

    index: int
    """Position in the search, from 0."""
    genotype: dict[str, object]
    """As the strategy asked for it."""
    canonical: dict[str, object]
    """Its canonical form: equal for equal networks."""
    seed: int
    """Drove its initial weights and the order of its data."""
    evaluation: Evaluation
    duplicate_of: int | None
    """Index of the earlier record of the same canonical form. A search that is told rewards repeats
    its evaluation; one by gradient derived the architecture again."""
    time: str
    """End of the evaluation, ISO 8601, UTC."""

    @property
    def score(self) -> tuple[int, float] | None:
        """(stages passed, reward of the last one), which orders architectures; None if failed."""
        if self.evaluation.failure is not None:
            return None
        rewards = self.evaluation.rewards
        return len(rewards), rewards[max(rewards)]

    def to_json(self) -> dict[str, object]:
        """Plain JSON of all fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: object, where: str = "record") -> Self:
        """Inverse of `to_json`; ValueError names the field, its expected type and the value."""
        return cls(**_fields(obj, where, _RECORD))


Reader = Callable[[object, str], Any]


def _fields(obj: object, where: str, readers: Mapping[str, Reader]) -> dict[str, Any]:
    obj = _object(obj, where)
    missing, unknown = readers.keys() - obj.keys(), obj.keys() - readers.keys()
    if missing or unknown:
        raise ValueError(
            f"{where}: expected the fields {', '.join(readers)}, "
            f"got {', '.join(map(str, obj)) or 'none'}; "
            f"missing: {', '.join(sorted(missing)) or 'none'}, "
            f"unknown: {', '.join(sorted(unknown)) or 'none'}"
        )
    return {name: read(obj[name], f"{where}.{name}") for name, read in readers.items()}


def _refuse(obj: object, where: str, wanted: str) -> ValueError:
    return ValueError(f"{where}: expected {wanted}, got {obj!r}; the line is damaged or was edited")


def _object(obj: object, where: str) -> dict[str, object]:
    if not isinstance(obj, dict):
        raise _refuse(obj, where, "an object")
    return obj


def _int(obj: object, where: str) -> int:
    if type(obj) is not int:
        raise _refuse(obj, where, "an integer")
    return obj


def _float(obj: object, where: str) -> float:
    if type(obj) not in (int, float):
        raise _refuse(obj, where, "a number")
    return float(obj)  # type: ignore[arg-type]


def _str(obj: object, where: str) -> str:
    if not isinstance(obj, str):
        raise _refuse(obj, where, "a string")
    return obj


def _optional(read: Reader) -> Reader:
    return lambda obj, where: None if obj is None else read(obj, where)


def _mapping(read: Reader) -> Reader:
    return lambda obj, where: {
        name: read(value, f"{where}.{name}") for name, value in _object(obj, where).items()
    }


_EVALUATION: dict[str, Reader] = {
    "rewards": _mapping(_float),
    "metrics": _mapping(_mapping(_float)),
    "gate": _optional(_float),
    "params": _int,
    "macs": _int,
    "seconds": _mapping(_float),
    "failure": _optional(_str),
}
_RECORD: dict[str, Reader] = {
    "index": _int,
    "genotype": _object,
    "canonical": _object,
    "seed": _int,
    "evaluation": Evaluation.from_json,
    "duplicate_of": _optional(_int),
    "time": _str,
}
