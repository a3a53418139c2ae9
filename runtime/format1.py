"""Reads checkpoints of format 1, whose arrays were named by their positions in the trees of optax.

`translate` gives a record of today's names. An array may have lain otherwise: `stored` is its name on the disk, and
`fragments` says that fragments were in front, [F, …, L/F, …]; `restack` puts their layers in the order of the model.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

SLOTS = {"mu": "first", "nu": "second", "trace": "momentum"}
MOMENTUM = {"momentum": "momentum", "variance": "second"}  # of optimizers that exchange momentum
NEW_UNIT = re.compile(r"small (\w+)")
KINDS = (
    ("codec/worker/", "owed"),
    ("codec/rounds/", "drawn"),
    ("codec/fragments/rounds/", "drawn"),
    ("codec/rest/rounds/", "drawn"),
    ("codec/", "owed"),
    ("strategy/pending/", "in flight"),
    ("strategy/replicas/", "replica"),
    ("strategy/outer/replicas/", "replica"),
    ("strategy/finite", "flag"),
)


def translate(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as if it had been written today; its sums are those of the arrays as they are stored."""
    old = record["arrays"]
    names = _Names(old)
    arrays: dict[str, Any] = {}
    for name, x in old.items():
        new, fragments = names.new(name)
        if new is None or new in arrays:
            continue  # a constant, or a second count of the same
        shape = list(x["shape"])
        if fragments is not None:
            shape = [*shape[1 : 1 + fragments], shape[0] * shape[1 + fragments], *shape[2 + fragments :]]
        arrays[new] = {**x, "shape": shape, "kind": _kind(new), "stored": name, "fragments": fragments}
        arrays[new] |= {"stored_shape": x["shape"]} if fragments is not None else {}
    return {**record, "format": 2, "arrays": arrays}


def restack(x: jax.Array, leading: int, sharding: Any) -> jax.Array:
    """[F, leading…, L/F, …] -> [leading…, L, …]: layer j of fragment p is layer j · F + p of the model."""

    def in_order(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1 + leading)
        return x.reshape(*x.shape[:leading], -1, *x.shape[leading + 2 :])

    return jax.jit(in_order, out_shardings=sharding)(x)


def as_stored(x: Mapping[str, Any], wanted: Any) -> jax.ShapeDtypeStruct:
    """Where to put an array that lies with its fragments in front."""
    sharding = NamedSharding(wanted.sharding.mesh, P(None, *wanted.sharding.spec))
    return jax.ShapeDtypeStruct(tuple(x["stored_shape"]), wanted.dtype, sharding=sharding)


class _Names:
    def __init__(self, old: Mapping[str, Any]):
        self.local = any(name.startswith("strategy/replicas/") for name in old)
        self.onebit = any(name.startswith("opt_state/variance/") for name in old)

    def new(self, name: str) -> tuple[str | None, int | None]:
        """(today's name, None if there is none; how many dimensions stand between fragments and layers)."""
        first, _, rest = name.partition("/")
        if first == "opt_state":
            where = "strategy/outer/shared" if self.local else "opt"
            return self._optimizer(where, rest), 0 if rest.startswith("fragments/") and "/blocks/" in rest else None
        if first == "guard":
            return self._guard("strategy/rounds" if self.local else "guard", rest), None
        if first == "codec":
            return self._codec(rest)
        for owner in ("strategy/replicas/", "strategy/outer/replicas/"):
            if name.startswith(f"{owner}opt_state/"):
                return self._optimizer(f"{owner}opt", name.removeprefix(f"{owner}opt_state/")), None
            if name.startswith(f"{owner}guard/"):
                return self._guard(f"{owner}guard", name.removeprefix(f"{owner}guard/")), None
        return name, None

    def _optimizer(self, where: str, rest: str) -> str | None:
        """…/mu/<weight> of a chain, wherever it stood, or momentum/<weight>."""
        slot, _, weight = rest.partition("/")
        if slot in MOMENTUM and not self.local:
            return f"{where}/{weight}/{'first' if self.onebit and slot == 'momentum' else MOMENTUM[slot]}"
        if match := re.search(r"(?:^|/)(mu|nu|trace)/(.+)$", rest):
            return f"{where}/{match[2]}/{SLOTS[match[1]]}"
        return f"{where}/count" if rest.endswith("count") and "ns_coeffs" not in rest else None

    def _guard(self, where: str, counter: str) -> str | None:
        return None if counter == "norms_W" else f"{where}/{counter}"  # of other norms, in a ring

    def _codec(self, rest: str) -> tuple[str, int | None]:
        rest = NEW_UNIT.sub(lambda m: "small exact" if m[1] == "Identity" else "small", rest)
        if match := re.match(r"(fragments|rest)/worker/(.+)$", rest):
            return f"codec/worker/{match[2]}", 1 if match[1] == "fragments" else None
        return f"codec/{rest}", None


def _kind(name: str) -> str:
    kind = next((kind for prefix, kind in KINDS if name.startswith(prefix)), "shared")
    return "flag" if kind == "in flight" and name.endswith("/finite") else kind
