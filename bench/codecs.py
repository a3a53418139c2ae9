"""What coding a message costs: time beside the quickstart's step, memory beside what is coded.

python bench/codecs.py             3 minutes on 2 cores
python bench/codecs.py --tpu       memory only, compiled for a TPU v5p without one (needs libtpu; 2 minutes)

Time: encoding all parameters of the quickstart, packing included, and decoding them, two programs as on two hosts, in
turn with its training step. Memory: the compiler's own figure for one exchange with error feedback over 4 devices, its
temporaries in units of one array of 16 M elements, for one such array and for four. Allowed are two arrays, and what is
in flight (parallel/cost/bytes.py): messages sent and received; of the codecs with rounds the arrays too, which wait for
them.
"""

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from bench import common  # noqa: E402
from bench.step import Ours, load, random_batches  # noqa: E402
from parallel.cost.bytes import in_flight_bytes  # noqa: E402
from parallel.exchange import exchange as exchanges  # noqa: E402
from parallel.exchange import residuals  # noqa: E402
from parallel.exchange.codecs import CODECS  # noqa: E402
from parallel.exchange.codecs.base import is_round  # noqa: E402
from parallel.exchange.exchange import Feedback  # noqa: E402
from parallel.exchange.units import Leaf  # noqa: E402
from parallel.layout import mesh as meshes  # noqa: E402
from recipes import build  # noqa: E402
from runtime import usage  # noqa: E402

SHAPE = (4096, 4096)
BLOCKS = [name for name, kind in CODECS.items() if not is_round(kind) and name != "none"]
TIMED = {"int8": 0.15, "int4": 0.15}  # codec: share of a step that it may take


def time_beside_a_step(report: common.Report, pairs: int) -> None:
    config = load("quickstart")
    parts = build.build(config, meshes.build({}, jax.devices()[:1]))
    ours = Ours(parts, random_batches(config))
    n = build.num_parameters(parts)
    for name in BLOCKS:
        codec = CODECS[name]()
        x = jnp.asarray(np.random.default_rng(0).standard_normal(-(-n // codec.block) * codec.block), jnp.float32)
        encode = jax.jit(lambda x, codec=codec: codec.encode(x, jax.random.key(0) if codec.uses_key else None))
        decode = jax.jit(codec.decode)

        def code(encode=encode, decode=decode, x=x) -> Any:
            return jax.block_until_ready(decode(encode(x)))

        found = common.in_turn(lambda code=code: common.clock(code)[0], lambda: common.clock(ours)[0], pairs)
        report.row(f"{name}: encode + decode / a step of the quickstart", found["ratio"], at_most=TIMED.get(name))
        report.details[f"time {name}"] = found


def temporaries(devices: Any, codec: str, form: str, arrays: int) -> tuple[float, float]:
    """Of one exchange of so many arrays over 4 devices, in units of one array's bytes; and what is in flight of it."""
    mesh = meshes.build({"replica": 4}, devices[:4])
    leaves = {f"w{i}": Leaf(f"w{i}", SHAPE, P(None, None), 0, 1) for i in range(arrays)}
    exchange = exchanges.build(CODECS[codec](), form, mesh, 4, leaves, Feedback())
    shaped = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    tree = {name: shaped((4, *SHAPE), np.float32, P("replica")) for name in leaves}
    state = jax.eval_shape(lambda: residuals.init(exchange))
    state = jax.tree.map(lambda x, spec: shaped(x.shape, x.dtype, spec), state, exchange.state_specs)
    # Residuals are donated, as by a step. The tree is not: a step makes it, and as an argument it would be copied.
    # Shardings are given, as by a step: else the compiler may put means, not new residuals, where residuals were.
    shardings = {name: NamedSharding(mesh, P()) for name in leaves}, jax.tree.map(lambda x: x.sharding, state)
    program = jax.jit(exchange.mean, donate_argnums=1, out_shardings=shardings)
    compiled = program.lower(tree, state, shaped((), np.int32, P())).compile()
    array = 4 * SHAPE[0] * SHAPE[1]
    return common.temporary_bytes(compiled) / array, in_flight_bytes(exchange) / array


def memory(report: common.Report, devices: Any, where: str) -> None:
    for codec in CODECS:
        for arrays, what in ((1, "an array"), (4, "four arrays")):
            used, in_flight = temporaries(devices, codec, "auto", arrays)
            report.row(f"{codec}, {where}: temporaries / array, {what}", used, "×", at_most=2 + in_flight)


def main() -> None:
    parser = usage.parser(__doc__, "python bench/codecs.py")
    parser.add_argument("--pairs", type=int, default=12, help="of timings, each in turn")
    parser.add_argument("--tpu", action="store_true", help="memory only, compiled for a TPU")
    args = parser.parse_args()
    meshes.simulate(4)
    report = common.Report("codecs-tpu" if args.tpu else "codecs")
    if args.tpu:
        from jax.experimental import topologies

        chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
        memory(report, chips, "TPU")
    else:
        time_beside_a_step(report, args.pairs)
        memory(report, jax.devices(), "CPU")
    report.finish()


if __name__ == "__main__":
    main()
