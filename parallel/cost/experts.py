"""Bytes that tokens cost on their way to experts of other devices and back, over `expert`, in closed form
(parallel/layout/experts.py)."""

from dataclasses import dataclass

from parallel.layout import experts

FLOAT32, INT32 = 4, 4


@dataclass(frozen=True)
class Routed:
    """Of one layer on one device. tokens: of a micro-step. chosen, experts: k, E. itemsize: of the compute dtype.
    count: n. way, rows: moe.dispatch, as resolved, and moe.rows. remat: compute.remat."""

    tokens: int
    dim: int
    chosen: int
    experts: int
    itemsize: int
    count: int
    way: str
    rows: str
    remat: str

    @property
    def sent(self) -> int:
        """Bytes in a micro-step: both ways in both passes; rows go there once more where the backward pass works the
        layer out again."""
        again = self._rows + self._gates + self._numbers
        return self.forward + 2 * self._rows + self._gates + again * (self.remat != "none")

    @property
    def forward(self) -> int:
        """Of them, those of the forward pass alone."""
        return 2 * self._rows + self._gates + self._numbers

    @property
    def multiplied(self) -> int:
        """Rows that a device has room for, full or not."""
        if self.goes_to_all:
            return experts.rows_of(self.rows, self.tokens, self.chosen, self.experts, self.count)
        return self._slots

    @property
    def goes_to_all(self) -> bool:
        return experts.goes_to_all(self.way, self.chosen, self.count)

    @property
    def _slots(self) -> int:
        groups = self.experts if self.way == "capacity" else self.count
        return groups * experts.slots_of(self.way, self.rows, self.tokens, self.chosen, self.experts, self.count)

    @property
    def _rows(self) -> int:
        """One way."""
        if self.goes_to_all:
            return self.tokens * self.dim * self.itemsize * (self.count - 1)
        return self._slots * self.dim * self.itemsize * (self.count - 1) // self.count

    @property
    def _gates(self) -> int:
        """Of the rows."""
        return self._beside(max(FLOAT32, self.itemsize))

    @property
    def _numbers(self) -> int:
        """Of the experts of the rows."""
        return 0 if self.way == "capacity" else self._beside(INT32)

    def _beside(self, itemsize: int) -> int:
        if self.goes_to_all:
            return self.tokens * self.chosen * itemsize * (self.count - 1)
        return self._slots * itemsize * (self.count - 1) // self.count
