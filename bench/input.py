"""How fast batches are built and placed, against how fast the quickstart's step uses them up (one device).

python bench/input.py
"""

import functools
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax  # noqa: E402
import numpy as np  # noqa: E402

from bench import common  # noqa: E402
from configs import quickstart  # noqa: E402
from data.loader import Loader  # noqa: E402
from parallel.layout import mesh as meshes  # noqa: E402
from parallel.layout import placement  # noqa: E402
from recipes import build, language, programs  # noqa: E402
from runtime import usage  # noqa: E402

FOR_EVER = 10**9


def main() -> None:
    parser = usage.parser(__doc__, "python bench/input.py")
    parser.add_argument("--pairs", type=int, default=12, help="of timings, each in turn")
    parser.add_argument("--batches", type=int, default=200, help="in each timing of the input pipeline")
    parser.add_argument("--steps", type=int, default=3, help="in each timing of the train step")
    args = parser.parse_args()
    report, config = common.Report("input"), quickstart.get_config()
    corpus = language.read_corpus(config.data)
    parts = build.build(config, meshes.build({}))
    loader = Loader(corpus.train_N, seq_len=config.data.seq_len, batch_size=config.data.batch_size, seed=config.seed)

    place = functools.partial(placement.place_train, parts.mesh, parts.replicas, loader.batch_size)

    batches = loader.batches(0, FOR_EVER, place)
    step, state = programs.compile_steps(parts)["step"], programs.compile_init(parts)(np.uint32(config.seed))
    batch = next(batches)

    def read() -> float:
        """Seconds a batch, built by the background thread and ready on the device."""
        return (
            common.clock(lambda: [jax.block_until_ready(next(batches)) for _ in range(args.batches)])[0] / args.batches
        )

    def train() -> float:
        """Seconds a step."""
        nonlocal state

        def run() -> None:
            nonlocal state
            for _ in range(args.steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)

        return common.clock(run)[0] / args.steps

    timing = common.in_turn(train, read, args.pairs)
    tokens = config.data.batch_size * config.data.seq_len
    report.row("input pipeline", tokens / timing["b_seconds"]["median"], "tokens/s")
    report.row("quickstart's step uses", tokens / timing["a_seconds"]["median"], "tokens/s")
    report.row("input pipeline / step", timing["ratio"], "times", at_least=20)
    report.details["timing"] = timing
    batches.close()
    report.finish()


if __name__ == "__main__":
    main()
