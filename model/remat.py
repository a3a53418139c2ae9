"""What the backward pass of a layer finds, and what it works out again: `compute.remat`."""

from collections.abc import Callable
from typing import Any

from jax import checkpoint_policies as policies

KEPT = ("qkv", "context", "hidden")  # outputs of products with weights, and attention's
POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    # Attention's scores, norms and activations are worked out again.
    "matmuls": policies.save_only_these_names(*KEPT),
    "dots": policies.dots_with_no_batch_dims_saveable,
    # As matmuls, but in the host's memory. On a CPU, which has no other, it is the same.
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(KEPT),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": policies.nothing_saveable,
}
