"""What the hardware can do: peak rates for model FLOPs utilisation (MFU)."""

# Dense bf16 FLOP/s of one JAX device, by a part of its device_kind. First match wins.
PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153e12,  # one of the chip's two cores, which JAX shows as two devices
}


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s of one device, or None for a chip that is not in the table (a CPU, say): its MFU is not known."""
    return next((peak for name, peak in PEAK_BF16.items() if name.lower() in device_kind.lower()), None)
