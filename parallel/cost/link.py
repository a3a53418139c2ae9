"""A slow link: how long what is sent takes on it, and what share of the time is left for computing."""

import re
from dataclasses import dataclass

RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # bits per second
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
FRAME = 1514 / 1448  # Ethernet, IPv4 and TCP around what a packet of 1,500 bytes carries


@dataclass(frozen=True)
class Link:
    """bits_per_second: in each direction, out of one host or slice. latency: seconds until what was sent is there."""

    text: str
    bits_per_second: float
    latency: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Link":
        """`100mbit`, or `10gbit,20ms`. Raises ValueError."""
        number = r"(\d+(?:\.\d+)?)"
        found = re.fullmatch(rf"{number}\s*([a-z]+)(?:\s*,\s*{number}\s*([a-z]+))?", text.strip().lower())
        wrong = ValueError(
            f"link={text}: expected a rate above 0 with its unit, and perhaps a latency: as in 100mbit, or 10gbit,20ms "
            f"({', '.join(RATES)} a second; {', '.join(TIMES)})"
        )
        if not found or found[2] not in RATES or (found[4] and found[4] not in TIMES) or not float(found[1]):
            raise wrong
        latency = float(found[3]) * TIMES[found[4]] if found[3] else 0.0
        return cls(text, float(found[1]) * RATES[found[2]], latency)

    def seconds(self, size: float, hops: float = 0) -> float:
        """That so many bytes take, packets' headers included, in so many messages that wait for each other."""
        return 8 * FRAME * size / self.bits_per_second + hops * self.latency
