"""Points of several objectives, all to be made small: fronts, their order, and hypervolume."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is nowhere worse than ``b``, and somewhere better."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, of equal ones the first."""
    return [
        i
        for i, point in enumerate(points)
        if point not in points[:i] and not any(dominates(other, point) for other in points)
    ]


def ranks(points: Sequence[Point]) -> list[int]:
    """Number of the front that each point is on, where a front is what is left without those
    before it (Deb et al., NSGA-II, 2002)."""
    found = [0] * len(points)
    fronts: list[list[Point]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):  # later ones dominate none before
        point = points[i]
        for members in fronts:
            if not any(dominates(other, point) for other in reversed(members)):
                break
            found[i] += 1
        else:
            fronts.append([])
        fronts[found[i]].append(point)
    return found


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume of what some of the points dominates, up to a reference point.

    It is found by slices along the last objective, each of one dimension less (While et al., A
    faster algorithm for calculating hypervolume, 2006).
    """
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    inside.sort(key=lambda p: p[-1])
    total, rest = 0.0, reference[:-1]
    slices: list[Point] = []
    for at, point in enumerate(inside):
        slices.append(point[:-1])
        end = inside[at + 1][-1] if at + 1 < len(inside) else reference[-1]
        if end > point[-1]:
            total += (end - point[-1]) * hypervolume(slices, rest)
    return total


def contribution(point: Point, others: Sequence[Point], reference: Point) -> float:
    """What a point adds to the hypervolume of others: its own, less what they dominate of it (While
    et al., A fast way of calculating exact hypervolumes, 2012). Exactly 0 where one dominates it.
    """
    shared = [tuple(map(max, point, other)) for other in others]
    known = hypervolume([shared[i] for i in front(shared)], reference)
    return hypervolume([point], reference) - known


def contributions(points: Sequence[Point], reference: Point) -> list[float]:
    """What each point adds to the hypervolume of the others."""
    return [
        contribution(point, [*points[:i], *points[i + 1 :]], reference)
        for i, point in enumerate(points)
    ]


class Scale:
    """Every objective in parts of its range over some points, from 0 to 1."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._low = tuple(min(column) for column in zip(*points))
        high = tuple(max(column) for column in zip(*points))
        self._range = tuple(b - a if b > a else 1.0 for a, b in zip(self._low, high, strict=True))

    def __call__(self, points: Sequence[Point]) -> list[Point]:
        """The points in these units."""
        return [
            tuple((x - a) / r for x, a, r in zip(p, self._low, self._range, strict=True))
            for p in points
        ]

    @property
    def reference(self) -> Point:
        """A point beyond all of them, in these units."""
        return (1.1,) * len(self._low)


def additions(points: Sequence[Point], others: Sequence[Point]) -> list[float]:
    """What each of other points adds to the hypervolume of some, with every objective in parts of
    its range; below 0, for one that adds nothing, how far it is from the front."""
    scale = Scale(points)
    scaled = scale(points)
    best = [scaled[i] for i in front(points)]
    found = []
    for point in scale(others):
        gain = contribution(point, best, scale.reference)
        if gain <= 0:
            shortest = min(max(x - y for x, y in zip(point, other, strict=True)) for other in best)
            gain = -max(shortest, 0.0)
        found.append(gain)
    return found


def spread(points: Sequence[Point], count: int) -> list[int]:
    """Indices of up to ``count`` points of a front that cover it: the best in each objective, from
    the first on, then what adds most to the hypervolume of those before. In the order of the first
    objective."""
    scale = Scale(points)
    scaled = scale(points)
    extremes = (min(range(len(points)), key=lambda i: column[i]) for column in zip(*points))
    chosen = list(dict.fromkeys(extremes))[:count]
    while len(chosen) < min(count, len(points)):
        rest = [i for i in range(len(points)) if i not in chosen]
        taken = [scaled[i] for i in chosen]
        chosen.append(max(rest, key=lambda i: contribution(scaled[i], taken, scale.reference)))
    return sorted(chosen, key=lambda i: points[i][0])
