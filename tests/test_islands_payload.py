"""Payloads: every block codec decodes in NumPy to the bits of its JAX decoder; a manifest says all that is needed."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest

from islands import decode, payload
from islands.decode import PayloadError
from islands.payload import Draw, Form, Part
from islands.record import canonical
from parallel.exchange.codecs import CODECS
from parallel.exchange.codecs.base import is_round

BLOCKS = [name for name, kind in CODECS.items() if not is_round(kind)]
CASES = [
    *((name, ()) for name in BLOCKS),
    ("int4", (("stochastic", True),)),
    ("topk", (("bits", 8),)),
    ("topk", (("bits", 4), ("chunk", 256))),
    ("topk", (("bits", 2), ("chunk", 256))),
    ("sign", (("stochastic", True),)),
    ("fp8", (("stochastic", True),)),
]
# One that draws nothing, one that draws for every element, one with places.
QUICK = [("int4", ()), ("int4", (("stochastic", True),)), ("topk", ())]
PER_CODEC = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case[0], *(f"{k}{v}" for k, v in case[1])])
)
PER_CODEC_OR_QUICK = pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: "-".join([case[0], *(f"{k}{v}" for k, v in case[1])]),
)
DRAW = Draw(0, "a", 3)
PIECE = 2**13


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Leaves of several pieces, and blobs of several."""
    monkeypatch.setattr(payload, "PIECE", PIECE)
    monkeypatch.setattr(payload, "BLOB", 20_000)
    monkeypatch.setattr(payload, "STEP", 2**10)


def build(case):
    return decode.build(case[0], **dict(case[1]))


def everything(n: int, seed: int = 0) -> np.ndarray:
    """Floats of all sizes, denormal ones, zeros of both signs, and runs of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 2.0 ** np.repeat(rng.integers(-148, 60, -(-n // 32)), 32)[:n]).astype(np.float32)
    x[rng.random(n) < 0.05] = 0
    x[rng.random(n) < 0.02] = -0.0
    x[n // 2 : n // 2 + n // 4] = 0
    return x


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def encoded(codec, x) -> dict[str, np.ndarray]:
    """By the program that payloads are encoded with."""
    key = jax.random.key(0) if codec.uses_key else None
    return {name: np.array(field) for name, field in payload._encoder(codec)(x, key).items()}


def laid_out(codec, message) -> dict[str, np.ndarray]:
    """The message of one piece as it is read: its bytes, and the fields in them."""
    parts = [np.ascontiguousarray(message[name]) for name in decode.fields(codec)]
    assert sum(part.nbytes for part in parts) == PIECE // codec.block * decode.size(codec)
    return decode.split(codec, b"".join(part.tobytes() for part in parts), PIECE // codec.block)


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────


@PER_CODEC
def test_the_decoders_give_the_same_bits(case):
    codec = build(case)
    back, out = jax.jit(codec.decode), np.empty(PIECE, np.float32)
    rng = np.random.default_rng(1)
    for seed in range(6):
        message = encoded(codec, everything(PIECE, seed))
        if seed % 3 == 2:  # what no encoder would write: any finite scale, often a denormal one, and any code
            name = "scales" if "scales" in message else "values"
            least = np.where(rng.random(message[name].shape) < 0.3, 0, 0x80)
            anything = rng.integers(least, np.where(least, 0x7600, 0x90)).astype(np.uint16)
            message[name] = anything if codec.block > 1 else message[name]
        if seed % 3 == 2 and "scales" in message:
            if case[0] == "topk":
                message["scales"].sort(axis=1)
            codes = rng.integers(0, 256, message["values"].shape).astype(np.uint8)
            message["values"] = np.where((codes & 0x7F) == 0x7F, 0, codes) if case[0] == "fp8" else codes
        found = laid_out(codec, message)
        decode.check(codec, found)
        decode.decode(codec, found, out)
        np.testing.assert_array_equal(bits(out), bits(back(message)))


def test_levels_between_two_scales_are_rounded_once():
    """Against rational numbers: twice rounded, one in some thousands would be another float."""
    from fractions import Fraction

    codec = decode.build("topk", bits=8)
    rng, n = np.random.default_rng(0), 4000
    low = rng.integers(0x3F00, 0x4000, n).astype(np.uint32) << 16
    low[: n // 2] = 0x21800000  # 2^-60: a product half way between two floats is rounded up by that alone
    high = (rng.integers(0x3F80, 0x4000, n) + 128 * rng.integers(1, 3, n)).astype(np.uint32) << 16
    scales = np.stack([low, high], axis=1).view(np.float32)
    codes = rng.integers(1, 128, (n, 1)).astype(np.uint8)
    found = decode._levels(codec, codes, scales)[:, 0]
    for (a, b), code, x in zip(scales, codes[:, 0], found, strict=True):
        exact = Fraction(float(a)) + Fraction(float((b - a) * np.float32(code))) * Fraction(float(np.float32(1 / 127)))
        near = [np.nextafter(x, np.float32(s)) for s in (-np.inf, np.inf)]
        assert all(abs(Fraction(float(x)) - exact) <= abs(Fraction(float(y)) - exact) for y in near)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in BLOCKS])
def test_codecs_with_rounds_are_refused(name):
    with pytest.raises(ValueError, match=rf"sync\.codec={name}: needs rounds .* choose one of none, bf16"):
        decode.build(name)


def put(value):
    def change(x: np.ndarray) -> None:
        x.reshape(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("none", "values", put(np.nan)),
        ("none", "values", put(-np.inf)),
        ("bf16", "values", put(0x7F80)),
        ("fp8", "values", put(0xFF)),
        ("fp8", "scales", put(0x7F80)),
        ("int8", "scales", put(0x7F7F)),  # finite, but 127 times as much is not
        ("int4", "scales", put(0xFFC0)),
        ("sign", "scales", put(0x7FC0)),
        ("topk", "values", put(0xFF80)),
        ("topk", "places", put(4096)),
        ("topk", "places", put(1)),  # twice
    ],
)
def test_what_is_not_finite_or_has_no_place_is_refused(name, field, change):
    codec = decode.build(name)
    message = encoded(codec, np.ones(PIECE, np.float32))
    decode.check(codec, laid_out(codec, message))
    change(message[field])
    with pytest.raises(PayloadError):
        decode.check(codec, laid_out(codec, message))


# ── blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sizes(codec) -> dict[str, int]:
    """A leaf of three pieces, one that fills no block, one of a single element, one without any."""
    return {"a/large": 2 * 2**13 + 5 * codec.block + 3, "b": codec.block // 2 + 1, "c": 1, "d": 0}


def tree(form: Form, seed: int = 0) -> dict[str, np.ndarray]:
    """Of a size that no codec loses to zero."""
    rng = np.random.default_rng(seed)
    return {leaf: rng.standard_normal(n).astype(np.float32) for leaf, n in form.sizes.items()}


def push(form: Form, parts, draw: Draw = DRAW):
    """(blobs by digest, manifest bytes)."""
    blobs = list(payload.encode(form, parts, draw))
    pieces = [piece for blob in blobs for piece in blob.pieces]
    return {blob.digest: blob.data for blob in blobs}, payload.manifest(form, pieces)


def whole(x: dict[str, np.ndarray], owed=None) -> list[Part]:
    return [Part(leaf, 0, values, owed[leaf] if owed else None) for leaf, values in x.items()]


def fetch_from(blobs):
    return lambda digest, offset, length: blobs[digest][offset : offset + length]


def read(form: Form, blobs, manifest: bytes, ranges=None) -> dict[str, np.ndarray]:
    found = payload.read_manifest(form, manifest, {name: len(data) for name, data in blobs.items()})
    ranges = ranges or form.whole()
    out = {leaf: np.full(sum(count for _, count in wanted), np.nan, np.float32) for leaf, wanted in ranges.items()}
    payload.verify(form, found, ranges, fetch_from(blobs))
    for leaf, place, values in payload.read(form, found, ranges, fetch_from(blobs)):
        assert len(values) <= payload.STEP
        out[leaf][place : place + len(values)] = values
    return out


@PER_CODEC_OR_QUICK
def test_a_payload_has_the_bytes_of_the_closed_form_and_decodes_by_any_ranges(case):
    codec = build(case)
    form = Form(sizes(codec), codec)
    blobs, manifest = push(form, whole(tree(form)))
    assert sum(map(len, blobs.values())) == payload.payload_bytes(form.sizes, codec)
    padded = sum(form.blocks(leaf) for leaf in form.sizes) * codec.block
    assert payload.payload_bytes(form.sizes, codec) == sum(codec.wire(padded).values())
    assert len(blobs) > 1 or payload.payload_bytes(form.sizes, codec) < payload.BLOB
    everything = read(form, blobs, manifest)
    n = form.sizes["a/large"]
    some = {"a/large": [(1, 2), (700, 2**13), (2**13 + 900, 0), (n - 9, 9)], "c": [(0, 1)]}
    for leaf, found in read(form, blobs, manifest, some).items():
        wanted = np.concatenate([everything[leaf][first : first + count] for first, count in some[leaf]])
        np.testing.assert_array_equal(bits(found), bits(wanted))


@PER_CODEC_OR_QUICK
def test_a_payload_is_the_same_whoever_made_its_parts(case):
    """Blocks, what is drawn for them, and what is owed do not depend on who owns which; only the blobs' order does."""
    codec = build(case)
    form, n = Form(sizes(codec), codec), sizes(codec)["a/large"]
    x = tree(form)
    owed = {leaf: np.zeros(size, np.float32) for leaf, size in form.sizes.items()}
    one = read(form, *push(form, whole(x, owed)))
    cuts = [0, 3 * codec.block, -(-(2**13) // codec.block) * codec.block + 2 * codec.block, n]
    cuts = [cut // codec.block * codec.block if cut != n else n for cut in cuts]
    apart = {leaf: np.zeros(size, np.float32) for leaf, size in form.sizes.items()}
    parts = [Part("a/large", i, x["a/large"][i:j], apart["a/large"][i:j]) for i, j in zip(cuts, cuts[1:], strict=False)]
    two = read(form, *push(form, [*reversed(parts), *(Part(k, 0, x[k], apart[k]) for k in "bc")]))
    for leaf in form.sizes:
        np.testing.assert_array_equal(bits(one[leaf]), bits(two[leaf]))
        np.testing.assert_array_equal(bits(owed[leaf]), bits(apart[leaf]))
        np.testing.assert_array_equal(bits(owed[leaf]), bits(x[leaf] - one[leaf]))


def test_what_is_drawn_depends_on_the_seed_the_island_the_round_and_the_place():
    form = Form({"a": 512, "b": 512}, decode.build("int4", stochastic=True))
    x = {leaf: np.full(512, 0.3, np.float32) for leaf in form.sizes}
    x["a"][::128] = x["b"][::128] = 1
    same = read(form, *push(form, whole(x)))
    np.testing.assert_array_equal(same["a"], read(form, *push(form, whole(x)))["a"])
    assert not np.array_equal(same["a"], same["b"])
    for other in (DRAW._replace(seed=1), DRAW._replace(island="b"), DRAW._replace(clock=4)):
        assert not np.array_equal(same["a"], read(form, *push(form, whole(x), other))["a"])


@pytest.mark.parametrize("name", [name for name in BLOCKS if CODECS[name].wants_error_feedback])
def test_what_is_owed_is_sent_later(name):
    """Σ sent + owed = Σ Δ, and what was never sent does not grow."""
    form = Form({"a": PIECE}, decode.build(name))
    owed, total, sent = np.zeros(PIECE, np.float32), np.zeros(PIECE), np.zeros(PIECE)
    for clock in range(200):
        x = tree(form, clock)["a"] * 0.1 + 1
        total += x
        sent += read(form, *push(form, [Part("a", 0, x, owed)], DRAW._replace(clock=clock)))["a"]
    np.testing.assert_allclose(sent + owed, total, rtol=1e-5, atol=1e-4)
    assert np.abs(owed).max() < 0.5 * total.min()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_pushed(bad):
    form = Form({"a": 300}, decode.build("int4"))
    x = np.ones(300, np.float32)
    x[7] = bad
    with pytest.raises(ValueError, match="^a: what is to be pushed is not finite"):
        push(form, [Part("a", 0, x)])


def test_parts_are_whole_blocks():
    form = Form({"a": 300}, decode.build("int4"))
    for first, count in ((64, 128), (0, 100), (256, 60)):
        with pytest.raises(ValueError, match="^a: elements .* are no whole blocks of 128"):
            push(form, [Part("a", first, np.ones(count, np.float32))])


def test_a_record_names_few_blobs(monkeypatch):
    monkeypatch.setattr(payload, "BLOB", 1)
    monkeypatch.setattr(payload, "BLOBS", 3)
    form = Form({"a": 100_000}, decode.build("int4"))
    assert len(push(form, whole(tree(form)))[0]) <= 3


def test_equal_blobs_are_one_object(monkeypatch):
    monkeypatch.setattr(payload, "BLOB", 1)
    form = Form({"a": 4 * PIECE, "b": PIECE}, decode.build("int4"))
    x = {leaf: np.full(n, 0.875, np.float32) for leaf, n in form.sizes.items()}
    blobs, manifest = push(form, whole(x))
    assert len(blobs) == 1
    assert all((found == 0.875).all() for found in read(form, blobs, manifest).values())


# ── manifests ────────────────────────────────────────────────────────────────────────────────────────────────────


def a_push():
    form = Form({"a": 2**13 + 300, "b": 5}, decode.build("int4"))
    blobs, manifest = push(form, whole(tree(form)))
    return form, blobs, {name: len(data) for name, data in blobs.items()}, manifest


def changed(manifest: bytes, change) -> bytes:
    found = json.loads(manifest)
    change(found)
    return canonical(found)


def at_piece(leaf: str, piece: int, field: int, value):
    def change(found) -> None:
        entry = found["leaves"][leaf]["pieces"][piece]
        entry[field] = value(entry[field]) if callable(value) else value

    return change


CHANGES = {
    "a newer format": lambda found: found.update(format=2),
    "another key": lambda found: found.update(more=1),
    "another codec": lambda found: found["codec"].update(name="int8"),
    "another block": lambda found: found["codec"]["keys"].update(block=256),
    "a leaf less": lambda found: found["leaves"].pop("b"),
    "a leaf more": lambda found: found["leaves"].update(c={"elements": 0, "pieces": []}),
    "other elements": lambda found: found["leaves"]["b"].update(elements=6),
    "no list": lambda found: found["leaves"]["b"].update(pieces={}),
    "leaves that are no object": lambda found: found.update(leaves=[]),
    "a piece twice": lambda found: found["leaves"]["a"]["pieces"].insert(0, found["leaves"]["a"]["pieces"][0]),
    "a piece less": lambda found: found["leaves"]["a"]["pieces"].pop(),
    "no piece": lambda found: found["leaves"]["b"].update(pieces=[]),
    "a gap": at_piece("a", 1, 0, lambda first: first + 128),
    "an overlap": at_piece("a", 1, 0, lambda first: first - 128),
    "beyond the end": at_piece("a", 1, 1, lambda count: count + 128),
    "a cut block": at_piece("a", 0, 1, lambda count: count - 1),
    "nothing": at_piece("b", 0, 1, 0),
    "less than nothing": at_piece("b", 0, 1, -5),
    "an unknown blob": at_piece("b", 0, 2, "0" * 64),
    "a negative offset": at_piece("b", 0, 3, -1),
    "an offset beyond": at_piece("b", 0, 3, 10**18),
    "bytes of another piece": at_piece("b", 0, 3, 0),
    "a length too many": at_piece("b", 0, 4, lambda length: length + 1),
    "a length of text": at_piece("b", 0, 4, "66"),
    "true for one": at_piece("a", 0, 0, False),
    "no digest": at_piece("b", 0, 5, "x" * 64),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_manifest_that_is_wrong_is_refused_before_anything_is_read(what):
    form, _, lengths, manifest = a_push()
    payload.read_manifest(form, manifest, lengths)
    with pytest.raises(PayloadError, match="^manifest: "):
        payload.read_manifest(form, changed(manifest, CHANGES[what]), lengths)


def test_pieces_that_fill_their_blob_but_not_as_they_must_are_refused():
    """What the bytes of the blobs do not show."""
    form, _, lengths, manifest = a_push()
    blob = json.loads(manifest)["leaves"]["b"]["pieces"][0][2]
    _, second = json.loads(manifest)["leaves"]["a"]["pieces"]
    assert second[2] == blob, "the last piece of a, and then b, are in the last blob"

    def a_byte_further(found) -> None:
        at_piece("a", 1, 4, lambda length: length + 1)(found)
        at_piece("b", 0, 3, lambda offset: offset + 1)(found)
        at_piece("b", 0, 4, lambda length: length - 1)(found)

    def an_empty_one(found) -> None:
        (own,) = found["leaves"]["b"]["pieces"]
        found["leaves"]["b"]["pieces"].append([5, 0, blob, own[3], 0, own[5]])

    for change in (a_byte_further, an_empty_one):
        with pytest.raises(PayloadError, match="^manifest: [ab] has a piece (of|from)"):
            payload.read_manifest(form, changed(manifest, change), lengths)
    without = lengths | {blob: lengths[blob] - decode.size(form.codec)}
    with pytest.raises(PayloadError, match="^manifest: b ends at 0 of 5 elements"):
        payload.read_manifest(form, changed(manifest, CHANGES["no piece"]), without)


def test_a_piece_across_a_limit_is_refused():
    """Else one piece could want the memory of a whole leaf."""
    form, blobs, lengths, manifest = a_push()
    found = json.loads(manifest)
    first, second = found["leaves"]["a"]["pieces"]
    found["leaves"]["a"]["pieces"] = [[0, first[1] + second[1], first[2], 0, first[4] + second[4], first[5]]]
    with pytest.raises(PayloadError, match="across a multiple of 8192"):
        payload.read_manifest(form, canonical(found), lengths)


def test_bytes_that_are_no_manifest_are_refused():
    form, _, lengths, manifest = a_push()
    for data in (b"", b"[]", b"{}", b"\xff", b"[" * 5000, manifest[:-1], manifest + b" ", b'{"format":1.0}'):
        with pytest.raises(PayloadError, match="^manifest: "):
            payload.read_manifest(form, data, lengths)
    with pytest.raises(PayloadError, match="more than the"):
        payload.read_manifest(form, b" " * (payload.manifest_limit(form) + 1), lengths)


def test_a_norm_is_that_of_what_is_decoded():
    form, blobs, lengths, manifest = a_push()
    found = payload.norm(form, payload.read_manifest(form, manifest, lengths), fetch_from(blobs))
    decoded = np.concatenate(list(read(form, blobs, manifest).values())).astype(np.float64)
    assert found == pytest.approx(np.sqrt(np.sum(decoded**2)), rel=1e-12)


def test_a_codec_that_others_do_not_know_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Own(CODECS["int4"]):
        pass

    with pytest.raises(ValueError, match=r"^Own is not in CODECS .*: no other island knows it"):
        push(Form({"a": 128}, Own()), [Part("a", 0, np.ones(128, np.float32))])


def test_bytes_of_a_blob_that_belong_to_nothing_are_refused():
    form, blobs, lengths, manifest = a_push()
    more = {name: size + 1 for name, size in lengths.items()}
    with pytest.raises(PayloadError, match="pieces end at byte"):
        payload.read_manifest(form, manifest, more)
    with pytest.raises(PayloadError, match="pieces end at byte 0 of 9"):
        payload.read_manifest(form, manifest, lengths | {"0" * 64: 9})


def test_one_flipped_bit_is_named():
    form, blobs, lengths, manifest = a_push()
    found = payload.read_manifest(form, manifest, lengths)
    for name, data in blobs.items():
        flipped = bytearray(data)
        flipped[-1] ^= 4
        fetch = fetch_from(blobs | {name: bytes(flipped)})
        with pytest.raises(PayloadError, match=f"^blob {name}: bytes from .* are not what was signed"):
            payload.verify(form, found, form.whole(), fetch)
        with pytest.raises(PayloadError, match=f"^blob {name}"):
            list(payload.read(form, found, form.whole(), fetch))


def test_a_signed_payload_that_is_not_finite_is_named():
    """Its digests are right, so only its contents can say it."""
    form, blobs, _, manifest = a_push()
    found = json.loads(manifest)
    entry = found["leaves"]["b"]["pieces"][0]
    data = bytearray(blobs[entry[2]])
    data[entry[3] + 64 : entry[3] + 66] = b"\x80\x7f"
    entry[5] = hashlib.sha256(data[entry[3] : entry[3] + entry[4]]).hexdigest()
    name, old = hashlib.sha256(data).hexdigest(), entry[2]
    new = canonical(json.loads(canonical(found).replace(old.encode(), name.encode())))
    others = {k: v for k, v in blobs.items() if k != old} | {name: bytes(data)}
    checked = payload.read_manifest(form, new, {k: len(v) for k, v in others.items()})
    with pytest.raises(PayloadError, match=f"^blob {name}: b from element 0: a scale is not finite"):
        payload.verify(form, checked, form.whole(), fetch_from(others))
