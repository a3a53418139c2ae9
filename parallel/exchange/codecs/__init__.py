"""Codecs: what a tensor looks like on the wire. Small frozen dataclasses of pure functions over flat float32 vectors.

A codec is registered once, below, under its name. Its fields are its keys of the config's group `sync`.

A *block codec* (`BlockCodec`) has `encode(x, key) -> message`, a pytree of arrays whose bytes are exactly the bytes
sent, `decode(message) -> x`, `block` (a message encodes a multiple of so many elements: who cuts and pads is outside)
and `wire(n)`, its bytes by the dtype that travels: that of its array, uint8 where there are several, which travel as
one.
If it is `sparse`, messages are gathered, never added up on the way, and `add(x, message)`, `subtract(x, message)` work
without a decoded array; if `uses_key`, encode gets a key, else None.

A *round codec* (`RoundCodec`) needs several rounds, or randomness that all replicas share: `mean(p, state, key, leaf,
net)` is a generator that returns (mean, owed, state); `yield from` the means of rounds.py is its only door to the wire,
and rounds of different arrays share their hops. `takes(leaf)` says which arrays it is for (the others are sent as
float32), `check(shards)` refuses to do nothing at all, `init(leaf, key)` makes its state, `wire(leaf, send)` tells its
bytes by dtype, where send(n, codec, pieces) are those of one mean; `per_matrix` says that every matrix is exchanged by
itself.

Both say whether they want error feedback by default: `wants_error_feedback`.

Narrow floats travel as unsigned integers of their width, and nibbles and bits packed in bytes: left as they are,
XLA:CPU would widen them inside the collective and send two or four times the bytes.
"""

from parallel.exchange.codecs.dct import DeMo
from parallel.exchange.codecs.floats import FP4, FP8
from parallel.exchange.codecs.lowrank import PowerSGD
from parallel.exchange.codecs.plain import BF16, Identity
from parallel.exchange.codecs.quantized import Int2, Int4, Int8
from parallel.exchange.codecs.sign import Sign
from parallel.exchange.codecs.sparse import RandomK, TopK

CODECS = {
    "none": Identity,
    "bf16": BF16,
    "fp8": FP8,
    "fp4": FP4,
    "int8": Int8,
    "int4": Int4,
    "int2": Int2,
    "sign": Sign,
    "topk": TopK,
    "randk": RandomK,
    "powersgd": PowerSGD,
    "demo": DeMo,
}
