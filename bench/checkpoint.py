"""What saving a checkpoint costs the training loop, and how long saving and restoring take in all.

python bench/checkpoint.py                       500 MB on 4 simulated devices
python bench/checkpoint.py --megabytes=100 --saves=2

Random float32 arrays, which do not compress, sharded over fsdp. The loop is as in recipes/fit.py: step, save, poll at
every step. The step is a toy that changes every array, with enough arithmetic to last as long as a small real one.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from bench import common  # noqa: E402
from parallel.layout import mesh as meshes  # noqa: E402
from runtime import usage  # noqa: E402
from runtime.checkpoint import Checkpoints  # noqa: E402

ARRAYS, COLUMNS = 15, 1024
NUM_DEVICES = 4


def make_state(mesh: jax.sharding.Mesh, megabytes: float) -> dict[str, Any]:
    """Arrays of equal size, named as the weights and moments of a model would be."""
    rows = int(megabytes * 1e6 / 4 / ARRAYS / COLUMNS) // NUM_DEVICES * NUM_DEVICES
    sharding = NamedSharding(mesh, P("fsdp"))
    make = jax.jit(lambda key: jax.random.normal(key, (rows, COLUMNS)), out_shardings=sharding)
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    return {"step": jnp.zeros((), jnp.int32), "params": {f"w{i:02}": make(key) for i, key in enumerate(keys)}}


def make_step(seconds: float, mesh: jax.sharding.Mesh) -> Any:
    """A step that changes every array and multiplies matrices for about so many seconds."""

    def step(state: Any, rounds: jax.Array) -> tuple[Any, jax.Array]:
        x = jax.lax.with_sharding_constraint(jnp.ones((1024, 1024)) / 1024, NamedSharding(mesh, P("fsdp")))
        y = jnp.ones((1024, 1024)) / 1024
        x = jax.lax.fori_loop(0, rounds, lambda _, x: x @ y, x)
        return jax.tree.map(lambda w: w + 1, state), jnp.sum(x)

    donating, keeping = jax.jit(step, donate_argnums=0), jax.jit(step)
    idle = {"w": jnp.zeros(4)}
    float(keeping(idle, 100)[1])
    rounds = max(1, round(100 * seconds / common.clock(lambda: float(keeping(idle, 100)[1]))[0]))
    return lambda state: donating(state, rounds)


class Loop:
    """Steps of the training loop, each timed."""

    def __init__(self, checkpoints: Checkpoints, state: Any, step: Any):
        self.checkpoints, self.state, self._step = checkpoints, state, step

    def step(self) -> tuple[float, bool]:
        """Seconds of one step with its poll, and whether a save was committed in it."""
        start = time.perf_counter()
        self.state, result = self._step(self.state)
        float(result)
        committed = bool(self.checkpoints.poll())
        return time.perf_counter() - start, committed

    def save(self, number: int, quiet: int) -> dict[str, float]:
        """`quiet` steps, a save, and steps until it is committed."""
        usual = statistics.median(self.step()[0] for _ in range(quiet))
        start = time.perf_counter()
        self.checkpoints.save(number, self.state, None)
        call = time.perf_counter() - start
        seconds, committed = [], False
        while not committed:
            last, committed = self.step()
            seconds.append(last)
        return {
            "usual step": usual,
            "call": call,
            "next step slower": seconds[0] - usual,
            "added": call + sum(seconds) - usual * len(seconds),
            "steps until committed": len(seconds),
            "total": time.perf_counter() - start,
        }


def main() -> None:
    parser = usage.parser(__doc__, "python bench/checkpoint.py")
    parser.add_argument("--megabytes", type=float, default=500, help="of a checkpoint")
    parser.add_argument("--saves", type=int, default=5, help="how many")
    parser.add_argument("--step-seconds", type=float, default=0.3, help="of the toy's step")
    parser.add_argument("--quiet-steps", type=int, default=10, help="before each save: how long a step usually takes")
    args = parser.parse_args()
    meshes.simulate(NUM_DEVICES)
    mesh = meshes.build({"fsdp": NUM_DEVICES})
    report = common.Report("checkpoint")
    state = make_state(mesh, args.megabytes)
    megabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        loop = Loop(checkpoints, state, make_step(args.step_seconds, mesh))
        loop.step()
        loop.save(0, 2)  # compiles the digest
        saves = [loop.save(number, args.quiet_steps) for number in range(1, args.saves + 1)]
        middle = {name: statistics.median(save[name] for save in saves) for name in saves[0]}
        final, newest = loop.state, args.saves
        checkpoints.save(newest + 1, final, None)
        checkpoints.finish()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), final)
        seconds, (restored, number) = common.clock(checkpoints.restore, abstract, print)
        same = jax.tree.map(lambda a, b: bool(np.array_equal(np.asarray(a), np.asarray(b))), restored, final)
        assert number == newest + 1 and all(jax.tree.leaves(same)), "what was restored is not what was saved"
        checkpoints.close()
    report.row("state", megabytes, "MB")
    report.row("usual step", middle["usual step"], "s")
    report.row("save: the call, digest included", middle["call"], "s", at_most=0.3)
    report.row("save: the next step is slower by", middle["next step slower"], "s")
    report.row("save: the call and the slower next step", middle["call"] + middle["next step slower"], "s")
    report.row("save: all that it adds to the loop until committed", middle["added"], "s")
    report.row("save: until committed", middle["total"], "s")
    report.row("restore and verify", seconds, "s")
    report.details["saves"] = saves
    report.finish()


if __name__ == "__main__":
    main()
