"""Every test sees 8 simulated CPU devices and a private cache of compiled programs."""

import os
import tempfile
from pathlib import Path

# Tests must not read or fill the user's caches; subprocesses inherit this.
CACHE = Path(tempfile.gettempdir()) / f"slackline-tests-{os.getuid()}"
CACHE.mkdir(mode=0o700, exist_ok=True)
os.environ["SLACKLINE_CACHE"] = str(CACHE)

os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its compiler runs in several pytest workers at once

import jax  # noqa: E402

from parallel import mesh  # noqa: E402

mesh.simulate(8)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
