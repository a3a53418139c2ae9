"""Unequal sites: what each would do of a round, so that all end it at about the same time.

Each site is a replica on its own mesh. What a step takes a site, and what it holds, is counted as if all sites were
like it (recipes/plan.py). Then the work is shared: a strategy that exchanges every step gives each site its part of
the rows, one that exchanges in rounds its number of inner steps. Nothing trains so yet: this is a plan.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from parallel.cost import pace
from parallel.cost.held import Flight
from parallel.cost.pace import Exchange
from parallel.cost.targets import Target
from parallel.layout import mesh as meshes
from parallel.layout.axes import SLOW
from recipes import memory, pipeline, plan, tried
from recipes.candidate import Candidate
from recipes.case import Case
from recipes.over_link import TRIED
from recipes.plan import CLOSE, TRIED_CODECS
from runtime.config import UsageError

SLOW_KEY = f"mesh.{SLOW}"
TRIED_MESHES = 3  # of a site: the fastest
TRIED_ROWS = 64  # numbers of rows that a site may be given


@dataclass(frozen=True)
class Share:
    """What a site does of a round: so many steps of so many rows. busy: seconds, of computing and of its own links."""

    target: Target
    candidate: Candidate
    rows: int
    steps: int

    @property
    def busy(self) -> float:
        return self.steps * self.candidate.bare_seconds

    @property
    def flags(self) -> str:
        """With which a dry run looks at this site's own part: without the others, and their exchange."""
        own = ("mesh.", "optimizer.", "compute.", "pipeline.")
        keys = {key: value for key, value in self.candidate.changes.items() if key.startswith(own)}
        keys |= {SLOW_KEY: 1, "data.batch_size": self.rows}
        return " ".join(f"--config.{key}={value}" for key, value in keys.items())


@dataclass(frozen=True)
class Round:
    """Of all sites, with one exchange at its end. waits: seconds of it in which the slow link is waited for."""

    strategy: str
    codec: str
    shares: tuple[Share, ...]
    waits: float
    seq_len: int

    @property
    def seconds(self) -> float:
        return max(share.busy for share in self.shares) + self.waits

    @property
    def tokens_per_second(self) -> float:
        return sum(share.rows * share.steps for share in self.shares) * self.seq_len / self.seconds

    @property
    def interval(self) -> int:
        """Steps of the site that makes most."""
        return max(share.steps for share in self.shares)

    @property
    def mildness(self) -> tuple[int, int]:
        return self.shares[0].candidate.mildness

    def idle(self, share: Share) -> float:
        """The part of a round in which a site does nothing."""
        return 1 - share.busy / self.seconds

    @property
    def binds(self) -> str:
        slowest = max(self.shares, key=lambda share: share.busy)
        return SLOW if self.waits > slowest.busy else slowest.candidate.step.binds


@dataclass(frozen=True)
class Found:
    """rounds: the best of each exchange, most tokens a second first. pick: one of them. notes: what was left out."""

    rounds: list[Round]
    pick: Round
    considered: int
    notes: list[str]


def cases(case: Case, targets: Sequence[Target]) -> list[Case]:
    """Of each site, as if all were like it. Raises UsageError."""
    count = len(targets)
    if SLOW_KEY in case.typed and case.config.mesh[SLOW] not in (count, -1):
        raise UsageError(f"{SLOW_KEY}={case.config.mesh[SLOW]}: {count} sites are named, and each is one replica")
    typed = tuple(key for key in case.typed if key != SLOW_KEY)
    found = [replace(case, target=replace(target, slices=count), typed=typed) for target in targets]
    for site in found:
        tried.check_typed(site)
    return found


# ── what a site can do ────────────────────────────────────────────────────────────────────────────────────────────────


def alone(case: Case) -> dict[int, list[Candidate]]:
    """{rows: what does a step of so many, fastest first, without an exchange}, on the site's fastest meshes. Raises
    UsageError where nothing fits."""
    batch, by_mesh = case.config.data.batch_size, {}
    for sizes in tried.divisible(case):
        found = list(_on_mesh(case, sizes, batch))
        if any(c.fits for _, c in found):
            by_mesh[tuple(sizes.values())] = [(rows, c) for rows, c in found if c.fits]
    fastest = lambda found: max(rows / c.bare_seconds for rows, c in found)
    rows_of: dict[int, list[Candidate]] = {}
    for same in sorted(by_mesh.values(), key=fastest, reverse=True)[:TRIED_MESHES]:
        for rows, c in same:
            rows_of.setdefault(rows, []).append(c)
    if not rows_of:
        raise UsageError(
            f"hardware={case.target.text}: no mesh of this site holds the model with {batch} windows or fewer: name a "
            "larger site, or leave it out"
        )
    return {rows: sorted(found, key=lambda c: c.bare_seconds) for rows, found in sorted(rows_of.items())}


def _on_mesh(case: Case, sizes: dict[str, int], batch: int) -> Iterator[tuple[int, Candidate]]:
    unit = meshes.cut("batch", sizes)[1]
    state, by = memory.state_bytes(case.base, sizes), unit * math.ceil(batch / unit / TRIED_ROWS)
    for rows in range(by, batch + 1, by):
        for layout in tried.layouts(case, sizes, rows // unit):
            yield rows, plan.counted(case, layout, "sync", "none", Exchange(), state, Flight())


def _with_exchange(
    case: Case, able: Mapping[int, list[Candidate]], strategy: str, codec: str
) -> tuple[dict[int, Candidate], Exchange]:
    """({rows: the fastest that fits beside such an exchange}, the exchange on the site's fastest mesh)."""
    known: dict[tuple[int, ...], plan.Exchanging] = {}
    best: dict[int, Candidate] = {}
    for rows, found in able.items():
        for c in found:
            sizes = dict(c.layout.sizes)
            key = tuple(sizes.values())
            if key not in known:
                known[key] = plan.exchanging(case, sizes, strategy, codec)
            x = known[key]
            own = plan.counted(case, c.layout, strategy, codec, x.exchange, x.state, x.flight)
            if own.fits and (c.layout.repeats == 1 or pipeline.takes_repeats(strategy)):
                best[rows] = own
                break
    return best, next(iter(known.values())).exchange


def rates_alone(case: Case, targets: Sequence[Target]) -> dict[str, float]:
    """Tokens a second of each kind of site by itself, without an exchange, where it holds the model."""
    found: dict[str, float] = {}
    typed = (plan.NARROW, *(key for key in case.typed if not key.startswith("sync.") and key != SLOW_KEY))
    for target in {target.text: target for target in targets}.values():
        with contextlib.suppress(UsageError):
            only = replace(case, target=target, link=None, typed=typed)
            found[target.text] = plan.search(only).pick.tokens_per_second
    return found


# ── sharing the work ──────────────────────────────────────────────────────────────────────────────────────────────────


def by_rows(best: Sequence[Mapping[int, Candidate]], batch: int) -> list[int] | None:
    """Rows of each site, of `batch` in all, with which the slowest is fastest; None: they cannot be shared so."""
    shared: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for able in best:
        further: dict[int, tuple[float, list[int]]] = {}
        for total, (slowest, given) in shared.items():
            for rows, c in able.items():
                time, sum_ = max(slowest, c.bare_seconds), total + rows
                if sum_ <= batch and time < further.get(sum_, (math.inf, []))[0]:
                    further[sum_] = time, [*given, rows]
        shared = further
    return shared[batch][1] if batch in shared else None


def by_steps(seconds: Sequence[float], interval: int, typed: bool) -> list[int]:
    """Inner steps of each site, of which one takes so many seconds: about `interval` of the fastest, so that the
    slowest ends a whole number with it. typed: exactly so many of the fastest."""
    length = interval * min(seconds)
    if not typed:
        length = max(1, round(length / max(seconds))) * max(seconds)
    return [max(1, math.floor(length / each + 1e-9)) for each in seconds]


def search(sites: Sequence[Case]) -> Found:
    """Raises UsageError where nothing fits, or the batch cannot be shared."""
    able = [alone(case) for case in sites]
    considered = sum(len(found) for rows in able for found in rows.values())
    first, rounds, refused = sites[0], [], {}
    for strategy, codec in itertools.product(
        first.fixed("sync.strategy", tuple(TRIED)), first.fixed("sync.codec", TRIED_CODECS)
    ):
        try:
            made = _round(sites, able, strategy, codec)
        except UsageError as error:
            refused[strategy] = f"{strategy} is left out: {str(error).splitlines()[0]}"
            continue
        considered += 1
        rounds += [made] if made else []
    if not rounds:
        why = "; ".join(refused.values()) or "what fits cannot share the batch: another data.batch_size may be"
        raise UsageError(
            f"hardware={'+'.join(case.target.text for case in sites)}: no exchange can be planned for: {why}"
        )
    rounds.sort(key=lambda x: -x.tokens_per_second)
    most = rounds[0].tokens_per_second
    pick = min((x for x in rounds if CLOSE * x.tokens_per_second >= most), key=lambda x: x.mildness)
    return Found(rounds, pick, considered, list(refused.values()))


def _round(
    sites: Sequence[Case], able: Sequence[Mapping[int, list[Candidate]]], strategy: str, codec: str
) -> Round | None:
    """None: it does not fit, or the rows cannot be shared."""
    best, exchanges = zip(
        *(_with_exchange(*row, strategy, codec) for row in zip(sites, able, strict=True)), strict=True
    )
    if not all(best):
        return None
    batch, exchange = sites[0].config.data.batch_size, exchanges[0]
    if exchange.interval == 1:
        given = by_rows(best, batch)
        steps = [1] * len(sites)
    else:
        given = [min(rows, key=lambda n: abs(n - batch / len(sites))) for rows in best]
        seconds = [rows[n].bare_seconds for rows, n in zip(best, given, strict=True)]
        steps = by_steps(seconds, exchange.interval, "sync.interval" in sites[0].typed)
    if given is None:
        return None
    rows = zip(sites, best, given, steps, strict=True)
    shares = tuple(Share(case.target, able[n], n, count) for case, able, n, count in rows)
    most = max(steps)
    exchange = replace(exchange, interval=most)
    on_wire = max(s.candidate.step.wire[SLOW] * e.interval for s, e in zip(shares, exchanges, strict=True))
    busy = max(share.busy for share in shares)
    waits = most * pace.late_seconds(exchange, on_wire, busy / most)
    return Round(strategy, codec, shares, waits, sites[0].network.seq_len)
