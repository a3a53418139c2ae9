"""Logs with a few small arrays in them, and members that train nothing, for tests."""

from typing import Any

import helpers
import numpy as np

from islands import founding
from islands import member as members
from islands.member import Member, Push, push_of
from islands.payload import Draw, Part
from islands.store import Store

SIZES = {"v": 3, "w": 5000}


def config(**changes: Any) -> Any:
    """Keys of a config with __ for the dots, as helpers.tiny takes them."""
    island = {"sync__strategy": "island", "sync__interval": 2, "sync__outer__optimizer": "sgd", "sync__outer__lr": 1.0}
    return helpers.tiny(**island | changes)


def params(seed: int = 0) -> dict[str, np.ndarray]:
    """Small whole numbers: differences are exact."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-8, 8, size).astype(np.float32) for name, size in SIZES.items()}


def begin(store: Store, snapshots: int = 0, encrypt: bool = False, **changes: Any) -> dict[str, np.ndarray]:
    """A log; the first parameters."""
    from islands.store import run

    run(store.prepare())
    first = params()
    founding.begin(store, config(**changes), first, snapshots, encrypt)
    return first


def encoded(member: Member, delta: dict[str, np.ndarray]) -> list[bytes]:
    """Blobs, with the manifest as the last one."""
    parts = [Part(name, 0, x) for name, x in delta.items()]
    return push_of(member.follower, members.encoded(member.follower, parts, Draw(0, member.name, 0)))


def push(member: Member, delta: dict[str, np.ndarray], base: int) -> None:
    member.push(Push(encoded(member, delta), base, 2, 100))
