"""Bytes that attention sends over `context`, in closed form, for each way in which sequences that are cut attend
(parallel/layout/ring.py)."""

from dataclasses import dataclass

FLOAT32 = 4


@dataclass(frozen=True)
class Cut:
    """Of one layer on one device. tokens: of a micro-step. heads, kv_heads: of this device. itemsize: of the compute
    dtype. count: C. remat: compute.remat, by which the backward pass works the forward pass out once more, or not.
    as_made: a ring of two sends the only gradients that go on as its kernel has made them (XLA:GPU), not in float32."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    count: int
    remat: str
    as_made: bool = False

    def sent(self, way: str) -> int:
        """Bytes in a micro-step."""
        return {"ring": self._ring, "gather": self._gather, "heads": self._by_heads}[way]()

    def forward(self, way: str) -> int:
        """Of them, those of the forward pass alone."""
        keys = (self.count - 1) * 2 * self._bytes(self.kv_heads, self.itemsize)
        whole = self._bytes(2 * self.heads + 2 * self.kv_heads, self.itemsize)
        return whole * (self.count - 1) // self.count if way == "heads" else keys

    def _bytes(self, heads: int, itemsize: int) -> int:
        return self.tokens * heads * self.head_dim * itemsize

    def _ring(self) -> int:
        """Forward each hop's keys and values; backward they, and C times their gradients, all but the last in float32.
        Worked out again, the first hop is the backward pass's own."""
        size = self.itemsize if self.as_made and self.count == 2 else max(FLOAT32, self.itemsize)
        keys, gradients = (2 * self._bytes(self.kv_heads, size) for size in (self.itemsize, size))
        again = self.count - 2 if self.remat in ("full", "dots") else 0
        return (2 * (self.count - 1) + again + 1) * keys + (self.count - 1) * gradients

    def _gather(self) -> int:
        """All keys and values in both passes, and the sums of their gradients."""
        return 3 * self.forward("gather")

    def _by_heads(self) -> int:
        """Queries, keys, values and what comes of them, to and fro."""
        given = self._bytes(self.heads + 2 * self.kv_heads, self.itemsize)
        made = self._bytes(self.heads, self.itemsize)
        again = given * (self.remat != "none") + made * (self.remat in ("full", "dots"))
        return (2 * (given + made) + again) * (self.count - 1) // self.count
