"""What folding a push costs: int4, Delayed Nesterov, beside copying the arrays that it touches.

python bench/fold.py                     a minute, and 2.5 GB of memory
python bench/fold.py --millions=10

A push is read (its pieces hashed, checked and decoded) and folded; the parameters, the momentum and the buffer's sum
are copied into other arrays, in turn. Every fourth push fills the buffer, and alone it touches the momentum: so four
pushes are folded, and four copies made of what each of them touches. One thread.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402

from bench import common  # noqa: E402
from islands import decode, merge, payload  # noqa: E402
from islands.payload import Draw, Form, Part  # noqa: E402
from islands.record import Record  # noqa: E402
from islands.view import Verdict, View  # noqa: E402
from runtime import usage  # noqa: E402

ISLANDS = 4
PUSH = Record(type="push", island="a", incarnation=1, nonce="0" * 32, clock=0)


def main() -> None:
    parser = usage.parser(__doc__, "python bench/fold.py")
    parser.add_argument("--millions", type=usage.positive, default=100, help="parameters")
    parser.add_argument("--pairs", type=usage.positive, default=8, help="of timings, each in turn")
    args = parser.parse_args()
    report = common.Report("fold")
    n = args.millions * 10**6
    form = Form({"w": n}, decode.build("int4"))
    delta = np.random.default_rng(0).standard_normal(n, np.float32)
    blobs = list(payload.encode(form, [Part("w", 0, delta)], Draw(0, "a", 0)))
    stored = {blob.digest: memoryview(blob.data) for blob in blobs}
    text = payload.manifest(form, [piece for blob in blobs for piece in blob.pieces])
    found = payload.read_manifest(form, text, {blob.digest: len(blob.data) for blob in blobs})
    rule = merge.Nesterov(merge.Outer())
    state = merge.start(rule, {"w": delta})
    del delta
    kept = {name: np.ones_like(x) for name, x in state.arrays.items()}
    fetch = lambda digest, offset, length: stored[digest][offset : offset + length]

    def fold() -> None:
        for _ in range(ISLANDS):
            blocks = payload.read(form, found, form.whole(), fetch)
            merge.fold(rule, state, PUSH, Verdict("", ISLANDS, 0), View(), blocks)

    def copy() -> None:
        for i in range(ISLANDS):
            for name, x in state.arrays.items():
                if i == 0 or not name.startswith("momentum/"):
                    np.copyto(kept[name], x)

    timed = common.in_turn(lambda: common.clock(fold)[0], lambda: common.clock(copy)[0], args.pairs)
    report.row(f"{ISLANDS} pushes of {args.millions} M / copies of what they touch", timed["ratio"], "×", at_most=3)
    report.row("one push", timed["a_seconds"]["median"] / ISLANDS, "s")
    report.row("float32 of Δ a second", 4 * n * ISLANDS / timed["a_seconds"]["median"] / 1e9, "GB/s")
    report.details["pushes / copies"] = timed
    report.finish()


if __name__ == "__main__":
    main()
