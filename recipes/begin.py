"""The beginning of a run that has no checkpoint yet: from weights that are drawn, or from another run's parameters."""

from pathlib import Path
from typing import Any

import numpy as np

from recipes.build import Parts
from runtime import agree, steps
from runtime.console import Console
from runtime.workdir import Workdir


def origin(config: Any, workdir: Workdir) -> Path | None:
    """The workdir whose parameters this run begins with, if it begins; None: weights are drawn.

    Raises UsageError where there are none: before anything is read or compiled.
    """
    if not config.init.workdir:
        return None
    path = Path(config.init.workdir)
    if not workdir.resuming:
        agree.decided("run to start from", lambda: steps.to_start_from(path / "checkpoints"))
    return path


def first_state(parts: Parts, seed: int, origin: Path | None, init: Any, workdir: Workdir, console: Console) -> tuple:
    """(the state, what summary.json says of where its parameters come from). init: of assemble.compile_init.

    The strategy makes everything else from the parameters: copies of the replicas, and an optimizer that begins anew.
    """
    if origin is None:
        console.say(f"starting {workdir.path}")
        return init(np.uint32(seed)), {}
    from runtime.checkpoint import load_params  # slow to import

    console.doing(f"reading the parameters of {origin}")
    given = load_params(origin / "checkpoints", parts.state.params, console.warn)
    console.say(f"starting {workdir.path} from the parameters of {origin}, step {given.step}")
    facts = {"workdir": str(origin), "step": given.step, "params_digest": given.digest}
    return init(given.params), {"init": facts}
