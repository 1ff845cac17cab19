"""What disks, copies and editors do to a file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def flip(data: bytearray, rng: random.Random) -> None:
    """Some bits."""
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def other_digit(data: bytearray, rng: random.Random) -> None:
    """A digit that is another one: text stays what it looks like."""
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if places:
        place = rng.choice(places)
        data[place] = ord(rng.choice("0123456789".replace(chr(data[place]), "")))


def cut(data: bytearray, rng: random.Random) -> None:
    """The end is missing."""
    del data[rng.randrange(len(data)) :]


def hole(data: bytearray, rng: random.Random) -> None:
    """A block is zero."""
    first, last = _block(data, rng)
    data[first:last] = bytes(last - first)


def swap(data: bytearray, rng: random.Random) -> None:
    """Two blocks have changed places."""
    size = min(rng.choice((1, 16, 64, 512)), len(data) // 2)
    one, other = (rng.randrange(len(data) - size + 1) for _ in range(2))
    first, second = data[one : one + size], data[other : other + size]
    data[one : one + size], data[other : other + size] = second, first


def lose(data: bytearray, rng: random.Random) -> None:
    """A block in the middle is missing."""
    first, last = _block(data, rng)
    del data[first:last]


def more(data: bytearray, rng: random.Random) -> None:
    """Something follows."""
    data += rng.randbytes(rng.choice((1, 7, 512)))


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip,
    other_digit,
    cut,
    hole,
    swap,
    lose,
    more,
)


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; returns how, for whoever has to repeat it."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(DAMAGES) if data else more
    kind(data, rng)
    path.write_bytes(data)
    return kind.__name__


def _block(data: bytearray, rng: random.Random) -> tuple[int, int]:
    first = rng.randrange(len(data))
    return first, min(len(data), first + rng.choice((1, 16, 64, 512, 4096)))
