"""Peak rates of chips."""

import re

# Dense bf16 FLOP/s of one JAX device, by whole words of its device_kind. First match wins.
PEAK_BF16 = {
    "GB200": 2450e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,  # one of the chip's two cores, which JAX shows as two devices
}


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s of one device, or None for a chip that is not in the table (a CPU, say): its MFU is not known."""
    known = lambda name: re.search(rf"(?<!\w){name}(?!\w)", device_kind, re.IGNORECASE)  # an L40S is no L4
    return next((peak for name, peak in PEAK_BF16.items() if known(name)), None)
