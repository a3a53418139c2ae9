"""A member in a process of its own, that trains nothing: python tests/one_island.py LOG NAME ROUNDS [SECONDS]

What a round makes follows from its name and its number alone. SECONDS: of a round; if it takes less than one, it
asks the store and beats more often. It says what has been acknowledged to it, and ends when it has pushed so many
rounds."""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402

import islands.log  # noqa: E402
from islands import member as members  # noqa: E402
from islands.member import Member  # noqa: E402
from islands.payload import Draw, Part  # noqa: E402
from islands.store import open_store  # noqa: E402


def made(name: str, clock: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Small whole numbers: their sums are exact in any order."""
    rng = np.random.default_rng([ord(letter) for letter in name] + [clock])
    return {leaf: rng.integers(-4, 5, size).astype(np.float32) for leaf, size in sizes.items()}


def main(log: str, name: str, rounds: str, seconds: str = "0") -> None:
    if float(seconds) < 1:
        members.IDLE, islands.log.BEAT = 0.02, 0.2
    member = Member.start(open_store(log), name, 0, lambda line: print(line, flush=True))
    form = member.follower.form
    pushed = False
    while (clock := member.clock) < int(rounds):
        version, _ = member.take()
        if pushed:
            print(f"folded {name} {clock - 1}", flush=True)
        time.sleep(float(seconds))
        parts = [Part(leaf, 0, x) for leaf, x in made(name, clock, dict(form.sizes)).items()]
        pushed = True
        member.hand_over(members.encoded(member.follower, parts, Draw(0, name, clock)), version, 1, 1, {})
    member.take()
    member.end()
    member.check()
    print(f"{member.store.requests} requests")


if __name__ == "__main__":
    main(*sys.argv[1:])
