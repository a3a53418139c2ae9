"""What tests of the fold share: a log in one process, the rules in all their forms, and a digest of what they give."""

import dataclasses

import numpy as np

from islands import decode, merge, payload
from islands import state as states
from islands.merge import Average, Compensated, Nesterov, Outer, Quorum
from islands.payload import Form
from islands.record import Record
from islands.view import View

SGD = Outer("sgd", 1.0, 0.0)
NESTEROV = Outer("nesterov", 0.1, 0.8)
CASES = [
    (Average(NESTEROV, 0), 0),
    (Average(NESTEROV, 2), 2),
    (Average(Outer("adam", 0.1, 0.9), 1), 1),
    (Nesterov(NESTEROV), -1),
    (Nesterov(NESTEROV), 1),
    (Nesterov(NESTEROV, buffer=1), -1),
    (Nesterov(NESTEROV, buffer=3, delay=0.5), -1),
    (Nesterov(Outer("sgd", 0.1, 0.0), buffer=2), -1),
    (Compensated(Outer("sgd", 0.1, 0.0), strength=0.3), -1),
    (Compensated(NESTEROV), -1),
    (Quorum(NESTEROV, 3), -1),
    (Quorum(Outer("adam", 0.1, 0.9), 2), -1),
]


class Run:
    """A log of one process: records go through the view and the fold, as in every member."""

    def __init__(self, rule, params, islands="", staleness=-1):
        self.rule, self.staleness, self.view, self.records = rule, staleness, View(), []
        self.state = merge.start(rule, params)
        for name in islands:
            self.write("join", name)

    def write(self, type: str, name: str, deltas=None, **fields):
        """Folds a record of this island; returns its verdict."""
        island = self.view.islands.get(name)
        incarnation = (island.incarnation if island else 0) + (type == "join")
        known = {"clock": max(island.clock if island else 0, self.view.complete) if type == "join" else island.clock}
        record = Record(
            **{"type": type, "island": name, "incarnation": incarnation, "nonce": "0" * 32, "base": self.view.version}
            | known | fields
        )  # fmt: skip
        record = dataclasses.replace(record, sequence=self.view.next)
        refused = merge.refusal(self.rule, self.staleness, self.view, record)
        self.view, verdict = self.view.after(record, refused)
        blocks = None if deltas is None else ((k, 0, np.array(v, np.float32)) for k, v in deltas.items())
        merge.fold(self.rule, self.state, record, verdict, self.view, blocks)
        self.records.append((record, verdict, deltas))
        return verdict

    def params(self):
        return {leaf: self.state.arrays[f"params/{leaf}"] for leaf in self.state.leaves()}


def between(n: int, low: float, high: float) -> np.ndarray:
    """float32 that look random and are the same for ever, which NumPy's generators do not promise (splitmix64)."""
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (low + (high - low) * ((x >> np.uint64(40)).astype(np.float64) / 2**24)).astype(np.float32)


def one_fold(cut: int = 0) -> str:
    """The digest after every rule has folded payloads of int4, of all sizes and denormal numbers too. cut: where the
    large array is folded in two parts, by two processes."""
    form = Form({"u": 5000, "v": 7}, decode.build("int4"))
    data = {leaf: between(n, -2.0, 2.0) for leaf, n in form.sizes.items()}
    codes = lambda blocks: between(64 * blocks, 17, 255).astype(np.uint8).tobytes()
    message = {  # as a JAX program would have made it, on any machine
        "u": codes(40) + between(40, 1, 0x4080).astype("<u2").tobytes(),
        "v": codes(1) + b"\x80\x3f",
    }
    blob = message["u"] + message["v"]
    name, (u, v) = payload._digest(blob), (payload._digest(message[leaf]) for leaf in "uv")
    pieces = [
        payload.Piece("u", 0, 5000, name, 0, len(message["u"]), u),
        payload.Piece("v", 0, 7, name, len(message["u"]), len(message["v"]), v),
    ]
    found = payload.read_manifest(form, payload.manifest(form, pieces), {name: len(blob)})
    digests = []
    for rule, staleness in CASES:
        joined: dict[str, np.ndarray] = {}
        parts = [(0, cut), (cut, 5000)] if cut else [(0, 5000)]
        for i, (first, last) in enumerate(parts):
            ranges = {"u": [(first, last - first)]} | ({"v": [(0, 7)]} if i == 0 else {})
            own = {leaf: data[leaf][wanted[0][0] :][: wanted[0][1]] for leaf, wanted in ranges.items()}
            run = Run(rule, own, "ab", staleness)
            for tokens, island in enumerate("abab", 3):
                _push(run, island, tokens, payload.read(form, found, ranges, lambda digest, at, n: blob[at : at + n]))
            for array, x in run.state.arrays.items():
                joined[array] = np.concatenate([joined[array], x]) if array in joined else x
        digests.append(states.State(joined, run.state.numbers).digest())
    return payload._digest("".join(digests).encode())


def _push(run: Run, island: str, tokens: int, blocks) -> None:
    base = run.view.islands[island].version if run.rule.pins else run.view.version
    clock = run.view.islands[island].clock
    record = Record(type="push", island=island, incarnation=1, nonce="0" * 32, clock=clock, base=base, tokens=tokens)
    run.view, verdict = run.view.after(record)
    assert verdict.folded
    merge.fold(run.rule, run.state, record, verdict, run.view, blocks)
