"""What pip asks to build this project: it says how it is used instead. It is a checkout that one reads and changes: an
installed copy would be without its configs, tests and pages, and its rooms have names like `data` and `model`."""

from typing import Any, NoReturn

MESSAGE = """Slackline is not installed: it is used from a checkout, which one reads and changes.

    git clone … && cd slackline
    pip install -r requirements.txt
    python train.py --config=configs/quickstart.py
"""


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise SystemExit(MESSAGE)


get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = refuse
build_wheel = build_editable = build_sdist = refuse
