"""The parameters of a run, whatever it has trained: all of them, or an adapter beside those of another run.

A run that trains an adapter leaves its base in `init.workdir`: a checkpoint holds the adapter and what its optimizer
remembers, as small as they are, and one base serves many adapters. Which base it was, its step and the digest of its
parameters, is a fact of every checkpoint, and another one is refused.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from model.lora import Lora
from parallel.layout import placement, rules
from recipes.build import Parts
from runtime import agree
from runtime import config as configuration
from runtime.config import UsageError

Say = Callable[[str], None]
STEP, DIGEST = "base.step", "base.params_digest"  # facts of a checkpoint


def read_base(
    parts: Parts, origin: Path, warn: Say, before: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(the weights beside the state, the facts of them). before: of the checkpoint that a run goes on from, whose base
    it must be; of another run nothing. Raises UsageError."""
    (abstract,) = parts.frozen
    full = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding), abstract)
    task: Any = parts.task
    given = _base(origin, task.model.axes, full, warn, before)
    to_dtype = jax.jit(task.model.frozen, out_shardings=jax.tree.map(lambda x: x.sharding, abstract), donate_argnums=0)
    return (to_dtype(given.params),), {STEP: given.step, DIGEST: given.digest}


def read(workdir: Path, axes: Any, abstract: Any, warn: Say, only: int | None = None) -> Any:
    """The newest intact parameters of a run, float32, in the shardings of `abstract`, as `load_params` gives them; of a
    run that trains an adapter those of its base, into which it is merged, and a digest of both. axes: logical, of the
    model's weights. only: the step that it must be. Raises UsageError."""
    from runtime.checkpoint import load_params  # slow to import

    about = agree.decided("what a run has trained", lambda: _about(workdir))
    if not about["lora"]["rank"]:
        return load_params(workdir / "checkpoints", abstract, warn, only=only)
    lora, given = read_adapter(workdir, axes, abstract, warn, only)
    base = _base(Path(about["origin"]), axes, abstract, warn, given.facts)
    merge = jax.jit(lora.merge, out_shardings=jax.tree.map(lambda x: x.sharding, abstract), donate_argnums=0)
    merged = merge(base.params, given.params, given.fixed)
    # Of both: a sum's last bits are those of a mesh, and who is refused for another base must be so on every mesh.
    digest = hashlib.sha256(f"{base.digest} {given.digest}".encode()).hexdigest()
    return given._replace(params=merged, digest=digest, fixed=None)


def read_adapter(workdir: Path, axes: Any, abstract: Any, warn: Say, only: int | None = None) -> tuple[Lora, Any]:
    """(which weights it is of, what `load_params` gives) of a run that trains one; the arguments of `read`."""
    from runtime.checkpoint import load_params  # slow to import

    about = agree.decided("what a run has trained", lambda: _about(workdir))
    lora = Lora.of(ConfigDict(about["lora"]), abstract, axes, about["tied"])
    key, mesh = jax.eval_shape(lambda: jax.random.key(0)), jax.tree.leaves(abstract)[0].sharding.mesh

    def placed(part: tuple[str, ...]) -> Any:
        shapes = jax.eval_shape(lambda key: lora.init(key, part), key)
        return placement.placed(mesh, shapes, rules.specs(lora.axes(part)))

    return lora, load_params(workdir / "checkpoints", placed(lora.trained), warn, placed(lora.fixed), only)


def _base(origin: Path, axes: Any, abstract: Any, warn: Say, before: Mapping[str, Any]) -> Any:
    """Raises UsageError for another one than these facts say."""
    given = read(origin, axes, abstract, warn, before.get(STEP))
    if given.digest != before.get(DIGEST, given.digest):
        raise UsageError(
            f"init.workdir={origin}: step {given.step} has the digest {given.digest[:12]}, and this adapter was "
            f"trained beside parameters with {before[DIGEST][:12]}: it means nothing beside others. Put the base "
            "back, or name the folder to which it was moved"
        )
    return given


def _about(workdir: Path) -> dict[str, Any]:
    """Of the run in a workdir: its config's group `lora`, its base, and whether its embedding is its head."""
    try:
        config = configuration.read_json(workdir)
    except OSError as error:
        raise UsageError(f"init.workdir={workdir}: there is no config.json of a run in this folder") from error
    return {"lora": config.lora.to_dict(), "origin": config.init.workdir, "tied": config.model.tie_embeddings}
