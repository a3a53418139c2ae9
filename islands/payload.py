"""What a push carries: arrays as blobs of encoded pieces, and a manifest that says which elements lie where.

Arrays are canonical, one for each weight (a *leaf*), flattened, and so are the codec's blocks: neither depends on the
mesh that made them. A *piece* is a range of blocks of one leaf, the last one padded with zeros; at most PIECE elements,
and none crosses a multiple of that. Who owns the first element of a block encodes it. A *blob* is some pieces, laid one
after another. So any process of any mesh reads just what it wants, piece by piece, and knows each by its own digest.

The manifest is canonical JSON:
    {"format": 1, "codec": {"name": …, "keys": {…}}, "leaves": {leaf: {"elements": n, "pieces": [piece, …]}}}
with piece = [first element, elements, digest of the blob, offset and length in it, digest of the piece].

With error feedback (int4, int2, fp4, sign, topk: `codec.wants_error_feedback`) a member keeps of every leaf a float32
array of what it owes, zeros at first, and hands it in with each push: owed = (Δ + owed) − what the message decodes to.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import numpy as np

from islands import decode, state
from islands.decode import PayloadError
from islands.record import canonical, check_hex, load
from islands.state import STEP
from parallel.exchange.codecs import CODECS

FORMAT = 1
PIECE = 2**20  # elements
BLOB = 2**25  # bytes; more where a record would otherwise name more than BLOBS of them
BLOBS = 256

Ranges = Mapping[str, Sequence[tuple[int, int]]]  # of each leaf [(first element, elements), …]
Fetch = Callable[[str, int, int], bytes | memoryview]  # (digest of a blob, offset, length) -> these bytes of it


@dataclass(frozen=True)
class Form:
    """What all payloads of a run have in common. sizes: elements of each leaf. codec: a block codec."""

    sizes: Mapping[str, int]
    codec: Any

    @property
    def piece_blocks(self) -> int:
        return max(1, PIECE // self.codec.block)

    def blocks(self, leaf: str) -> int:
        return -(-self.sizes[leaf] // self.codec.block)

    def whole(self) -> Ranges:
        return {leaf: [(0, size)] for leaf, size in self.sizes.items()}

    def named(self) -> dict[str, Any]:
        """The codec, as a manifest has it."""
        name = next((name for name, kind in CODECS.items() if type(self.codec) is kind), None)
        if name is None:
            own = type(self.codec).__name__
            raise ValueError(f"{own} is not in CODECS (parallel/exchange/codecs/__init__.py): no other island knows it")
        keys = {each.name: getattr(self.codec, each.name) for each in fields(self.codec)}
        return {"name": name, "keys": {k: v.hex() if isinstance(v, float) else v for k, v in keys.items()}}


class Part(NamedTuple):
    """Elements of a leaf that this process encodes, float32 [N]: whole blocks, or up to the leaf's end. owed: what it
    owes of them, which is replaced; None: there is no error feedback."""

    leaf: str
    first: int
    values: np.ndarray
    owed: np.ndarray | None = None


class Draw(NamedTuple):
    """What the randomness of codecs that draw depends on, beside the place in the leaf."""

    seed: int
    island: str
    clock: int


class Piece(NamedTuple):
    leaf: str
    first: int
    count: int
    blob: str
    offset: int
    length: int
    digest: str


class Blob(NamedTuple):
    digest: str
    data: bytes
    pieces: tuple[Piece, ...]


def payload_bytes(sizes: Mapping[str, int], codec: Any) -> int:
    """What the blobs of one push have together: exactly, whatever the mesh."""
    form = Form(sizes, codec)
    return sum(form.blocks(leaf) for leaf in sizes) * decode.size(codec)


# ── encoding ─────────────────────────────────────────────────────────────────────────────────────────────────────


def encode(form: Form, parts: Iterable[Part], draw: Draw) -> Iterator[Blob]:
    """Blobs of these parts, one by one, in the memory of one. Raises ValueError for what is not finite."""
    most = max(BLOB, -(-payload_bytes(form.sizes, form.codec) // BLOBS))
    data, found = bytearray(), []
    for part in parts:
        for first, values, owed in _cut(form, part):
            encoded = _encode(form, part.leaf, first, values, owed, draw)
            found.append(Piece(part.leaf, first, len(values), "", len(data), len(encoded), _digest(encoded)))
            data += encoded
            if len(data) >= most:
                yield _blob(data, found)
                data, found = bytearray(), []
    if data:
        yield _blob(data, found)


def _blob(data: bytearray, pieces: Sequence[Piece]) -> Blob:
    name = _digest(data)
    return Blob(name, bytes(data), tuple(piece._replace(blob=name) for piece in pieces))


def _cut(form: Form, part: Part) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """(first element, values, owed) of each piece of a part."""
    size, block, stop = form.sizes[part.leaf], form.codec.block, part.first + len(part.values)
    if part.first % block or (stop % block and stop != size) or stop > size:
        raise ValueError(f"{part.leaf}: elements {part.first} to {stop} of {size} are no whole blocks of {block}")
    whole, first = form.piece_blocks * block, part.first
    while first < stop:
        last = min(stop, (first // whole + 1) * whole)
        here = slice(first - part.first, last - part.first)
        yield first, part.values[here], None if part.owed is None else part.owed[here]
        first = last


def _encode(
    form: Form, leaf: str, first: int, values: np.ndarray, owed: np.ndarray | None, draw: Draw
) -> bytes | bytearray:
    """One piece. It is encoded where it stands among as many blocks as its leaf has at all, up to the most, and rounded
    up to a power of two: so what is drawn is of its place alone, and few shapes are compiled."""
    codec, block = form.codec, form.codec.block
    number, row = divmod(first // block, form.piece_blocks)
    rows = min(form.piece_blocks, 1 << (form.blocks(leaf) - 1).bit_length())
    x_N = np.zeros(rows * block, np.float32)
    own = x_N[row * block : row * block + len(values)]
    own[...] = values if owed is None else values + owed
    if not np.isfinite(own).all():
        raise ValueError(f"{leaf}: what is to be pushed is not finite: a round that made it must be left out")
    key = _key(draw, leaf, number) if codec.uses_key else None
    message = jax.device_get(_encoder(codec)(x_N, key))
    last, encoded = row + -(-len(values) // block), bytearray()
    for name in decode.fields(codec):
        x = message[name].reshape(rows, -1)[row:last]
        encoded += np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes()
    if owed is not None:
        decoded = np.empty((last - row) * block, np.float32)
        decode.decode(codec, decode.split(codec, encoded, last - row), decoded)
        np.subtract(own, decoded[: len(values)], out=owed)
    return encoded


@functools.cache
def _encoder(codec: Any) -> Any:
    return jax.jit(codec.encode)


def _key(draw: Draw, leaf: str, number: int) -> Any:
    key = jax.random.key(draw.seed)
    for text in (draw.island, str(draw.clock), leaf, str(number)):
        key = jax.random.fold_in(key, int(_digest(text.encode())[:8], 16))
    return key


def manifest(form: Form, pieces: Iterable[Piece]) -> bytes:
    """Of the pieces of all processes."""
    leaves: dict[str, Any] = {leaf: {"elements": size, "pieces": []} for leaf, size in form.sizes.items()}
    for piece in sorted(pieces):
        leaves[piece.leaf]["pieces"].append(list(piece[1:]))
    return canonical({"format": FORMAT, "codec": form.named(), "leaves": leaves})


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

Manifest = Mapping[str, Sequence[Piece]]  # checked; the pieces of each leaf, in order


def manifest_limit(form: Form) -> int:
    """Bytes that a manifest may have: what is to be read before anything is checked."""
    return (1 << 16) + 256 * len(form.sizes) + payload_bytes(form.sizes, form.codec)


def read_manifest(form: Form, data: bytes, blobs: Mapping[str, int]) -> Manifest:
    """Checks all that it says before anything is allocated for it. blobs: {digest: bytes} of the record, without the
    manifest itself. Raises PayloadError."""
    if len(data) > manifest_limit(form):
        raise PayloadError(f"manifest: {len(data)} bytes are more than the {manifest_limit(form)} that it may have")
    try:
        found = load(data)
    except ValueError as error:
        raise PayloadError(f"manifest: {error}") from error
    if found.keys() != {"format", "codec", "leaves"} or found["format"] != FORMAT:
        raise PayloadError(f"manifest: its keys or its format are not those of format {FORMAT}")
    if found["codec"] != form.named():
        raise PayloadError(f"manifest: encoded by {str(found['codec'])[:200]}, and the run's codec is {form.named()}")
    leaves = found["leaves"]
    if not isinstance(leaves, dict) or leaves.keys() != form.sizes.keys():
        raise PayloadError("manifest: its leaves are not the weights of the run")
    checked = {leaf: _leaf(form, leaf, leaves[leaf], blobs) for leaf in form.sizes}
    _check_covered((piece for pieces in checked.values() for piece in pieces), blobs)
    return checked


def _leaf(form: Form, leaf: str, found: Any, blobs: Mapping[str, int]) -> Sequence[Piece]:
    if not isinstance(found, dict) or found.keys() != {"elements", "pieces"} or found["elements"] != form.sizes[leaf]:
        raise PayloadError(f"manifest: {leaf} has not the {form.sizes[leaf]} elements of the run's")
    if not isinstance(found["pieces"], list):
        raise PayloadError(f"manifest: {leaf} has no list of pieces")
    block, width, pieces, reached = form.codec.block, decode.size(form.codec), [], 0
    whole = form.piece_blocks * block
    for entry in found["pieces"]:
        if not isinstance(entry, list) or [type(x) for x in entry] != [int, int, str, int, int, str]:
            raise PayloadError(f"manifest: a piece of {leaf} is not [first, elements, blob, offset, length, digest]")
        piece = Piece(leaf, *entry)
        if piece.first != reached or piece.count < 1:
            raise PayloadError(f"manifest: {leaf} has a piece from {piece.first}, where the next one is from {reached}")
        reached += piece.count
        if reached > form.sizes[leaf] or (reached % block and reached != form.sizes[leaf]):
            raise PayloadError(f"manifest: {leaf} has a piece up to {reached}, which is no end of a block of the leaf")
        if piece.first // whole != (reached - 1) // whole:
            raise PayloadError(f"manifest: {leaf} has a piece of {piece.count} elements across a multiple of {whole}")
        if piece.length != -(-piece.count // block) * width:
            raise PayloadError(f"manifest: {leaf} has a piece of {piece.length} bytes for {piece.count} elements")
        if piece.blob not in blobs:
            raise PayloadError(f"manifest: {leaf} has a piece that is in none of the blobs of its record")
        try:
            check_hex(piece.digest, "digest", f"{leaf}: the digest of a piece")
        except ValueError as error:
            raise PayloadError(f"manifest: {error}") from error
        pieces.append(piece)
    if reached != form.sizes[leaf]:
        raise PayloadError(f"manifest: {leaf} ends at {reached} of {form.sizes[leaf]} elements")
    return pieces


def _check_covered(pieces: Iterable[Piece], blobs: Mapping[str, int]) -> None:
    """Every byte of every blob belongs to one piece; to several only if they are the same, in blobs that are equal."""
    slices: dict[str, set[tuple[int, int]]] = {name: set() for name in blobs}
    for piece in pieces:
        slices[piece.blob].add((piece.offset, piece.length))
    for name, found in slices.items():
        reached = 0
        for offset, length in sorted(found):
            if offset != reached:
                span = f"{min(offset, reached)} to {max(offset, reached)}"
                raise PayloadError(f"manifest: bytes {span} of blob {name} belong to no piece, or to two")
            reached += length
        if reached != blobs[name]:
            raise PayloadError(f"manifest: pieces end at byte {reached} of {blobs[name]} of blob {name}")


def read(form: Form, found: Manifest, ranges: Ranges, fetch: Fetch) -> Iterator[tuple[str, int, np.ndarray]]:
    """Decodes these ranges, which ascend and do not overlap: (leaf, place in the leaf's ranges laid side by side,
    float32 values), at most STEP at a time, in one buffer that the caller may overwrite. Raises PayloadError where
    something is not as it was signed."""
    block = form.codec.block
    most = max(1, STEP // block)
    buffer = np.empty(most * block, np.float32)
    for leaf, wanted in ranges.items():
        place = 0
        for piece, spans in _overlaps(found[leaf], wanted):
            message = _message(form, piece, fetch)
            for at, stop in spans:
                while at < stop:
                    row = (at - piece.first) // block
                    last = min(row + most, -(-(stop - piece.first) // block))
                    here = {name: x[row:last] for name, x in message.items()}
                    decode.decode(form.codec, here, buffer[: (last - row) * block])
                    begin, upto = piece.first + row * block, min(stop, piece.first + last * block)
                    for first in range(at, upto, STEP):  # a block may be larger
                        x = buffer[first - begin : min(upto, first + STEP) - begin]
                        yield leaf, place, x
                        place += len(x)
                    at = upto


def verify(form: Form, found: Manifest, ranges: Ranges, fetch: Fetch) -> None:
    """Raises PayloadError if `read` would: to be called first, since a fold is not undone."""
    for leaf, wanted in ranges.items():
        for piece, _ in _overlaps(found[leaf], wanted):
            _message(form, piece, fetch)


def norm(form: Form, found: Manifest, fetch: Fetch) -> float:
    """Of all that is pushed, as every member finds it to the bit: what norm bounds are compared with."""
    leaf_of = lambda leaf: (x for _, _, x in read(form, found, {leaf: form.whole()[leaf]}, fetch))
    return state.norm({leaf: state.squares(leaf_of(leaf)) for leaf in form.sizes})


def needed(pieces: Sequence[Piece], wanted: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """Those that have something of these elements."""
    return (piece for piece, _ in _overlaps(pieces, wanted))


def _overlaps(
    pieces: Sequence[Piece], wanted: Sequence[tuple[int, int]]
) -> Iterator[tuple[Piece, list[tuple[int, int]]]]:
    """Pieces that are needed, each with what is wanted of it: [(first element, one after the last), …]."""
    i = 0
    for piece in pieces:
        spans, end = [], piece.first + piece.count
        while i < len(wanted):
            first, last = wanted[i][0], sum(wanted[i])
            if max(first, piece.first) < min(last, end):
                spans.append((max(first, piece.first), min(last, end)))
            if last > end:
                break  # it goes on in the next piece
            i += 1
        if spans:
            yield piece, spans


def _message(form: Form, piece: Piece, fetch: Fetch) -> decode.Fields:
    data = fetch(piece.blob, piece.offset, piece.length)
    if len(data) != piece.length or _digest(data) != piece.digest:
        raise PayloadError(f"blob {piece.blob}: bytes from {piece.offset}, of {piece.leaf}, are not what was signed")
    message = decode.split(form.codec, data, -(-piece.count // form.codec.block))
    try:
        decode.check(form.codec, message)
    except PayloadError as error:
        raise PayloadError(f"blob {piece.blob}: {piece.leaf} from element {piece.first}: {error}") from error
    return message


def _digest(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
