"""XLA's own compilers, on a machine that has none of their chips: libtpu for TPUs, JAX's CUDA plugin for NVIDIA's GPUs.
Nothing is allocated, and nothing can run."""

import importlib.metadata
import math
import os
import re
from typing import Any

from parallel.cost.hardware import XLA_GPU, Chip
from parallel.cost.targets import Target


def check_compiler(chip: Chip) -> None:
    """Raises ImportError where the compiler's package is missing, or is that of another JAX, with the command that
    installs it; ValueError for a chip that there is no compiler for."""
    if not chip.is_tpu and not chip.xla:
        raise ValueError(f"XLA has no description of {chip.name} to compile for, so it can only be planned for")
    version = importlib.metadata.version("jax")
    wanted = {"libtpu": _libtpu_of_jax()} if chip.is_tpu else {"jax-cuda13-plugin": version, "jax-cuda13-pjrt": version}
    command = "pip install --no-deps " + " ".join(
        f"{name}=={v}" if not chip.is_tpu else name for name, v in wanted.items()
    )
    size = "484 MB, under Google Cloud's terms" if chip.is_tpu else "400 MB; nothing of NVIDIA's comes with them"
    for name, right in wanted.items():
        found = _version(name)
        if found is None:
            raise ImportError(f"compiling for {chip.name} needs {name}, which is not installed: `{command}` ({size})")
        if right and not _fits(name, found, right):
            raise ImportError(f"{name} {found} is not of JAX {version}, which wants {right}: `{command}` ({size})")


def compiler(chip: Chip) -> str:
    """Its package and version."""
    package = "libtpu" if chip.is_tpu else "jax-cuda13-plugin"
    return f"{package} {_version(package)}"


def has_cudnn() -> bool:
    """Whether JAX can trace cuDNN's attention."""
    return _version("nvidia-cudnn-cu13") is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(package: str, found: str, right: str) -> bool:
    """A CUDA plugin must be JAX's own; a libtpu may be newer."""
    numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)]
    return found == right if package != "libtpu" else numbers(found) >= numbers(right)


def _libtpu_of_jax() -> str:
    """The version that JAX's own extra asks for, "" if it asks for none."""
    asked = [re.match(r"libtpu\s*==\s*([\d.]*\d)", line) for line in importlib.metadata.requires("jax") or ()]
    return next((found[1] for found in asked if found), "")


def prepare(chip: Chip) -> None:
    """Makes this process one that compiles for the chip. Call before JAX is asked for any device."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is run
    if chip.is_tpu:
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # else two dry runs meet at a lock
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "true")  # this machine is asked for no TPU of its own
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        # Mosaic's kernels make a program for each multiprocessor that the first device has; here that is the CPU.
        jax.Device.core_count = chip.xla["core_count"]
        given = os.environ.get("XLA_FLAGS", "")
        if "xla_gpu_autotune_level" not in given:  # there is no card to try kernels on
            os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_autotune_level=0".strip()


def devices(target: Target) -> list[Any]:
    """To lay a mesh over, and compile for; nothing can be put on them."""
    from jax.experimental import topologies

    if not target.chip.is_tpu:
        hosts, each = target.sides
        return list(
            topologies.get_topology_desc(
                platform="cuda", topology_name=target.chip.name, target_config=description(target.chip),
                topology=f"{target.slices}x{hosts}x{each}",
            ).devices
        )  # fmt: skip
    alone = math.prod(target.sides) == 1
    return list(
        topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{target.chip.name}:{'x'.join(map(str, target.sides))}",
            chip_config_name="megacore" if target.chip.cores == 2 else "default",
            chips_per_host_bounds=(1, 1, 1) if alone else (2, 2, 1),
            wrap=(*target.wrap, False)[:3],
            num_slices=target.slices,
        ).devices
    )


def refused(error: BaseException) -> tuple[float | None, float | None] | None:
    """(bytes of temporaries, bytes that there are; None where it does not say) of a compiler's sentence that a program
    does not fit; None: the error is another one. Only the TPU's refuses."""
    said = str(error)
    if not said.startswith("RESOURCE_EXHAUSTED"):
        return None
    size = lambda found: float(found[1]) * 1024 ** "BKMGT".index(found[2] or "B") if found else None
    number = r"\(?(\d+(?:\.\d+)?)([KMGT]?)"
    used = re.search(rf"temporaries {number}", said) or re.search(rf"[Uu]sed {number}", said)
    return size(used), size(re.search(rf"available HBM {number}", said) or re.search(rf"of {number} hbm", said))


def description(chip: Chip) -> str:
    """XLA's GpuTargetConfig in text form."""
    own = XLA_GPU | dict(chip.xla) | {"memory_bandwidth": int(chip.bandwidth), "device_memory_size": chip.memory}
    info = " ".join(f"{key} {{ {x} }}" if isinstance(x, str) else f"{key}: {x}" for key, x in own.items())
    return (
        f'gpu_device_info {{ {info} }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'runtime_version {{ major: 13 }} device_description_str: "{chip.kind}"'
    )
