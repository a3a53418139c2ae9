"""The chips that programs are compiled and planned for: what they hold, compute, read and send.

Rates are the makers' nominal ones, dense and each direction by itself; what of them a program reaches is not said here.
A file of the user's own, named by SLACKLINE_HARDWARE, adds chips and changes values of these (docs/targets.md).
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

GiB = 2**30
OWN_FILE = "SLACKLINE_HARDWARE"  # the environment variable

# XLA's descriptions, xla/backends/gpu/target_config/specs/*.txtpb: what all of these have in common, then each its own.
XLA_GPU = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048, "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
}  # fmt: skip
_HOPPER = {
    "shared_memory_per_core": 233472, "core_count": 132, "fpus_per_core": 128, "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98, "shared_memory_per_block_optin": 232448, "cuda_compute_capability": "major: 9",
}  # fmt: skip
_BLACKWELL = {
    "shared_memory_per_core": 233472, "core_count": 148, "fpus_per_core": 128, "l2_cache_size": 132644864,
    "clock_rate_ghz": 1.965, "shared_memory_per_block_optin": 232448,
    "cuda_compute_capability": "major: 10 feature_extension: ACCELERATED_FEATURES",
}  # fmt: skip
_AMPERE = {
    "shared_memory_per_core": 167936, "core_count": 108, "fpus_per_core": 64, "l2_cache_size": 41943040,
    "clock_rate_ghz": 1.41, "shared_memory_per_block_optin": 166912, "cuda_compute_capability": "major: 8",
}  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """One JAX device. A GPU has `inside`, a TPU `link` and the sides that a slice of it may have."""

    name: str
    kind: str  # JAX's device_kind, or the whole words in it by which the chip is known
    bf16: float  # FLOP/s
    memory: int = 0  # bytes
    bandwidth: float = 0.0  # of that memory, bytes a second
    outside: float = 0.0  # bytes a second that one chip sends out of its host (GPU) or slice (TPU)
    inside: float = 0.0  # GPU: to the others of its host
    host: float = 0.0  # to its host's memory, and from it
    link: float = 0.0  # TPU: over one of its links; along each side it has two where the side is wrapped, else one
    sides: int = 0  # TPU: dimensions of its slices
    cores: int = 1  # TPU: what the cloud's name counts of one chip
    largest: int = 0  # TPU: chips of the largest slice that can be rented; GPU: of one host
    int8: float = 0.0  # operations a second
    fp8: float = 0.0
    source: str = ""
    xla: Mapping[str, Any] = field(default_factory=dict)  # GPU: its own part of XLA's description

    @property
    def is_tpu(self) -> bool:
        return self.sides > 0

    def peak(self, dtype: str) -> float:
        """FLOP/s of products of this dtype; of one that the chip has no rate for, bf16's."""
        return {"fp8": self.fp8, "int8": self.int8}.get(dtype, 0.0) or self.bf16


_BOOK = "jax-ml.github.io/scaling-book, ch. 2"
_CLOUD = f"cloud.google.com/tpu/docs/system-architecture-tpu-vm; links, DCN and host: {_BOOK}; "
_LIBTPU = "memory: what libtpu 0.0.52 says is available"
_NVLINK = "NVLink and one 400 Gbit/s adapter for each GPU; host: PCIe 5 ×16; memory: XLA's description"
_AMPERES = "NVIDIA's datasheet; NVLink and a 200 Gbit/s adapter for each; host: PCIe 4 ×16; memory: XLA's"
# By whole words of device_kind the first match wins: an H100 PCIe is no H100.
CHIPS = (
    Chip("gb200", "GB200", 2450e12, source="NVIDIA dgxc-benchmarking"),
    Chip("b200", "NVIDIA B200", 2250e12, 191514411008, 7.67232e12, 50e9, 900e9, 64e9, largest=8, fp8=4500e12,
         int8=4500e12, source=f"NVIDIA's datasheet; {_NVLINK}", xla=_BLACKWELL),
    Chip("gh200", "GH200", 989e12, source="NVIDIA's datasheet"),
    Chip("h200", "NVIDIA H200 141GB HBM3e", 989e12, 151397597184, 4.8e12, 50e9, 450e9, 64e9, largest=8, fp8=1979e12,
         int8=1979e12, source=f"NVIDIA's datasheet; {_NVLINK}", xla=_HOPPER),
    Chip("h100-pcie", "H100 PCIe", 756e12, source="NVIDIA's datasheet"),
    Chip("h100-nvl", "H100 NVL", 835e12, source="NVIDIA's datasheet"),
    Chip("h100", "NVIDIA H100 80GB HBM3", 989e12, 84942979072, 3.35232e12, 50e9, 450e9, 64e9, largest=8, fp8=1979e12,
         int8=1979e12, source=f"NVIDIA's datasheet; {_NVLINK}", xla=_HOPPER),
    Chip("a100-40gb", "NVIDIA A100-SXM4-40GB", 312e12, 42331013120, 1.5552e12, 25e9, 300e9, 32e9, largest=8,
         int8=624e12, source=_AMPERES, xla=_AMPERE),
    Chip("a100", "NVIDIA A100-SXM4-80GB", 312e12, 85100068864, 2.03904e12, 25e9, 300e9, 32e9, largest=8,
         int8=624e12, source=_AMPERES, xla=_AMPERE),
    Chip("l40s", "L40S", 362e12, source="NVIDIA's datasheet"),
    Chip("l4", "L4", 121e12, 24 * 10**9, 300e9, 1.5625e9, 25e9, 32e9, largest=8, fp8=242e12, int8=242e12,
         source="NVIDIA's datasheet; PCIe 4 ×16, to its host, too, and 100 Gbit/s for a host of 8"),
    Chip("v4-lite", "TPU v4 lite", 138e12, source="cloud.google.com/tpu/docs"),
    Chip("v4", "TPU v4", 275e12, int(30.75 * GiB), 1.228e12, 6.25e9, host=16e9, link=45e9, sides=3, cores=2,
         largest=4096, int8=275e12, source=_CLOUD + _LIBTPU),
    Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * GiB), 8.19e11, 6.25e9, host=16e9, link=45e9, sides=2, largest=256,
         int8=394e12, source=_CLOUD + _LIBTPU),
    Chip("v5p", "TPU v5", 459e12, int(95.73 * GiB), 2.765e12, 6.25e9, host=16e9, link=90e9, sides=3, cores=2,
         largest=6144, int8=918e12, source=_CLOUD + _LIBTPU),
    Chip("v6e", "TPU v6 lite", 918e12, int(31.24 * GiB), 1.64e12, 6.25e9, host=32e9, link=90e9, sides=2, largest=256,
         int8=1836e12, source=_CLOUD + _LIBTPU),
    Chip("tpu7x", "TPU7x", 1153e12, source="cloud.google.com/tpu/docs; one of a chip's two cores, JAX's devices"),
)  # fmt: skip
# Other names that JAX gives to devices.
ALSO = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU v6": "v6e", "B200": "b200", "H200": "h200",
        "H100": "h100", "A100": "a100"}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s of one device, or None for a chip that is not in the catalogue (a CPU, say): its MFU is not known."""
    words = {chip.kind: chip.bf16 for chip in CHIPS} | {kind: by_name(CHIPS)[name].bf16 for kind, name in ALSO.items()}
    known = lambda kind: re.search(rf"(?<!\w){re.escape(kind)}(?!\w)", device_kind, re.IGNORECASE)  # an L40S is no L4
    return next((peak for kind, peak in words.items() if known(kind)), None)


def by_name(chips: tuple[Chip, ...]) -> dict[str, Chip]:
    return {chip.name: chip for chip in chips}


@cache
def catalogue(own: str | None = None) -> dict[str, Chip]:
    """The chips by name, with those of the user's file. own: its path; by default what SLACKLINE_HARDWARE says.

    Raises ValueError for a file that is none, naming file, chip and key.
    """
    path = own or os.environ.get(OWN_FILE)
    found = by_name(CHIPS)
    if not path:
        return found
    try:
        tables = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{OWN_FILE}={path}: {error}") from error
    known = {f.name: f.type for f in fields(Chip) if f.name != "name"}
    for name, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(
                f"{OWN_FILE}={path}: {name}={values!r} stands outside of a chip's table, as [h100] begins one"
            )
        if odd := [key for key in values if key not in known]:
            raise ValueError(f"{OWN_FILE}={path}: [{name}] has {odd[0]!r}; a chip has {', '.join(known)}")
        if wrong := [key for key, x in values.items() if not _is(known[key], x)]:
            raise ValueError(
                f"{OWN_FILE}={path}: [{name}] {wrong[0]}={values[wrong[0]]!r}: expected {_said(known[wrong[0]])}"
            )
        like = found.get(name)
        if not like and not {"kind", "bf16"} <= values.keys():
            raise ValueError(f"{OWN_FILE}={path}: [{name}] is a new chip, which needs at least kind and bf16")
        found[name] = replace(like, **values) if like else Chip(name, **values)
    return found


def _is(kind: Any, value: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, int | (float if kind is float else int)) and not isinstance(value, bool) and value > 0
    return isinstance(value, str if kind is str else dict)


def _said(kind: Any) -> str:
    numbers = {int: "a whole number above 0", float: "a number above 0"}
    return numbers.get(kind) or ("text in quotes" if kind is str else "a table")
