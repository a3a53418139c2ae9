"""What messages of block codecs decode to, in NumPy: the same bits everywhere, and those of the JAX codecs on a CPU.

A message of M blocks is bytes: `values` of all of them, then `places`, then `scales`, little-endian. Every codec has so
many bytes of each a block (`fields`), so the blocks from r to s of it are found without the others.

XLA:CPU takes denormal numbers for zeros, whatever the machine. That is part of what a message decodes to, so it is done
here by comparisons; the fold itself keeps denormals.

Shapes: M blocks, B elements of a block, K entries of a chunk.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from parallel.exchange.codecs import CODECS
from parallel.exchange.codecs.base import is_round
from parallel.exchange.codecs.floats import FP4, FP8
from parallel.exchange.codecs.plain import BF16, Identity
from parallel.exchange.codecs.quantized import Int2, Int4, Int8, Scaled
from parallel.exchange.codecs.sign import Sign
from parallel.exchange.codecs.sparse import TopK

Fields = dict[str, np.ndarray]  # of each field of a message uint8 [M, its bytes a block]

NORMAL = np.float32(2.0**-126)  # the smallest number that is not denormal
HEADROOM = np.float32(512)  # no code multiplies its scale by more


class PayloadError(ValueError):
    """A payload that is not what its record promises. The message says what is wrong."""


def build(name: str, **keys: Any) -> Any:
    """The codec of this name. Raises ValueError for those that islands cannot use."""
    kind = CODECS.get(name)
    if kind is None or is_round(kind):
        usable = ", ".join(each for each, found in CODECS.items() if not is_round(found))
        why = "needs rounds in which all take part, which islands do not have" if kind else "is no codec"
        raise ValueError(f"sync.codec={name}: {why}: choose one of {usable}")
    return kind(**keys)


def fields(codec: Any) -> dict[str, int]:
    """The bytes a block of each field of its messages, in their order."""
    match codec:
        case Identity():
            return {"values": 4 * codec.block}
        case BF16():
            return {"values": 2 * codec.block}
        case Scaled() | Sign():
            bits = codec.bits if isinstance(codec, Scaled) else 1
            return {"values": codec.block * bits // 8, "scales": 2}
        case TopK(bits=16):
            return {"values": 2 * codec.k, "places": 2 * codec.k}
        case TopK():
            return {"values": codec.k * codec.bits // 8, "places": codec.k * 3 // 2, "scales": 4}
    raise ValueError(f"{type(codec).__name__} has no decoder in NumPy: add it to islands/decode.py")


def size(codec: Any) -> int:
    """Bytes of one block."""
    return sum(fields(codec).values())


def split(codec: Any, data: Any, blocks: int) -> Fields:
    """The fields of a message of so many blocks: views of its bytes."""
    raw, found, start = np.frombuffer(data, np.uint8), {}, 0
    for name, width in fields(codec).items():
        found[name] = raw[start : start + blocks * width].reshape(blocks, width)
        start += blocks * width
    return found


def decode(codec: Any, message: Fields, out_N: np.ndarray) -> None:
    """Writes the elements of all blocks of the message into `out`, contiguous float32."""
    out_MB = out_N.reshape(-1, codec.block)
    for kind, into in DECODERS.items():
        if isinstance(codec, kind):
            return into(codec, message, out_MB)
    raise ValueError(f"{type(codec).__name__} has no decoder in NumPy: add it to islands/decode.py")


def check(codec: Any, message: Fields) -> None:
    """Raises PayloadError for a message that decodes to what is not finite, or has places that no encoder writes."""
    if "scales" in message:
        with np.errstate(over="ignore"):  # a finite scale can make infinite values
            if not np.isfinite(_bf16(message["scales"]) * HEADROOM).all():
                raise PayloadError("a scale is not finite, or so large that values would not be")
    values_MB = message["values"]
    if isinstance(codec, FP8) and ((values_MB & 0x7F) == 0x7F).any():
        raise PayloadError("a value is not a number")
    if isinstance(codec, Identity) and not np.isfinite(values_MB.view("<f4")).all():
        raise PayloadError("a value is not finite")
    if (isinstance(codec, BF16) or (isinstance(codec, TopK) and codec.bits == 16)) and (
        (values_MB.view("<u2") & 0x7F80) == 0x7F80
    ).any():
        raise PayloadError("a value is not finite")
    if isinstance(codec, TopK):
        places_MK = np.sort(_places(codec, message), axis=1)
        if places_MK.max(initial=0) >= codec.chunk or (places_MK[:, 1:] == places_MK[:, :-1]).any():
            raise PayloadError("places are named twice, or lie beyond their chunk")


# ── codec by codec ───────────────────────────────────────────────────────────────────────────────────────────────


def _identity(codec: Identity, message: Fields, out_MB: np.ndarray) -> None:
    out_MB[...] = message["values"].view("<f4")


def _plain_bf16(codec: BF16, message: Fields, out_MB: np.ndarray) -> None:
    np.left_shift(message["values"].view("<u2"), 16, out=out_MB.view(np.uint32), dtype=np.uint32)


def _integer(codec: Any, message: Fields, out_MB: np.ndarray) -> None:
    """(code − zero) · scale: exact, so it has the same bits however it is computed."""
    _codes(message["values"], codec.bits, out_MB, 2 ** (codec.bits - 1))
    np.multiply(out_MB, _flushed(_bf16(message["scales"])), out=out_MB)


def _from_table(codec: Any, message: Fields, out_MB: np.ndarray) -> None:
    """table[code] · scale, where a product can be denormal though the scale is not."""
    codes_MB = np.empty(out_MB.shape, np.uint8)
    _codes(message["values"], codec.bits, codes_MB)
    np.take(TABLES[type(codec)], codes_MB, out=out_MB, mode="clip")
    scales_M1 = _flushed(_bf16(message["scales"]))
    np.multiply(out_MB, scales_M1, out=out_MB)
    small_M = (np.abs(scales_M1) < NORMAL * HEADROOM)[:, 0]
    if small_M.any():
        out_MB[small_M] = _flushed(out_MB[small_M])


def _signs(codec: Sign, message: Fields, out_MB: np.ndarray) -> None:
    scales_M1 = _bf16(message["scales"])
    _codes(message["values"], 1, out_MB)
    np.copyto(out_MB, np.where(out_MB > 0, scales_M1, -scales_M1))


def _sparse(codec: TopK, message: Fields, out_MC: np.ndarray) -> None:
    places_MK = _places(codec, message)
    if codec.bits == 16:
        values_MK = _flushed(_bf16(message["values"]))
    else:
        codes_MK = np.empty((len(places_MK), codec.k), np.uint8)
        _codes(message["values"], codec.bits, codes_MK)
        values_MK = _levels(codec, codes_MK, _bf16(message["scales"]))
    out_MC[...] = 0
    np.put_along_axis(out_MC, places_MK, np.where(values_MK == 0, np.float32(0), values_MK), axis=1)


def _levels(codec: TopK, codes_MK: np.ndarray, scales_M2: np.ndarray) -> np.ndarray:
    """± (low + (high − low) · level · (1 / levels)), whose last product and sum are rounded once: XLA:CPU multiplies by
    the reciprocal and fuses it with the addition. In float64 the product is exact; the sum is rounded to odd there
    (Boldo & Melquiond 2008), so that rounding it again to float32 is as if it had been rounded once."""
    levels = 2 ** (codec.bits - 1) - 1
    low_M1, high_M1 = _flushed(scales_M2[:, :1]), _flushed(scales_M2[:, 1:])
    span_MK = _flushed(high_M1 - low_M1) * (codes_MK & levels).astype(np.float32)
    a, b = low_M1.astype(np.float64), span_MK.astype(np.float64) * np.float64(np.float32(1) / np.float32(levels))
    total = a + b
    rest = total - a
    lost = (a - (total - rest)) + (b - rest)  # exactly (Knuth 1969)
    bits = total.view(np.int64)
    toward = np.where(np.signbit(lost) == np.signbit(total), 1, -1)
    odd = np.where((lost != 0) & (bits & 1 == 0), bits + toward, bits).view(np.float64)
    size_MK = _flushed(odd.astype(np.float32))
    return np.where(codes_MK > levels, -size_MK, size_MK)


DECODERS: dict[type, Callable[[Any, Fields, np.ndarray], None]] = {
    Identity: _identity,
    BF16: _plain_bf16,
    Int8: _integer,
    Int4: _integer,
    Int2: _integer,
    FP8: _from_table,
    FP4: _from_table,
    Sign: _signs,
    TopK: _sparse,
}
_SIZES = np.array(FP4.levels, np.float32)
TABLES = {
    FP8: np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    FP4: np.concatenate([_SIZES, -_SIZES]),
}


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _codes(packed_M: np.ndarray, bits: int, out_MB: np.ndarray, zero: int = 0) -> None:
    """Codes of `bits` bits, of 8/bits parts of a block, the first in the lowest bits; less `zero`, if any, as int8."""
    width, last = packed_M.shape[1], 8 // bits - 1
    part_M = np.empty_like(packed_M)
    for i in range(last + 1):
        np.right_shift(packed_M, np.uint8(bits * i), out=part_M)
        if i < last:
            np.bitwise_and(part_M, np.uint8(2**bits - 1), out=part_M)
        if zero:
            np.subtract(part_M, np.uint8(zero), out=part_M)
        out_MB[:, i * width : (i + 1) * width] = part_M.view(np.int8) if zero else part_M


def _bf16(raw: np.ndarray) -> np.ndarray:
    """[M, 2·n] bytes -> float32 [M, n]."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _flushed(x: np.ndarray) -> np.ndarray:
    """Zeros, of the same sign, in place of denormal numbers."""
    return np.where(np.abs(x) < NORMAL, np.copysign(np.float32(0), x), x)


def _places(codec: TopK, message: Fields) -> np.ndarray:
    """int64 [M, K]."""
    raw = message["places"]
    if codec.bits == 16:
        return raw.view("<u2").astype(np.int64)
    a, b, c = np.moveaxis(raw.reshape(len(raw), -1, 3).astype(np.int64), -1, 0)
    return np.stack([a | ((b & 15) << 8), (b >> 4) | (c << 4)], axis=-1).reshape(len(raw), -1)
