"""Every test sees 8 simulated CPU devices and a private cache of compiled programs.

pytest             the default run
pytest --sample    of every slow test function one case, always the same: what CI can afford
pytest -m ""       all
"""

import functools
import gc
import hashlib
import itertools
import os
import signal
import sys
import tempfile
from pathlib import Path

# Tests must not read or fill the user's caches; subprocesses inherit this.
CACHE = Path(tempfile.gettempdir()) / f"slackline-tests-{os.getuid()}"
CACHE.mkdir(mode=0o700, exist_ok=True)
os.environ["SLACKLINE_CACHE"] = str(CACHE)

os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its compiler runs in several pytest workers at once

# A shell's background job ignores Ctrl-C, and would hand that on to the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

from parallel.layout import mesh  # noqa: E402

mesh.simulate(8)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

pytest_plugins = ["counting"]

# A file's tests stay with one worker. These take longest and come first, else one worker ends with one of them alone.
FIRST = ("test_strategies", "test_parity", "test_processes", "test_exchange", "test_resume", "test_train")


# A process may have so many memory mappings (Linux: vm.max_map_count is 65,530), and a compiled program takes up to
# hundreds of them: a worker that keeps all that tests share would crash.
MOST_MAPPINGS = 40_000
counter = itertools.count()


def pytest_runtest_logfinish() -> None:
    """Gives up what tests share when it has become too much; reading the list takes time, so not after each test."""
    maps = Path("/proc/self/maps")
    if next(counter) % 16 or not maps.exists() or maps.read_bytes().count(b"\n") < MOST_MAPPINGS:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("test_") or name == "helpers":
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    jax.clear_caches()
    gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", action="store_true", help="one case of every slow test function, none marked prove")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.sample:
        config.option.markexpr = "slow and not prove"


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    if not config.option.sample:
        return
    chosen: dict[str, pytest.Item] = {}  # by function: the case whose name has the smallest hash
    digest = lambda item: hashlib.sha256(item.nodeid.encode()).digest()
    for item in sorted(items, key=digest, reverse=True):
        chosen[item.nodeid.partition("[")[0]] = item
    kept = {id(item) for item in chosen.values()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
