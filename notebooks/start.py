"""What a notebook needs before its first line: the project's folder, and on Google Colab the project's packages.

The first cell of every notebook runs this, inside the kernel. Colab comes with an older JAX, and on a GPU with a plugin
for it. So JAX is installed with the plugin of this machine's accelerator and with our requirements in one call of pip:
with the requirements alone the old plugin would stay, and the GPU would silently not be used. Elsewhere nothing is
installed.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements-notebooks.txt"
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
TPU_NAMES = ("TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR")  # of environment variables


class Missing(Exception):
    """Its message is for the user: notebooks show it without a traceback."""

    def _render_traceback_(self) -> list[str]:  # asked for by IPython
        return [f"error: {self}"]


def accelerator() -> str:
    """The extra of JAX's package for this machine: cuda12, tpu, or none."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        return "cuda12"
    has_tpu = any(name in os.environ for name in TPU_NAMES) or any(Path(path).exists() for path in TPU_DEVICES)
    return "tpu" if has_tpu else ""


def pip(extra: str) -> list[str]:
    """The one call that installs all."""
    return [sys.executable, "-m", "pip", "install", "-q", f"jax[{extra}]" if extra else "jax", "-r", str(REQUIREMENTS)]


def required(file: Path) -> list[str]:
    """The names of the packages in a requirements file, and in those that it includes."""
    names = []
    for line in file.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            names += required(file.parent / line.removeprefix("-r ").strip())
        elif line:
            names.append(re.split(r"[^\w.-]", line)[0])
    return names


def missing() -> list[str]:
    found = {re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower() for each in metadata.distributions()}
    return [name for name in required(REQUIREMENTS) if re.sub(r"[-_.]+", "-", name).lower() not in found]


def outdated(modules: dict) -> list[str]:
    """The packages that this session has imported in another version than the one that is installed now."""
    loaded = {name: getattr(modules.get(name), "__version__", None) for name in ("numpy", "jax", "jaxlib")}
    importlib.invalidate_caches()
    return [name for name, version in loaded.items() if version and version != metadata.version(name)]


def main() -> None:
    os.chdir(ROOT)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if "google.colab" in sys.modules:
        subprocess.run(pip(accelerator()), check=True)
        # In a process of its own: this one may still simulate devices.
        subprocess.run([sys.executable, "-c", "import jax; print(jax.__version__, jax.devices())"], check=True)
        if old := outdated(sys.modules):
            print(f"Restart the session (menu Runtime), and run this cell again: it had imported {', '.join(old)}.")
    if names := missing():
        raise Missing(f"{', '.join(names)} not installed: pip install -r {REQUIREMENTS.name}, then restart the session")


if __name__ == "__main__":
    main()
