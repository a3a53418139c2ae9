"""Memory and bytes on the wire of our step and of a hand-written one on 8 simulated devices. Prints JSON.

python bench/sharded.py      (bench/step.py runs it and makes the table)

The hand-written one has the same shardings of weights and residual stream and leaves the rest to XLA.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from bench import common, handwritten, step  # noqa: E402
from parallel.cost import wire  # noqa: E402
from runtime import usage  # noqa: E402

MESHES = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2})


class ShardedHand:
    """The hand-written step over a mesh, from our weights."""

    def __init__(self, config: Any, mesh: Mesh, params: Any, batches: np.ndarray, policy: str):
        optimizer = handwritten.make_optimizer(step.recipe(config))
        shardings = jax.tree.map(lambda x: x.sharding, params := handwritten.from_ours(params))
        everywhere, by_batch = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))
        residual = NamedSharding(mesh, P("fsdp", "tensor", None))
        opt_shardings = optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(optimizer.init, params),
            shardings,
            transform_non_params=lambda _: everywhere,
        )
        run = handwritten.make_step(optimizer, policy, lambda x: jax.lax.with_sharding_constraint(x, residual))
        jitted = jax.jit(run, donate_argnums=(0, 1), out_shardings=(shardings, opt_shardings, everywhere))
        self.params = jax.tree.map(jax.numpy.copy, params)
        self.opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(self.params)
        self.batches = [jax.device_put((b[:, :-1], b[:, 1:]), by_batch) for b in batches]
        self.compiled = jitted.lower(self.params, self.opt_state, *self.batches[0]).compile()
        self.count = 0

    def __call__(self) -> float:
        self.params, self.opt_state, metrics = self.compiled(self.params, self.opt_state, *self.batches[self.count])
        self.count += 1
        return float(metrics["loss"])


def compare(name: str, sizes: dict[str, int], policy: str) -> dict[str, Any]:
    config = step.load(name)
    batches = step.random_batches(config)
    parts = step.build(config, **sizes)
    ours = step.Ours(parts, batches)
    hand = ShardedHand(config, parts.mesh, ours.state.params, batches, policy)
    where = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
    worst = step.check_same_losses(f"{name} on {where}", ours, hand, num=3)
    return {
        "model": name,
        "mesh": where,
        "losses differ by": worst,
        "ours": describe(ours.compiled, parts.mesh),
        "hand": describe(hand.compiled, parts.mesh),
    }


def describe(compiled: Any, mesh: Mesh) -> dict[str, Any]:
    hlo = compiled.as_text()
    kinds: dict[str, float] = {}
    for c in wire.collectives(hlo, mesh):
        kinds[f"{c.kind} over {c.axis}"] = kinds.get(f"{c.kind} over {c.axis}", 0) + c.sent
    return {
        "temporary": common.temporary_bytes(compiled),
        "wire": wire.per_axis(hlo, mesh),
        "collectives": kinds,
    }


def main() -> None:
    parser = usage.parser(__doc__, "python bench/sharded.py")
    parser.add_argument("--models", default=",".join(step.MODELS), help="with commas between")
    parser.add_argument("--policy", default="matmuls", choices=handwritten.POLICIES, help="what the hand-written keeps")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps([compare(name, sizes, args.policy) for name in args.models.split(",") for sizes in MESHES]))


if __name__ == "__main__":
    main()
