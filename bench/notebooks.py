"""Seconds of each notebook, from top to bottom, by the Python that runs this.

python bench/notebooks.py
python bench/notebooks.py --only=02 --html=out      also writes what a reader sees

Compiled programs are kept in a folder of their own, empty at the start: as on a new machine. "of the processors" is
what the kernel used of them, which says more where others use the machine, too.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402
from runtime import usage  # noqa: E402

NOTEBOOKS = sorted((common.ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path, allow_errors: bool = False) -> Any:
    """The notebook with the outputs of its cells, run in its folder by a kernel of this Python.

    Raises nbclient's CellExecutionError, with the traceback, where a cell fails, unless that is an output, too.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    options = {"kernel_name": "python3", "timeout": 900, "coalesce_streams": True, "resources": folder}
    return NotebookClient(notebook, allow_errors=allow_errors, **options).execute()


def write_html(notebook: Any, path: Path) -> None:
    from nbconvert import HTMLExporter

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HTMLExporter().from_notebook_node(notebook)[0])


def main() -> None:
    parser = usage.parser(__doc__, "python bench/notebooks.py")
    parser.add_argument("--only", default="", help="notebooks whose name contains this; writes no result")
    parser.add_argument("--html", type=Path, help="a folder for what a reader sees")
    args = parser.parse_args()
    report, total, used = common.Report("notebooks"), 0.0, 0.0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SLACKLINE_CACHE"] = cache
        for path in NOTEBOOKS:
            if args.only in path.name:
                before = sum(os.times()[2:4])
                seconds, notebook = common.clock(execute, path)
                report.row(path.stem, seconds, "s")
                report.row(f"{path.stem}, of the processors", sum(os.times()[2:4]) - before, "s")
                total, used = total + seconds, used + sum(os.times()[2:4]) - before
                if args.html:
                    write_html(notebook, args.html / f"{path.stem}.html")
    if not args.only:
        report.row("together, of the processors", used, "s")
        report.row("together", total, "s", at_most=300)
        report.finish()


if __name__ == "__main__":
    main()
