"""A run that is an island: between two rounds, what has been gone goes into the log, and the next version comes back.

The log, the fold and who may write are in islands/; here are the arrays of the run. Everything that the next round
needs is in the state (parallel/strategies/island.py), so a run that was killed goes on in the middle of a round, and
makes the same push. Rounds that the log has and the checkpoint lacks are made again, from the versions that they had
begun with, and not pushed a second time: so the optimizer, the residuals and the order of the data are what they were.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from islands import pace, payload, snapshot, terms
from islands.follow import Follower, begin_at, form_of
from islands.member import Member, encoded
from islands.payload import Blob, Draw, Part, Ranges
from islands.processes import Processes
from islands.reader import LogError, Reader, record_key
from islands.record import LIMIT, PUSH, Run, digest
from islands.state import Params
from islands.store import Store, open_store, run
from recipes.build import Parts
from recipes.flat import Flat
from runtime.config import UsageError, flatten
from runtime.console import human_bytes
from runtime.digest import named_arrays

NAME = "island"  # of the strategy; and in the facts of a checkpoint


@dataclass(frozen=True)
class Met:
    """The log of a run, before anything is compiled. given: run.json."""

    store: Store
    given: Run


def data_seed(config: Any) -> int:
    """Of the order of the data: each island has its own. The weights are those of the log."""
    return int(hashlib.sha256(f"{config.seed} {config.island.name}".encode()).hexdigest()[:8], 16)


def meet(config: Any, parts: Parts) -> Met:
    """Raises UsageError where the log is of another run than this config's."""
    for key, example in (("log", "runs/shared"), ("name", "a")):
        if not config.island[key]:
            raise UsageError(f"sync.strategy=island needs island.{key}, as in --config.island.{key}={example}")
    reader = run(Reader.open(open_store(config.island.log)))
    terms.check_folded(reader.run.facts)
    wrong = list(terms.differing(terms.agreed(dict(flatten(config))), reader.run.facts))
    sizes = {name: x.size for name, x in named_arrays(parts.param_shapes).items()}
    if not wrong and sizes != reader.run.facts["leaves"]:
        wrong = ["its weights have other names or sizes than those of this config"]
    if wrong:
        raise UsageError(f"island.log={config.island.log} is of another run:\n  " + "\n  ".join(wrong))
    return Met(reader.store.store, reader.run)


class Islander:
    """What joins a run's loop and its log. Its methods take and give the state."""

    def __init__(self, config: Any, parts: Parts, flat: Flat, member: Member | Processes, say: Callable[[str], None]):
        self.config, self.flat, self.member, self._say = config, flat, member, say
        self._tokens = config.data.batch_size * parts.task.units  # of a step
        self._clock = parts.state.strategy["round"]["clock"]  # as all scalars of the state lie
        self._began = time.monotonic()
        self._rounds = 0
        self._made: list[Made] = []  # rounds that are in the log already, and are made again
        self._first, self._length = 0, config.sync.interval

    @classmethod
    def join(
        cls, met: Met, config: Any, parts: Parts, state: Any, before: Mapping[str, Any], say: Callable[[str], None]
    ) -> tuple["Islander", Any]:
        """(it, the state that its first step begins with). before: the facts of the checkpoint that the run goes on
        from; empty: it begins."""
        saved = {name: int(x) for name, x in jax.device_get(state.strategy["round"]).items()}
        last, name = before.get(NAME), config.island.name
        if last:
            _confirm(met, last)
        flat = Flat(parts.mesh, parts.param_shapes, form_of(met.given.facts).codec.block)
        clock = saved["clock"] if last else 0
        member: Member | Processes
        if jax.process_count() > 1:
            member = Processes.start(met.store, name, clock, say, flat.share)
        else:
            member = Member.start(met.store, name, clock, say)
        own = cls(config, parts, flat, member, say)
        if not last:
            return own, own._begin(int(state.step), state)
        own._first, own._length = saved["first"], saved["length"]
        own._made = made_since(met, name, saved["clock"], flat.share if jax.process_count() > 1 else None)
        if own._made:
            say(f"the log has {len(own._made)} rounds of {name} that the checkpoint lacks: making them again")
        elif member.follower.terms.rule.pins:  # a round begins where it has joined
            return own, own._begin(int(state.step), state)
        else:
            state.strategy["round"]["clock"] = own._scalar(member.clock)
        return own, state

    def after(self, done: int, state: Any) -> Any:
        """The state that the next step begins with, after so many steps."""
        self.member.check()
        if done - self._first < self._length and done != self.config.steps:
            return state
        state = self._push(done, state)
        return self._begin(done, state)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of where the log was."""
        follower = self.member.follower
        return {NAME: {"next": follower.view.next, "tail": follower.tail}}

    def end(self, interrupted: bool) -> None:
        """Leaves the log. interrupted: the machine is about to go."""
        self.member.end(patience=20.0 if interrupted else float("inf"))
        requests, rounds = self.member.store.requests, self._rounds
        self._say(
            f"{requests:,} requests of the log's store in {rounds} rounds, {requests / max(rounds, 1):.1f} a round"
        )
        if not interrupted:
            self.member.check()

    # ── a round ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _push(self, done: int, state: Any) -> Any:
        seconds, steps, own = time.monotonic() - self._began, done - self._first, state.strategy
        numbers = {name: int(x) for name, x in jax.device_get(own["round"]).items()}
        owed = self.flat.host(own["owed"]) if own["owed"] else {}
        blobs, owed_now = self._encoded(state, owed, numbers["clock"])
        speed, self._rounds = steps / max(seconds, 1e-9), self._rounds + 1
        if self._made:
            made, counts = self._made.pop(0), blobs is not None
            self._compare(made, blobs)
        else:
            told = {pace.SPEED: speed.hex()}
            counts = self.member.hand_over(blobs, numbers["version"], steps, steps * self._tokens, told)
        numbers["skipped"] += not counts
        round = own["round"] | {"skipped": self._scalar(numbers["skipped"])}
        kept = self.flat.tree(owed_now if counts else owed, own["owed"]) if owed else {}
        return replace(state, strategy=own | {"owed": kept, "round": round})

    def _encoded(self, state: Any, owed: Params, clock: int) -> tuple[list[Blob] | None, Params]:
        """(what this process pushes, what it owes then). None: it is not finite."""
        base, local = self.flat.host(state.params), self.flat.host(state.strategy["replicas"]["params"])
        owed, parts = {name: x.copy() for name, x in owed.items()}, []
        for name, ranges in self.flat.share.items():
            place = 0
            for first, count in ranges:
                here = slice(place, place + count)
                delta = base[name][here] - local[name][here]
                parts.append(Part(name, first, delta, owed[name][here] if owed else None))
                place += count
        try:
            return encoded(self.member.follower, parts, Draw(self.config.seed, self.member.name, clock)), owed
        except ValueError as error:
            self._say(f"round {clock} is pushed as zeros: {error}")
            return None, owed

    def _compare(self, made: "Made", blobs: list[Blob] | None) -> None:
        if not {blob.digest for blob in blobs or ()} <= set(made.payloads):
            self._say(
                f"round {made.clock}, made again, is not to the bit what {self.member.name} had pushed (on other "
                "hardware, or another mesh or JAX?): what it had pushed counts"
            )

    def _begin(self, done: int, state: Any) -> Any:
        """A round, from the version that the log gives, or that it had given."""
        terms, speeds, name = self.member.follower.terms, self.member.follower.speeds, self.member.name
        self._first, self._length, own = done, terms.interval, state.strategy
        if self._made:
            clock, version, params, self._length = self._made[0][:4]
        else:
            version, params = self.member.take()
            clock = self.member.clock
            if terms.dylu and name in speeds:
                live = self.member.follower.view.live()
                fastest = max(speed for each, speed in speeds.items() if each in live)
                self._length = pace.local_steps(terms.interval, speeds[name], fastest)
        numbers = {"clock": clock, "version": version, "first": done, "length": self._length}
        strategy = own | {
            "replicas": own["replicas"] | {"params": self.flat.tree(params, own["replicas"]["params"])},
            "round": own["round"] | {name: self._scalar(x) for name, x in numbers.items()},
        }
        self._began = time.monotonic()
        return replace(state, params=self.flat.tree(params, state.params), strategy=strategy)

    def _scalar(self, x: int) -> jax.Array:
        return jax.device_put(np.int32(x), self._clock.sharding)


class Made(NamedTuple):
    """A round that is in the log. params: of the version that it began with; empty: of the first, which the checkpoint
    has. payloads: digests."""

    clock: int
    version: int
    params: Params
    steps: int
    payloads: list[str]


def made_since(met: Met, name: str, clock: int, share: Ranges | None) -> list[Made]:
    """Those of an island, from round `clock` on. share: of the arrays; None: all. Raises LogError where the log has not
    what they began with."""
    reader = run(snapshot.begin(met.store, Reader))
    own = [
        entry.record
        for entry in run(reader.read())
        if entry.record and entry.verdict.folded and (entry.record.type, entry.island) == (PUSH, name)
    ]
    own = [record for record in own if record.clock >= clock]
    wanted = {record.base for record in own[1:]}
    params: dict[int, Params] = {}
    if wanted:
        place = run(begin_at(reader, most=min(wanted)))
        follower = run(Follower.at(place, run(Reader.open(met.store)), met.store, share=share))
        _keep(follower, wanted, params)
    if wanted - params.keys():
        raise LogError(
            f"{name} has made rounds that its checkpoint lacks, from version {min(wanted)} on, and the log was "
            "truncated after that: start with another --workdir, which joins at the newest version"
        )
    return [
        Made(r.clock, r.base, params.get(r.base, {}), r.steps, [payload.digest for payload in r.payloads]) for r in own
    ]


def _keep(follower: Follower, wanted: set[int], params: dict[int, Params]) -> None:
    """Copies of the parameters of these versions."""
    while wanted - params.keys():
        version = follower.view.version
        if version in wanted:
            params[version] = follower.state.copied("params")
        if not run(follower.advance(follower.view.next)):
            break


def _confirm(met: Met, last: Mapping[str, Any]) -> None:
    """That the log is the one that the checkpoint was made with: the hash of the last record that was folded."""
    number = last["next"] - 1
    reader = run(Reader.open(met.store))
    data = run(reader.store.get(record_key(number), LIMIT + 1)) if number >= 0 else None
    if data is None and number >= 0 and run(snapshot.oldest(reader)).version <= number:
        raise LogError(
            f"record {number}, which this island has folded, is not in the log: it is another log, or a copy"
        )
    if data is not None and digest(data) != last["tail"]:
        raise LogError(f"record {number} is not the one that this island has folded: the log was forked")


def rows(config: Any, met: Met) -> list[tuple[str, str]]:
    """Of the table of a start."""
    form, merge = form_of(met.given.facts), config.island.merge
    bound = "none" if config.island.staleness < 0 else f"{config.island.staleness} rounds"
    size = human_bytes(payload.payload_bytes(form.sizes, form.codec))
    steps = "at most " if config.island.dylu else ""
    return [
        ("island", f"{config.island.name} of {config.island.log}"),
        ("  merge", f"{merge}, staleness bound {bound}"),
        ("  a push", f"{size} ({config.sync.codec}), after {steps}{config.sync.interval} steps"),
    ]
