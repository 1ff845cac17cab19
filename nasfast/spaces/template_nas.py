"""Networks of templates: Nekrasov et al., Template-based automatic search of compact semantic
segmentation architectures, WACV 2020 (arXiv 1904.02365)."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from nasfast.spaces.base import (
    Decision,
    Space,
    check_choices,
    graph_features,
    mutate_choices,
    sample_choices,
)
from nasfast.utils.errors import UserError, shown

OPERATIONS = ("sep3x3", "sep5x5", "gap", "maxpool3x3", "sep5x5_d6", "skip")
REACH = {"sep3x3": 1, "sep5x5": 2, "maxpool3x3": 1, "sep5x5_d6": 12}
"""Pixels to each side that an operation sees, without its repeats."""
AGGREGATIONS = ("psum", "cat")
MAX_REPEATS = 4


class Template(NamedTuple):
    """Two operations, each on one input, and how their results are joined."""

    op1: int
    """Index into OPERATIONS."""
    op2: int
    aggregation: int
    """Index into AGGREGATIONS."""


class Layer(NamedTuple):
    """A template with its inputs.

    It is applied `repeats + 1` times, each time with weights of its own; the inputs of a further
    time are the second input and the output of the time before.
    """

    input1: int
    """Node: i < num_taps is encoder tap i, num_taps + k is layer k."""
    input2: int
    template: int
    repeats: int
    """Times beyond the first, 0 to 3."""
    stride: int
    """1 where the map has half the height and width and twice the channels afterwards, else 0."""


@dataclass(frozen=True)
class TemplateNASGenotype:
    """Layers on the encoder's taps, each of which applies one of the templates."""

    templates: tuple[Template, ...]
    layers: tuple[Layer, ...]
    """Where the two maps of an aggregation differ in size, those of the first `downsampling`
    layers are resized to the smaller, those of later layers to the larger."""
    num_taps: int = 2

    @property
    def downsampling(self) -> int:
        """How many layers may have a stride: the first half, rounded down."""
        return len(self.layers) // 2

    @property
    def collected_layers(self) -> tuple[int, ...]:
        """Layers that no later layer reads: concatenated for the classifier."""
        read = {i for layer in self.layers for i in layer[:2]}
        return tuple(k for k in range(len(self.layers)) if k + self.num_taps not in read)

    @property
    def used_templates(self) -> tuple[int, ...]:
        """Templates that a layer applies, in order."""
        return tuple(sorted({layer.template for layer in self.layers}))

    def canonical(self) -> "TemplateNASGenotype":
        """One representative of the genotypes that name the same operations otherwise.

        Free are the order of the templates, equal and unused ones, and the order of layers that do
        not read each other, as long as it does not change which of them are downsampling. A layer
        that applies its template once may also have both branches in the other order: sums do not
        depend on it, and for the convolution behind a concatenation it is the order of its weights.
        Applied again, the branches differ: the first reads the second input, the second the output.
        """
        names = [self.templates[layer.template] for layer in self.layers]
        fixed = {name for name, layer in zip(names, self.layers, strict=True) if layer.repeats}
        layers, resolved = [], []
        for name, layer in zip(names, self.layers, strict=True):
            low, high = sorted(name[:2])
            turned = Template(low, high, name.aggregation)
            if turned not in fixed and Template(high, low, name.aggregation) in fixed:
                turned = Template(high, low, name.aggregation)  # no template more than there were
            if layer.repeats == 0 and turned != name:
                layer = layer._replace(input1=layer.input2, input2=layer.input1)
                name = turned
            layers.append(layer)
            resolved.append(name)
        unused = [Template(0, 0, 0)] * len(self.templates)
        templates = sorted([*set(resolved), *unused[len(set(resolved)) :]])
        layers = [
            layer._replace(template=templates.index(name))
            for layer, name in zip(layers, resolved, strict=True)
        ]
        either = {
            k
            for k, (layer, name) in enumerate(zip(layers, resolved, strict=True))
            if layer.repeats == 0 and name.op1 == name.op2
        }
        smallest = min(_orders(layers, either, self.num_taps, self.downsampling))
        return replace(self, templates=tuple(templates), layers=smallest)

    def to_json(self) -> dict[str, object]:
        """{"space": .., "templates": [[op1, op2, aggregation], ..],
        "layers": [[input1, input2, template, repeats, stride], ..]}"""
        return {
            "space": "template_nas",
            "templates": [list(template) for template in self.templates],
            "layers": [list(layer) for layer in self.layers],
        }


def _orders(
    layers: Sequence[Layer], either: set[int], taps: int, downsampling: int
) -> Iterator[tuple[Layer, ...]]:
    """The layers in every order that keeps the first ones first and reads what comes before.

    Those of `either` get their inputs sorted.
    """
    count = len(layers)
    for first in itertools.permutations(range(downsampling)):
        for rest in itertools.permutations(range(downsampling, count)):
            order = (*first, *rest)
            new = [*range(taps), *(0 for _ in layers)]
            for k, old in enumerate(order):
                new[taps + old] = taps + k
            named = []
            for k, old in enumerate(order):
                a, b = (new[i] for i in layers[old][:2])
                if max(a, b) >= taps + k:
                    break
                if old in either:
                    a, b = min(a, b), max(a, b)
                named.append(layers[old]._replace(input1=a, input2=b))
            else:
                yield tuple(named)


@dataclass(frozen=True)
class TemplateNASSpace(Space[TemplateNASGenotype]):
    """`num_templates` templates and `num_layers` layers over `num_taps` taps: 44 integers.

    The first `num_layers // 2` layers may have a stride.
    """

    num_templates: int = 3
    num_layers: int = 7
    num_taps: int = 2

    def __post_init__(self) -> None:
        for field in ("num_templates", "num_layers", "num_taps"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"TemplateNASSpace.{field}: expected at least 1, got {getattr(self, field)}"
                )

    @property
    def name(self) -> str:
        return "template_nas"

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """Templates first, then layers; what is no input has one head for all of its kind."""
        decisions = []
        for t in range(self.num_templates):
            name = f"template{t}"
            decisions += [Decision(f"{name}.op{i}", "op", len(OPERATIONS)) for i in (1, 2)]
            decisions.append(Decision(f"{name}.aggregation", "aggregation", len(AGGREGATIONS)))
        for k in range(self.num_layers):
            name = f"layer{k}"
            stride = ("stride", 2) if k < self.num_layers // 2 else ("no stride", 1)
            decisions += [
                *(
                    Decision(f"{name}.input{i}", f"{name}.input{i}", self.num_taps + k)
                    for i in (1, 2)
                ),
                Decision(f"{name}.template", "template", self.num_templates),
                Decision(f"{name}.repeats", "repeats", MAX_REPEATS),
                Decision(f"{name}.stride", *stride),
            ]
        return tuple(decisions)

    def size(self) -> int:
        """Exact number of ordered genotypes, 1.74e23 for the published space."""
        return math.prod(decision.size for decision in self.decisions)

    def decode(self, choices: Sequence[int]) -> TemplateNASGenotype:
        """The genotype of one choice per decision; UserError names a decision out of range."""
        check_choices(self.decisions, choices)
        split = 3 * self.num_templates
        templates = itertools.starmap(Template, _rows(choices[:split], 3))
        layers = itertools.starmap(Layer, _rows(choices[split:], 5))
        return TemplateNASGenotype(tuple(templates), tuple(layers), self.num_taps)

    def encode(self, genotype: TemplateNASGenotype) -> tuple[int, ...]:
        """The choices that decode to `genotype`; UserError if it is not of this space."""
        lengths = (len(genotype.templates), len(genotype.layers), genotype.num_taps)
        if lengths != (self.num_templates, self.num_layers, self.num_taps):
            raise UserError(
                f"genotype: expected {self.num_templates} templates, {self.num_layers} layers and "
                f"{self.num_taps} taps, got {lengths[0]}, {lengths[1]} and {lengths[2]}; make a "
                "TemplateNASSpace of that size"
            )
        choices = tuple(itertools.chain(*genotype.templates, *genotype.layers))
        check_choices(self.decisions, choices)
        return choices

    def sample(self, rng: random.Random) -> TemplateNASGenotype:
        """Uniform over ordered genotypes."""
        return self.decode(sample_choices(self.decisions, rng))

    def mutate(self, genotype: TemplateNASGenotype, rng: random.Random) -> TemplateNASGenotype:
        """Exactly one decision changes, to one of its other choices, uniformly."""
        return self.decode(mutate_choices(self.decisions, self.encode(genotype), rng))

    def features(self, genotype: TemplateNASGenotype) -> Mapping[str, float]:
        """Of the network, every application of a template by itself."""
        taps = genotype.num_taps
        labels = [f"tap{i}" for i in range(taps)]
        sources: list[tuple[int, ...]] = [()] * taps
        outputs = list(range(taps))  # the node that taps and layers end in
        for layer in genotype.layers:
            op1, op2, aggregation = genotype.templates[layer.template]
            first, second = outputs[layer.input1], outputs[layer.input2]
            for _ in range(layer.repeats + 1):
                labels += [OPERATIONS[op1], OPERATIONS[op2], AGGREGATIONS[aggregation]]
                at = len(sources)
                sources += [(first,), (second,), (at, at + 1)]
                first, second = second, at + 2
            if layer.stride:
                labels.append("stride")
                sources.append((second,))
                second = len(sources) - 1
            outputs.append(second)
        labels.append("network")
        sources.append(tuple(outputs[taps + k] for k in genotype.collected_layers))
        return graph_features(labels, sources, REACH, ("gap",))

    def from_json(self, obj: object) -> TemplateNASGenotype:
        """Read `TemplateNASGenotype.to_json` or the published list form, [templates, layers]."""
        if isinstance(obj, dict):
            if set(obj) != {"space", "templates", "layers"}:
                raise UserError(
                    'genotype: expected the keys "space", "templates" and "layers", '
                    f"got {sorted(map(str, obj))}"
                )
            if obj["space"] != self.name:
                raise UserError(
                    f'space: expected "{self.name}", got {shown(obj["space"])}; '
                    "read the genotype with the space that wrote it"
                )
            templates, layers = obj["templates"], obj["layers"]
        else:
            templates, layers = _list(obj, "genotype", 2, "[templates, layers] or an object")
        choices: list[Any] = []
        form = "[op1, op2, aggregation]"
        for t, row in enumerate(_list(templates, "templates", self.num_templates, f"[{form}, ..]")):
            choices += _list(row, f"template{t}", 3, form)
        form = "[input1, input2, template, repeats, stride]"
        for k, row in enumerate(_list(layers, "layers", self.num_layers, f"[{form}, ..]")):
            choices += _list(row, f"layer{k}", 5, form)
        for decision, choice in zip(self.decisions, choices, strict=True):
            words = {"op": OPERATIONS, "aggregation": AGGREGATIONS}.get(decision.head)
            if words and choice not in range(len(words)):
                known = ", ".join(f"{i} {word}" for i, word in enumerate(words))
                raise UserError(f"{decision.name}: expected one of {known}; got {shown(choice)}")
        return self.decode(choices)


def is_templates(published: Sequence[Any]) -> bool:
    """Whether a published list form is one of this space: that of Fast NAS has an integer where
    this has the first template."""
    return (
        bool(published)
        and isinstance(published[0], list | tuple)
        and all(isinstance(row, list | tuple) for row in published[0])
    )


def _rows(choices: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    return (choices[i : i + length] for i in range(0, len(choices), length))


def _list(obj: object, where: str, length: int, form: str) -> list[Any]:
    """`obj` if it is a list of that length, else UserError; `decode` checks the items."""
    if not isinstance(obj, list | tuple) or len(obj) != length:
        raise UserError(f"{where}: expected a list of {length}, {form}, got {shown(obj)}")
    return list(obj)
