"""`--link`: what a run's exchange takes on a slow link, and what would leave more of the time for computing."""

from dataclasses import replace
from typing import Any, NamedTuple

from parallel.cost.bytes import exchange_bytes
from parallel.cost.link import FRAME, Link
from parallel.cost.utilisation import Method, Workload, utilisation
from parallel.exchange import exchange as exchanges
from parallel.exchange import units
from parallel.exchange.codecs import CODECS
from parallel.exchange.net import Net
from parallel.layout.axes import SLOW
from recipes.build import Parts, num_parameters
from recipes.task import num_layers
from runtime.config import UsageError, bad_input
from runtime.console import human_bytes, human_seconds

ENOUGH = 0.9  # of the time
HOPS = 2  # of an exchange, whose second hop waits for the first
# What is tried of each strategy, and what it can hide behind.
TRIED = {
    "sync": Method(0),
    "stale": Method(0, overlap=1),
    "diloco": Method(0, interval=30),
    "streaming": Method(0, interval=30, fragments=2, overlap=5),
    "eager": Method(0, interval=30, overlap=30),
}


class Kept(NamedTuple):
    """With this strategy and codec, the one of most bytes that does, so much of the time is spent computing."""

    strategy: str
    codec: str
    share: float


def rows(link: Link, parts: Parts, sent: float, step_seconds: float | None) -> list[tuple[str, str]]:
    """Rows of a table. sent: bytes that a device sends over the slow axis per step. step_seconds: of computing; None:
    not known."""
    layers = num_layers(parts.param_shapes, parts.task.axes)
    through = sent * senders(parts.mesh)
    wire = link.seconds(through, HOPS / parts.strategy.interval if sent else 0)
    found = [("on the wire", f"{human_seconds(wire)} a step, {human_bytes(through)}")]
    if step_seconds is None:
        return [*found, ("", "the share of the time that is computing follows with --step_seconds")]
    bare = step_seconds / (step_seconds + wire)
    own = Method(
        bytes_per_parameter=through * parts.strategy.interval / num_parameters(parts),
        interval=parts.strategy.interval,
        fragments=parts.strategy.fragments,
        overlap=parts.strategy.hidden_steps,
    )
    workload = Workload(num_parameters(parts), max(layers, own.fragments), step_seconds)
    best = max(bare, share(link, workload, own))
    found.append(("computing", f"{human_seconds(step_seconds)} a step: {bare:.0%} of the time, if nothing is hidden"))
    if best - bare > 0.005:
        found.append(("", f"{best:.0%} if all is hidden that this strategy can hide"))
    kept = catalogue(link, parts, replace(workload, layers=max(layers, TRIED["streaming"].fragments)))
    said = [f"{k.strategy} {k.codec} {k.share:.0%}" for k in kept]
    found.append((f"{ENOUGH:.0%} would keep", "; ".join(said) or "no strategy and codec there is"))
    return [*found, *([("", "in rounds of H = 30, streaming with τ = 5")] if said else [])]


def read(text: str | None, step_seconds: float | None, dry_run: bool, replicas: int) -> Link | None:
    """Of the options --link and --step_seconds. Raises UsageError."""
    if step_seconds is not None and not (text and dry_run):
        raise UsageError("--step_seconds is read with --link and --dry_run: a run measures its own")
    if text and replicas == 1:
        raise UsageError(
            f"--link={text}: one replica sends nothing over a slow link. Set mesh.replica or sync.replicas"
        )
    if not text:
        return None
    with bad_input():
        return Link.parse(text)


def senders(mesh: Any) -> int:
    """Devices that share the link out of one host or slice. On simulated devices a replica is a host."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu" or mesh.shape[SLOW] == 1:
        return mesh.size // mesh.shape[SLOW]
    together = [d for d in mesh.devices.flat if _place(d) == _place(device)]
    return min(len(together), mesh.size // mesh.shape[SLOW])


def _place(device: Any) -> Any:
    return getattr(device, "slice_index", None) if device.platform == "tpu" else device.process_index


def share(link: Link, workload: Workload, method: Method) -> float:
    """Of the time spent computing, by the simulator (parallel/cost/utilisation.py)."""
    return float(utilisation(workload, method, link.bits_per_second / FRAME / 1e9, HOPS * link.latency))


def catalogue(link: Link, parts: Parts, workload: Workload) -> list[Kept]:
    """Of each strategy the codec that sends most and still leaves enough."""
    leaves, R = units.leaves(parts.param_shapes, parts.task.axes), parts.replicas
    sizes = {}
    for name, kind in CODECS.items():
        exchange = exchanges.build(kind(), "auto", parts.mesh, R, leaves)
        apart = replace(exchange, net=Net(exchange.net.algorithm, R, R))  # a device for each replica
        sizes[name] = senders(parts.mesh) * sum(exchange_bytes(apart).values())
    kept = []
    for strategy, method in TRIED.items():
        for codec in sorted(sizes, key=sizes.__getitem__, reverse=True):
            own = replace(method, bytes_per_parameter=sizes[codec] / workload.parameters)
            if (part := share(link, workload, own)) >= ENOUGH:
                kept.append(Kept(strategy, codec, part))
                break
    return kept
