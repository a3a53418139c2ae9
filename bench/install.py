"""What installing requirements.txt into an empty virtual environment takes: packages, megabytes, seconds.

python bench/install.py
python bench/install.py --python=python3.13
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402
from runtime import usage  # noqa: E402


def size_of(folder: Path) -> int:
    """Bytes on the disk, links not followed."""
    return sum(os.lstat(Path(root) / name).st_blocks * 512 for root, _, names in os.walk(folder) for name in names)


def main() -> None:
    parser = usage.parser(__doc__, "python bench/install.py")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to install for")
    args = parser.parse_args()
    report = common.Report("install")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([args.python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        empty = size_of(Path(folder))
        seconds, done = common.clock(
            lambda: subprocess.run(
                [*pip, "install", "--quiet", "-r", "requirements.txt"], cwd=common.ROOT, capture_output=True, text=True
            )
        )
        if done.returncode:
            raise SystemExit(f"pip could not install requirements.txt:\n{done.stdout}{done.stderr}")
        listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, text=True, check=True)
        packages = {
            p["name"]: p["version"] for p in json.loads(listed.stdout) if p["name"] not in ("pip", "setuptools")
        }
        site = next((Path(folder) / "lib").glob("python*/site-packages"))
        sizes = {p.name: round(size_of(p) / 1e6, 1) for p in site.iterdir() if p.is_dir()}
        total = size_of(Path(folder)) - empty
    report.row("packages", len(packages), at_most=70)
    report.row("size", total / 1e9, "GB", at_most=1)
    report.row("seconds", seconds, "s")
    report.details["packages"] = packages
    report.details["largest folders, MB"] = dict(sorted(sizes.items(), key=lambda row: -row[1])[:12])
    report.finish()


if __name__ == "__main__":
    main()
