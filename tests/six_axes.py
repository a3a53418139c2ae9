"""All six axes at 2 on 64 simulated devices, for tests/test_factorings.py; jax must not be imported before:

python tests/six_axes.py              the loss and the gradients of one device
python tests/six_axes.py "sync int4"  an exchange of helpers.py's: nothing stray over `replica`, and the loss falls
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from parallel.layout import mesh as meshes  # noqa: E402

meshes.simulate(64)

import helpers  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from runtime.digest import named_arrays  # noqa: E402

ALL, ALONE = (2, 2, 2, 2, 2, 2), (1, 1, 1)
SMALL = {
    "model__model_dim": 32, "model__num_heads": 4, "model__num_kv_heads": 4, "model__mlp_dim": 32, "data__batch_size":
    16, "attention__context": "ring", "optimizer__accumulate": 2,
}  # fmt: skip


def first_step(config, mesh: tuple[int, ...]) -> tuple[float, dict[str, np.ndarray]]:
    """Of the first step: (loss, exchanged gradients). Over `replica` go they and a few scalars."""
    parts = helpers.build(config, mesh)

    def run(state, batch_RBT):
        messages_R, _, _, metrics = parts.strategy.messages(state, batch_RBT)
        return metrics["loss"], parts.strategy.mean(messages_R, state.codec, state.step)[0]

    state, batch = helpers.init_state(config, parts), helpers.batch(config, parts, 0, uneven=True)
    program = jax.jit(run).lower(state, jax.tree.map(lambda x: x[0], batch)).compile(compiler_options=helpers.QUICKLY)
    sent = helpers.messages(program.as_text(), parts.mesh)
    assert all("exchange" in c.scope for c in sent) and bool(sent) == (parts.mesh.shape["replica"] > 1)
    loss, gradients = program(state, jax.tree.map(lambda x: x[0], batch))
    return float(loss), {name: np.asarray(x) for name, x in named_arrays(gradients).items()}


def main(name: str) -> None:
    if name:
        rank = {"sync__rank": 1} if "powersgd" in name else {}
        config = helpers.tiny(**SMALL, model__experts=4, **helpers.EXCHANGES[name], **rank)
        helpers.check_exchange_alone(config, helpers.build(config, ALL))
        return
    config = helpers.tiny(**SMALL, **helpers.dropless(4))
    (loss, gradients), (wanted, exact) = (first_step(config, mesh) for mesh in (ALL, ALONE))
    total = np.sqrt(sum(np.sum(g**2) for g in exact.values()))
    apart = max(np.linalg.norm(gradients[k] - g) / max(np.linalg.norm(g), 1e-3 * total) for k, g in exact.items())
    print(f"losses {abs(loss / wanted - 1):.1e} gradients {apart:.1e} apart")
    assert abs(loss / wanted - 1) <= 5e-6 and apart <= 2e-5


if __name__ == "__main__":
    main(sys.argv[1])
