"""What compute.remat=offload sends to the host's memory in forward passes and fetches in backward passes, and what is
waited for of it. That the chip's own memory is read and written for it, many times as fast, is not counted."""

from collections.abc import Mapping

from parallel.cost.hardware import Chip
from parallel.cost.network import Layout, Network, layers, outside, tokens, turns
from parallel.cost.rates import share
from parallel.cost.targets import Target
from parallel.cost.work import BACKWARD, FORWARD, hidden_of_token, of_matmuls

HOST = "host"  # in a step, beside the axes of the mesh
OFFLOAD = "offload"  # of compute.remat
FETCHED = 2 / 3  # of a layer's backward pass libtpu fetches the next one's meanwhile, in compiled programs


def held(net: Network, lay: Layout) -> float:
    """Bytes of the host's memory that a device takes."""
    if lay.remat != OFFLOAD:
        return 0.0
    first = held(net.first, outside(lay)) if net.first else 0.0
    return layers(net, lay) * tokens(net, lay) * net.itemsize * sum(of_matmuls(net, lay)) + first


def seconds(chip: Chip, size: float) -> float:
    """Of so many bytes, one way."""
    return size / (chip.host * share(chip).links)


def waited(net: Network, lay: Layout, target: Target, compute: Mapping[str, float]) -> float:
    """Seconds of a step."""
    each = turns(net, lay) * tokens(net, lay)
    heads, hidden = (seconds(target.chip, each * net.itemsize * elements) for elements in of_matmuls(net, lay))
    if target.chip.is_tpu:
        # A layer's are sent when the next one begins, which waits for them before it attends.
        return heads + hidden + max(0.0, heads + hidden - FETCHED * compute[BACKWARD])
    # Nothing travels from one turn of the loop over layers to the next. Forward, what the feed-forward half begins with
    # has the products that are left of it to hide behind; backward, it is asked for first, and has one.
    product = 2 * each * net.dim * hidden_of_token(net, lay) / lay.cut("mlp")
    product /= share(target.chip).products * target.chip.bf16
    forward = max(hidden - net.hidden * product, heads + hidden - compute[FORWARD])
    backward = max(hidden - product, heads + hidden - compute[BACKWARD])
    return max(0.0, forward) + max(0.0, backward)
