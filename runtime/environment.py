"""What a run was computed by and on, and how much memory that took: for summary.json and the page of a run."""

import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

import runtime


def software(facts: Mapping[str, Any]) -> dict[str, Any]:
    """facts: of `agree.code_facts`; of data, which they hold too while a run goes on, summary.json says more."""
    said = {name: x for name, x in facts.items() if x not in ("", "None") and not name.startswith("data")}
    return {"slackline": runtime.VERSION, **said, "system": platform.platform()}


def environment(facts: Mapping[str, Any]) -> dict[str, Any]:
    """With the devices, which have been asked for."""
    devices = dict(Counter(device.device_kind for device in jax.devices()))
    return software(facts) | {
        "backend": jax.default_backend(),
        "devices": devices,
        "processes": jax.process_count(),
    }


def peak_memory() -> dict[str, int | None]:
    """Bytes: of this process so far, and of that of its devices that has held most; None where the backend does not
    say, as on CPU, whose devices are memory of the process."""
    unit = 1 if sys.platform == "darwin" else 1024
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    on_device = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"process": process, "device": max(on_device, default=None)}
