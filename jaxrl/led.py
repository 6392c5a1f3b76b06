"""A run on several hosts: what the first process has the others do, and how they do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxrl.config import Config, SftConfig
from jaxrl.interrupt import Interrupt
from jaxrl.learner import LedExporter, abstract, build_learner, open_model
from jaxrl.types import Group, Prompt, Request, Sampling, TrainBatch

if TYPE_CHECKING:  # jax starts only when the configuration is known to be good
    from bridge.channels import Shipment
    from bridge.encoding import Shadow
    from bridge.export import Exporter
    from bridge.wire import Base, Outgoing, TensorEntry
    from jaxrl.hosts import Hosts
    from jaxrl.models.decoder import Params
    from jaxrl.sampler import InProcessEngine


def follow(c: Config | SftConfig, hosts: Hosts) -> int:
    """The part of every process but the first: what that one announces, with the shards here."""
    from bridge.encoding import Shadow
    from bridge.wire import Base
    from jaxrl import checkpoint
    from jaxrl.rundir import check_shared
    from jaxrl.sampler import InProcessEngine

    model_dir, decoder = open_model(c)
    learner = build_learner(c, model_dir, decoder)
    engine = InProcessEngine(learner.policy, learner.frozen)
    state, checkpoints, shadow = learner.state, c.run_dir / "checkpoints", Shadow()
    with Interrupt(hosts.interrupt).listening():
        for order in hosts.orders():
            match order.name, order.args:
                case "run_dir", [holder]:
                    check_shared(c.run_dir, holder)
                case "update", _:
                    n, arrays = len(TrainBatch._fields), order.arrays
                    parts = [arrays[i : i + n] for i in range(0, len(arrays), n)]
                    state, _ = learner.update(state, [TrainBatch(*part) for part in parts])
                case "publish", [version]:
                    engine.publish(state.params, version)
                case "begin", [prompts, options, seeds]:
                    texts = [Prompt(i, "", tuple(x), {}) for i, x in enumerate(prompts)]
                    engine.begin(texts, sampling_from(options), seeds)
                case "export", _:
                    learner.export(state.params)
                case "export_frozen", _:
                    learner.export_frozen(learner.frozen)
                case "export_merged", _:
                    learner.export_merged(state.params)
                case "ship", [which, invitation, base, keep]:
                    shadow.begin(None if base is None else Base(*base), keep)
                    exporter, params = {
                        "export": (learner.export, state.params),
                        "export_frozen": (learner.export_frozen, learner.frozen),
                    }[which]
                    ship_share(hosts, exporter, params, invitation, shadow, keep)
                case "settle", [version]:
                    shadow.settle(None if version is None else Base(*version))
                case "score", [tokens]:
                    learner.score(state.params, tokens)
                case "nll", _:
                    learner.nll(state.params, TrainBatch(*order.arrays))
                case "save", [step]:
                    checkpoint.save_shards(checkpoints, step, state)
                case "restore", [name]:
                    state = checkpoint.restore(checkpoints / name, abstract(state)).arrays
                case "end", [code]:
                    return code
    raise AssertionError("the orders end with `end`")


@dataclass
class LedCarrier:
    """Every process ships its share of a version; the first has the shipment."""

    hosts: Hosts
    deadline_s: float  # for the others to be done after this one is

    def __post_init__(self) -> None:
        from bridge.encoding import Shadow

        self.shadow, self.device_bytes = Shadow(), 0

    def ship(
        self,
        export: LedExporter,
        params: Params,
        shipment: Shipment,
        base: Base | None,
        keep: bool,
    ) -> list[TensorEntry]:
        from bridge.channels import ChannelError
        from bridge.publisher import ship
        from bridge.wire import TensorEntry

        about = None if base is None else dataclasses.astuple(base)
        self.hosts.announce("ship", export.order, shipment.invitation(), about, keep)
        self.shadow.begin(base, keep)
        own = export.exporter
        problems: list[str] = []
        try:
            shipped = ship(share(own, params, self.shadow, keep), shipment, self.shadow)
        except ChannelError as error:
            problems, shipped = [str(error)], []
        self.device_bytes = own.device_bytes
        for entries, problem, device_bytes in self.hosts.answers(self.deadline_s):
            self.device_bytes += device_bytes
            shipped += [TensorEntry(**entry) for entry in entries]
            problems += [problem] if problem else []
        if problems:
            raise ChannelError(problems[0])
        return shipped

    def settle(self, version: Base | None) -> None:
        self.hosts.announce("settle", None if version is None else dataclasses.astuple(version))
        self.shadow.settle(version)


def ship_share(
    hosts: Hosts,
    exporter: Exporter,
    params: Params,
    invitation: str,
    shadow: Shadow,
    keep: bool,
) -> None:
    """A follower's part of `LedCarrier.ship`."""
    from bridge.channels import ChannelError, join
    from bridge.publisher import ship

    groups = share(exporter, params, shadow, keep)
    try:
        shipment = join(invitation)
    except ChannelError as error:
        for _ in groups:  # the mesh waits for every process
            pass
        return hosts.answer([], str(error), exporter.device_bytes)
    try:
        shipped = ship(groups, shipment, shadow)
    except ChannelError as error:
        return hosts.answer([], str(error), exporter.device_bytes)
    entries = [dataclasses.asdict(entry) for entry in shipped]
    return hosts.answer(entries, None, exporter.device_bytes)


def share(exporter: Exporter, params: Params, shadow: Shadow, keep: bool) -> Iterator[Outgoing]:
    """The groups of a version, of which this process gets those that it ships."""
    import jax

    owners = exporter.owners(jax.process_count())
    if keep:
        return exporter.groups_since(shadow, params, owners)
    return exporter.groups(params, owners)


@dataclass
class LedEngine:
    """The in-process engine of the first process, which the others sample with."""

    hosts: Hosts
    engine: InProcessEngine

    def submit(self, requests: Sequence[Request], urgent: bool = False) -> list[Future[Group]]:
        tokens, seeds = [r.prompt.tokens for r in requests], [r.seed for r in requests]
        self.hosts.announce("begin", tokens, dataclasses.asdict(requests[0].sampling), seeds)
        return self.engine.submit(requests, urgent)

    def status(self) -> dict[str, float]:
        return self.engine.status()

    def close(self) -> None:
        self.engine.close()


def sampling_from(options: Mapping[str, Any]) -> Sampling:
    """The Sampling whose fields went through JSON, which knows lists alone."""
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    return Sampling(**plain)
