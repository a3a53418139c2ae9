"""Layers before those that have experts, each with one feed-forward half for all tokens (DeepSeek-AI 2024, "first k
dense"). They are no part of a pipeline: like the embedding they lie outside of it, and rows are cut over stages, too.

F such layers, N rows, T sequence, D model.
"""

from dataclasses import replace
from typing import Any

import jax
from jax import lax

from model.config import Compute, ModelConfig
from model.transformer import FIRST, Params, Transformer


class First(Transformer):
    """c: their config (Moe.before). Every stage has a part of every one of their weights [F, …]."""

    def __init__(self, c: ModelConfig, compute: Compute):
        super().__init__(c, replace(compute, pipeline=(*compute.pipeline[:2], 1)))
        stacked = lambda axes: (FIRST, *axes[1:])
        is_axes = lambda x: isinstance(x, tuple)
        self.axes["blocks"] = jax.tree.map(stacked, self.axes["blocks"], is_leaf=is_axes)

    def through(
        self, constrain: Any, stages: Any, cut: Any, known: tuple, x_NTD: jax.Array, blocks: Params
    ) -> jax.Array:
        """What is embedded, of the same. known: positions of its rows, and segments of the batch's [B, …]."""
        positions_NT, segments_BT = known
        if stages and segments_BT is not None:
            segments_BT = stages.start(segments_BT, (None,))
        layer = self._layer(cut, stages.outside if stages else constrain, (positions_NT, segments_BT))
        if self.compute.unroll:
            return self._run(constrain, layer, x_NTD, blocks)[0]
        return lax.scan(layer, x_NTD, self.cast(blocks))[0]  # of these layers' own, whatever the others' may do besides
