"""A machine that is not here, read from its name.

`[N×]SLICE`, written 2xv5p-64: N slices or sites, joined by the slow link. A SLICE is h100:8 (one host), h100:4x8 (hosts
× devices of each), v5p-128 (the cloud's name: up to v5p it counts TensorCores, two to a chip) or v5p:4x4x4 (chips along
each side).
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.cost.hardware import Chip, GiB
from parallel.layout.mesh import gpu_share

FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}  # v5e, v6e
SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}  # v4, v5p: below one cube, no links around
CUBE = 4  # chips along each side of the cubes that larger ones are made of
ALSO = {"v5litepod": "v5e"}


@dataclass(frozen=True)
class Target:
    """sides: chips along each side of a TPU slice; hosts and devices of each for GPUs."""

    text: str
    chip: Chip
    slices: int
    sides: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.sides)

    @property
    def hosts(self) -> int:
        if not self.chip.is_tpu:
            return self.slices * self.sides[0]
        return self.slices * -(-math.prod(self.sides) // 4)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Of each side of a TPU slice: whether its ends are linked, too."""
        if not self.chip.is_tpu:
            return ()
        if len(self.sides) == 3:
            return (math.prod(self.sides) >= CUBE**3,) * 3
        return tuple(side == max(FLAT.values())[0] for side in self.sides)

    @property
    def memory(self) -> int:
        """Bytes that a program may have on one chip."""
        return self.chip.memory if self.chip.is_tpu else int(self.chip.memory * gpu_share())

    def said(self) -> str:
        """What was understood: `v5p-128 = 64 chips 4×4×4, wrapped, 95.7 GiB each`."""
        each, size = f"{self.chip.memory / GiB:.1f} GiB each", "×".join(map(str, self.sides))
        several = f"{self.slices} slices of " if self.slices > 1 else ""
        if not self.chip.is_tpu:
            hosts, devices = self.sides
            several = f"{self.slices} sites of " if self.slices > 1 else ""
            of = f"{hosts} hosts of {devices}" if hosts > 1 else f"one host of {devices}"
            return f"{self.text} = {several}{of} {self.chip.kind}, {each}, of which a program gets {gpu_share():.0%}"
        chips = math.prod(self.sides)
        around = [side for side, wrapped in zip(self.sides, self.wrap, strict=True) if wrapped]
        how = (
            "not wrapped"
            if not around
            else "wrapped"
            if len(around) == len(self.sides)
            else f"wrapped along {around[0]}"
        )
        return f"{self.text} = {several}{chips} chip{'s' * (chips > 1)} {size}, {how}, {each}"

    def rate(self, devices: Any) -> float:
        """Bytes a second that one chip sends in collectives of these devices, at best. devices: [group, member], as
        they stand along the axis of a mesh."""
        places = [[self._place(d) for d in group] for group in devices]
        together = [Counter(fast for fast, _ in group) for group in places]
        if any(len(count) > 1 for count in together):
            # A ring leaves a host once, and in parts, one over the adapter of each of its members there.
            members = 1 if self.chip.is_tpu else min(min(count.values()) for count in together)
            return min(self.chip.inside or math.inf, members * self.chip.outside)
        if not self.chip.is_tpu:
            return self.chip.inside
        taken = [max(len({where[n] for _, where in group}) for group in places) for n in range(len(self.sides))]
        links = [
            (2 if wraps and n == side else 1) * (n > 1)
            for n, side, wraps in zip(taken, self.sides, self.wrap, strict=True)
        ]
        return self.chip.link * max(1, sum(links))

    def _place(self, device: Any) -> tuple[int, tuple[int, ...]]:
        """(what is joined by fast links alone, where in it)."""
        if not self.chip.is_tpu:
            return device.id // self.sides[1], (device.id % self.sides[1],)
        return getattr(device, "slice_index", 0), tuple(device.coords)


# ── from its name ─────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(text: str, chips: Mapping[str, Chip]) -> Target:
    """Raises ValueError for what cannot be rented, or is no machine, with the nearest that is."""
    found = re.fullmatch(
        r"(?:(\d+)[x×](?=[a-z]))?([a-z][a-z0-9-]*?)(?:(?::|(?<=[a-z0-9])-(?=\d+$))([0-9x×]+))?", text.strip()
    )
    if "+" in text:
        raise ValueError(f"target={text}: + joins unequal sites, and one program runs on equal ones: name one of them")
    slices = int(found[1] or 1) if found else 1
    name, size = (ALSO.get(found[2], found[2]), found[3]) if found else (re.split("[:-]", text)[0], None)
    chip, known = chips.get(name), _with_size(chips)
    if chip is None or not chip.largest:
        near = difflib.get_close_matches(name.lower(), known, 1, 0.0)[0]
        why = f"{name} is known by its speed alone" if chip else f"{name!r} is no chip that is known"
        raise ValueError(f"target={text}: {why}: did you mean {_example(chips[near])}? ({', '.join(known)})")
    numbers = [int(n) for n in re.split("[x×]", size or "") if n]
    if slices < 1 or not numbers or 0 in numbers or (found and ":" not in text and len(numbers) > 1):
        raise ValueError(f"target={text}: expected how many {name}, as in {_example(chip)}")
    sides = _tpu(text, chip, numbers, ":" in text) if chip.is_tpu else _gpu(text, chip, numbers, ":" in text)
    return Target(text, chip, slices, sides)


def _with_size(chips: Mapping[str, Chip]) -> list[str]:
    return [name for name, chip in chips.items() if chip.largest]


def _example(chip: Chip) -> str:
    return f"{chip.name}:{chip.largest}" if not chip.is_tpu else f"{chip.name}-{64 * chip.cores}"


def _gpu(text: str, chip: Chip, numbers: list[int], colon: bool) -> tuple[int, ...]:
    if not colon or len(numbers) > 2:
        raise ValueError(
            f"target={text}: GPUs are counted as {chip.name}:{chip.largest} (one host) or {chip.name}:4x{chip.largest} "
            "(hosts × devices of each)"
        )
    hosts, devices = numbers if len(numbers) == 2 else (1, numbers[0])
    if devices > chip.largest:
        several = f": {chip.name}:{-(-devices * hosts // chip.largest)}x{chip.largest}"
        raise ValueError(
            f"target={text}: a host has at most {chip.largest} {chip.name}{several} has as many in several"
        )
    return hosts, devices


def _tpu(text: str, chip: Chip, numbers: list[int], colon: bool) -> tuple[int, ...]:
    if colon and len(numbers) != chip.sides:
        example = "×".join(map(str, sides_of(chip, 64) or ()))
        raise ValueError(f"target={text}: a slice of {chip.name} has {chip.sides} sides, as 64 chips are {example}")
    chips = math.prod(numbers) if colon else numbers[0] / chip.cores
    if chips > chip.largest:
        counted = f"{-(-int(chips) // chip.largest)}x{chip.name}-{chip.largest * chip.cores}"
        raise ValueError(
            f"target={text}: {int(chips)} chips are no slice that can be rented; the largest is {chip.name}-"
            f"{chip.largest * chip.cores}. {counted} has as many in several, joined by the slow link"
        )
    sides = sides_of(chip, int(chips)) if chips == int(chips) else None
    if colon and sides and sorted(numbers) != sorted(sides) and _is_of_cubes(chip, numbers):
        sides = tuple(sorted(numbers))  # another form than the cloud's names have
    if sides is None or (colon and sorted(numbers) != sorted(sides)):
        raise ValueError(
            f"target={text}: no slice of {chip.name} has this size; the nearest are {_nearest(chip, chips)}"
        )
    return sides


def _is_of_cubes(chip: Chip, numbers: list[int]) -> bool:
    return chip.sides == 3 and all(n % CUBE == 0 for n in numbers)


def sides_of(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """Of the slice that the cloud rents under this number of chips; None: it rents none."""
    if chip.sides == 2:
        return FLAT.get(chips)
    if chips < CUBE**3:
        return SMALL.get(chips)
    n = chips // CUBE**3
    forms = [
        (a, b, n // a // b) for a in range(1, n + 1) if n % a == 0 for b in range(a, n // a + 1) if n // a % b == 0
    ]
    forms = [form for form in forms if form[1] <= form[2]]
    if chips % CUBE**3 or chips > chip.largest:
        return None
    return tuple(CUBE * side for side in min(forms, key=sum))  # the one nearest to a cube


def sizes(chip: Chip) -> list[int]:
    """Chips of every slice that can be rented under a name, smallest first."""
    if chip.sides == 2:
        return list(FLAT)
    return [*SMALL, *range(CUBE**3, chip.largest + 1, CUBE**3)]


def _nearest(chip: Chip, chips: float) -> str:
    below = [n for n in sizes(chip) if n <= chips][-1:]
    above = [n for n in sizes(chip) if n > chips][:1]
    return " and ".join(f"{chip.name}-{n * chip.cores} ({n} chips)" for n in below + above)


# ── others like it ────────────────────────────────────────────────────────────────────────────────────────────────────


def larger(target: Target, chips: Mapping[str, Chip]) -> Target | None:
    """As many chips of the next larger kind, to read there what was refused; None: there is none."""
    name = {"v5e": "v6e", "v6e": "v5p", "v4": "v5p"}.get(target.chip.name)
    sides = sides_of(chips[name], math.prod(target.sides)) if name else None
    if name is None or sides is None:
        return None
    count = math.prod(sides) * chips[name].cores
    return Target(f"{f'{target.slices}x' * (target.slices > 1)}{name}-{count}", chips[name], target.slices, sides)


def wider(target: Target, factor: int) -> Target | None:
    """As many slices of so many times the chips; None: they cannot be rented."""
    chip, chips = target.chip, math.prod(target.sides) * factor
    head = f"{target.slices}x" if target.slices > 1 else ""
    if chip.is_tpu:
        sides = sides_of(chip, chips)
        return Target(f"{head}{chip.name}-{chips * chip.cores}", chip, target.slices, sides) if sides else None
    hosts, devices = target.sides
    more = (hosts, devices * factor) if hosts * devices * factor <= chip.largest else (hosts * factor, devices)
    size = "x".join(map(str, more)) if more[0] > 1 else str(more[1])
    return Target(f"{head}{chip.name}:{size}", chip, target.slices, more)
