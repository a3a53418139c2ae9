"""What a server has done, as Prometheus reads it: text, one number a line."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

FIRST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # borders of a histogram
NEXT_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
NAME = "slackline_"


class Histogram:
    def __init__(self, borders: Sequence[float]):
        self._borders, self._counts, self._sum = borders, [0] * (len(borders) + 1), 0.0

    def add(self, x: float) -> None:
        self._counts[bisect.bisect_left(self._borders, x)] += 1
        self._sum += x

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for border, count in zip([*self._borders, "+Inf"], self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{border}"}} {below}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """Of one server, counted in its event loop. Paths are those that there are: a client cannot make new lines."""

    def __init__(self) -> None:
        self.replies: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens: Counter[str] = Counter()  # of "prompts", of "answers"
        self.first = Histogram(FIRST_SECONDS)  # seconds from a request to the first token of an answer to it
        self.next = Histogram(NEXT_SECONDS)  # seconds from a token to the next one of an answer
        self.gone = 0  # clients that went before they had their answer

    def text(self, now: Mapping[str, float]) -> str:
        """now: {name: a number as it is at the moment}."""
        lines = [f"# TYPE {NAME}requests_total counter"]
        lines += [
            f'{NAME}requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.replies.items())
        ]
        lines += [f"# TYPE {NAME}tokens_total counter"]
        lines += [f'{NAME}tokens_total{{of="{of}"}} {self.tokens[of]}' for of in ("prompts", "answers")]
        lines += [f"# TYPE {NAME}gone_total counter", f"{NAME}gone_total {self.gone}"]
        for name, histogram in (("first_token_seconds", self.first), ("next_token_seconds", self.next)):
            lines += [f"# TYPE {NAME}{name} histogram", *histogram.lines(NAME + name)]
        for name, x in now.items():
            lines += [f"# TYPE {NAME}{name} gauge", f"{NAME}{name} {x}"]
        return "\n".join(lines) + "\n"
