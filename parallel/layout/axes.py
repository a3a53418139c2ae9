"""The axes of the mesh, slowest first: the one place that names them all.

`replica` is the slow link between machines: only the exchange crosses it. The others are one machine's, or one fast
network's, own.
"""

AXES = ("replica", "stage", "fsdp", "expert", "context", "tensor")
USED = ("replica", "fsdp", "tensor")  # those that a mesh has so far
SLOW = "replica"
FAST = tuple(axis for axis in USED if axis != SLOW)
