"""What a search records of each architecture: a line of records.jsonl.

A line names the version of its form. Version 1, written before that, had no "version": its last
stage was the last by name, and "params" and "macs" stood outside "costs". Version 2 had no
"rejected", version 3 no "stopped". Of a newer version, the fields that this one does not know are
kept as they are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from nasfast import __version__
from nasfast.utils.errors import UserError, shown
from nasfast.utils.seals import unsealed

VERSION = 5


@dataclass(frozen=True)
class Evaluation:
    """What training one architecture gave."""

    rewards: dict[str, float]
    """By stage, in the order of the stages: {"stage0": 0.41, "stage1": 0.52}; without "stage1"
    where the gate stopped the candidate. Where it failed, those of the stages before. Scores after
    epochs of the feedback stage, its rungs, are "stage0.1", "stage0.2" .."""
    metrics: dict[str, dict[str, float]]
    """By stage: {"stage0": {"miou": 0.4, ..}}."""
    costs: dict[str, float]
    """Of the network in eval mode, without auxiliary heads: "params", its parameters, and "macs",
    its multiply-accumulates at the validation size."""
    gate: float | None
    """Running mean of rewards that the first stage had to beat; None for no gate."""
    seconds: dict[str, float]
    """Wall time of each step: "stage0_train", "stage0_validate", .."""
    feedback: str
    """Stage whose reward the strategy learns from."""
    failure: str | None = None
    """Stage and cause where one failed, e.g. "stage1: out of memory"; None for a success."""
    stopped: dict[str, float] | None = None
    """Where a rung stopped it: "gate", the score that it did not reach there, and "estimate", what
    the strategy is told for the reward that it did not get."""
    files: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    """Pictures and more to keep beside the best record, by name; no part of the record."""

    def __post_init__(self) -> None:
        if not self.rewards and self.failure is None:
            raise ValueError(
                "Evaluation: expected a reward or a failure, got neither; give the failure's cause"
            )

    @property
    def last_stage(self) -> str | None:
        """The last stage that was passed; None where the first one failed."""
        return next(reversed(self.rewards), None)

    @property
    def rungs(self) -> list[str]:
        """Names of the rungs that it was scored at, in order."""
        return [stage for stage in self.rewards if stage.startswith(f"{self.feedback}.")]

    @property
    def stages(self) -> dict[str, float]:
        """The rewards without rungs."""
        rungs = self.rungs
        return {stage: reward for stage, reward in self.rewards.items() if stage not in rungs}

    @property
    def stopped_after(self) -> int | None:
        """Epochs of the feedback stage after which it was stopped; None where it was not."""
        return None if self.stopped is None else int(self.rungs[-1].rpartition(".")[2])

    @property
    def told(self) -> float | None:
        """What the strategy learns: the reward of the feedback stage, or its estimate; None where
        it failed there."""
        if self.stopped is not None:
            return self.stopped["estimate"]
        return self.rewards.get(self.feedback)

    @property
    def params(self) -> int:
        """Parameters of the network."""
        return int(self.costs["params"])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the network."""
        return int(self.costs["macs"])

    def to_json(self) -> dict[str, object]:
        """Plain JSON of all fields; the order of the stages has a field of its own."""
        fields = asdict(self)
        del fields["files"]
        return {"stages": list(self.rewards)} | fields

    @classmethod
    def from_json(cls, obj: object, where: str = "evaluation", version: int = VERSION) -> Self:
        """Inverse of `to_json`, and of `sealed` after it; UserError names the field, its expected
        type and the value."""
        form = _object(obj, where)
        if version == 1:
            form = _upgraded(form, where)
        if version < 4:
            form = {"stopped": None} | form
        fields, _ = _fields(form, where, _EVALUATION, version)
        stages, rewards, costs = fields.pop("stages"), fields.pop("rewards"), fields["costs"]
        if sorted(stages) != sorted(rewards):
            raise _refuse(stages, f"{where}.stages", f"the stages of the rewards, {list(rewards)}")
        if not {"params", "macs"} <= costs.keys():
            raise _refuse(costs, f"{where}.costs", '"params" and "macs"')
        if not rewards and fields["failure"] is None:
            raise _refuse(rewards, f"{where}.rewards", "a reward or a failure")
        stopped = fields["stopped"]
        if stopped is not None and not {"gate", "estimate"} <= stopped.keys():
            raise _refuse(stopped, f"{where}.stopped", '"gate" and "estimate"')
        return cls(rewards={stage: rewards[stage] for stage in stages}, **fields)


@dataclass(frozen=True)
class Record:
    """One architecture of a search."""

    index: int
    """Position in the search, from 0."""
    genotype: dict[str, object]
    """As the strategy proposed it."""
    canonical: dict[str, object]
    """Its canonical form: equal for equal networks."""
    seed: int
    """Drove its initial weights and the order of its data."""
    evaluation: Evaluation
    duplicate_of: int | None
    """Index of the earlier record of the same canonical form. A sampling search repeats its
    evaluation; a gradient search derived the architecture again."""
    time: str
    """End of the evaluation, ISO 8601, UTC."""
    phase: int = 0
    """Which of the search's phases it belongs to; later ones build on the best of the earlier."""
    rejected: tuple[dict[str, float], ...] = ()
    """The architectures that were proposed between the record before and this one, and not trained
    because they are beyond the limits: of each the costs that exceed theirs. Empty for a proposal
    that is no network."""
    version: int = VERSION
    """Of its line's form; older ones were brought to today's."""
    unknown: Mapping[str, object] = field(default_factory=dict)
    """Fields of a newer version that this one does not know, those of the evaluation below
    "evaluation"."""

    @property
    def score(self) -> tuple[int, int, float] | None:
        """(phase, stages passed, reward of the last one), which orders architectures; None if
        failed."""
        stage = self.evaluation.last_stage
        if self.evaluation.failure is not None or stage is None:
            return None
        rewards = self.evaluation.rewards
        return self.phase, len(rewards), rewards[stage]

    def to_json(self) -> dict[str, object]:
        """Plain JSON of all fields, and of those that a newer version added."""
        fields = asdict(self) | {"rejected": list(self.rejected)}
        unknown: dict[str, Any] = fields.pop("unknown")
        evaluation = self.evaluation.to_json() | unknown.pop("evaluation", {})
        return {"version": fields.pop("version"), **fields, "evaluation": evaluation, **unknown}

    @classmethod
    def from_json(cls, obj: object, where: str = "record") -> Self:
        """Inverse of `to_json`, and of `sealed` after it; UserError names the field, its expected
        type and the value."""
        form = unsealed(_object(obj, where), where)
        version = form.pop("version", 1)
        if type(version) is not int or version < 1:
            raise _refuse(version, f"{where}.version", "an integer from 1")
        if version == 1:
            form.setdefault("phase", 0)
        if version in (1, 2):
            form.setdefault("rejected", [])
        try:
            fields, unknown = _fields(form, where, _RECORD, version)
            inner = fields["evaluation"]
            fields["evaluation"] = Evaluation.from_json(inner, f"{where}.evaluation", version)
        except UserError as error:
            if version <= VERSION:
                raise
            raise UserError(
                f"{where}: expected a form of version {VERSION} or one that adds to it, got "
                f"version {version} ({error}); open it with the newer nasfast that wrote it, this "
                f"is {__version__}"
            ) from error
        added = {name: value for name, value in inner.items() if name not in _EVALUATION}
        if version > VERSION and added:
            unknown["evaluation"] = added
        return cls(**fields, version=max(version, VERSION), unknown=unknown)


def _upgraded(obj: dict[str, object], where: str) -> dict[str, object]:
    """The form of version 1 as that of today."""
    fields = dict(obj)
    costs = {name: fields.pop(name) for name in ("params", "macs") if name in fields}
    stages = sorted(_object(fields.get("rewards"), f"{where}.rewards"))
    feedback = "supernet" if "supernet" in stages else "stage0"
    return fields | {"costs": costs, "stages": stages, "feedback": feedback}


Reader = Callable[[object, str], Any]


def _fields(
    form: dict[str, object], where: str, readers: Mapping[str, Reader], version: int
) -> tuple[dict[str, Any], dict[str, object]]:
    """The fields, read, and those that only a newer version may have."""
    missing = sorted(readers.keys() - form.keys())
    unknown = {name: value for name, value in form.items() if name not in readers}
    if missing or (unknown and version <= VERSION):
        raise UserError(
            f"{where}: expected the fields {', '.join(readers)}, "
            f"got {', '.join(form) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}, "
            f"unknown: {', '.join(sorted(unknown)) or 'none'}"
        )
    fields = {name: read(form[name], f"{where}.{name}") for name, read in readers.items()}
    return fields, unknown


def _refuse(obj: object, where: str, expected: str) -> UserError:
    return UserError(
        f"{where}: expected {expected}, got {shown(obj)}; the line is damaged or was edited"
    )


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


def _finite(obj: object, where: str) -> float:
    """As `_float`; what is not finite is the failure of a candidate, and no reward."""
    if not math.isfinite(number := _float(obj, where)):
        raise _refuse(obj, where, "a finite number")
    return number


def _number(obj: object, where: str) -> float:
    """As `_float`, but an integer stays one."""
    return obj if type(obj) is int else _finite(obj, where)


def _str(obj: object, where: str) -> str:
    if not isinstance(obj, str):
        raise _refuse(obj, where, "a string")
    return obj


def _optional(read: Reader) -> Reader:
    return lambda obj, where: None if obj is None else read(obj, where)


def _list(read: Reader) -> Reader:
    def reader(obj: object, where: str) -> list[Any]:
        if not isinstance(obj, list):
            raise _refuse(obj, where, "a list")
        return [read(value, f"{where}[{i}]") for i, value in enumerate(obj)]

    return reader


def _mapping(read: Reader) -> Reader:
    return lambda obj, where: {
        name: read(value, f"{where}.{name}") for name, value in _object(obj, where).items()
    }


_EVALUATION: dict[str, Reader] = {
    "rewards": _mapping(_finite),
    "metrics": _mapping(_mapping(_float)),
    "gate": _optional(_finite),
    "costs": _mapping(_number),
    "seconds": _mapping(_finite),
    "stages": _list(_str),
    "feedback": _str,
    "failure": _optional(_str),
    "stopped": _optional(_mapping(_finite)),
}
_RECORD: dict[str, Reader] = {
    "index": _int,
    "genotype": _object,
    "canonical": _object,
    "seed": _int,
    "evaluation": _object,
    "duplicate_of": _optional(_int),
    "time": _str,
    "phase": _int,
    "rejected": lambda obj, where: tuple(_list(_mapping(_number))(obj, where)),
}
