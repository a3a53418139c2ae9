"""How a strategy's whole state lies on the mesh."""

import jax
from jax.sharding import PartitionSpec as P

from parallel.exchange import AXIS
from parallel.rules import path_name
from parallel.strategies import State, Strategy


def state_specs(strategy: Strategy, state: State) -> State:
    """PartitionSpecs of the (abstract) state.

    An array that mirrors a parameter (same path at its end, same shape) is sharded like it; with one more leading
    dimension R, over `replica` too. What each replica has besides lies with the replica. The rest is replicated.
    """
    R = strategy.exchange.replicas
    shapes, specs = jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(strategy.specs)
    params = {path_name(path): (leaf.shape, spec) for (path, leaf), spec in zip(shapes, specs, strict=True)}

    def spec_of(path, leaf) -> P:
        names = path_name(path).split("/")
        for start in range(len(names)):
            shape, spec = params.get("/".join(names[start:]), (None, None))
            if shape is None:
                continue
            if leaf.shape == shape:
                return spec
            if leaf.shape == (R, *shape):
                return P(AXIS, *spec)
            if len(leaf.shape) == len(shape) + 1 and leaf.shape[2:] == shape[1:]:  # layers in groups
                return P(None, *spec)
        return P(AXIS) if "replicas" in names else P()

    specs = jax.tree_util.tree_map_with_path(spec_of, state)
    specs.codec = strategy.codec_specs()
    return specs
