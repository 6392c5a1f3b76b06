"""One version of the weights, published as a transaction. The trainer half: jax, no torch."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from bridge.channels import Channel, Ticket
from bridge.export import Exporter
from bridge.wire import HostTensor, Manifest, pack
from jaxrl.types import PublishReport, RunError

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]
Score = Callable[[Any, Sequence[int]], np.ndarray]  # (params, tokens) -> log-probs, float32 [t]


class Engines(Protocol):
    """What a publish needs of the engines; `bridge.fleet.Fleet` is the real one.

    The outcome of each engine is a value: what it answered, or the exception that says what went
    wrong on it.
    """

    def stage(
        self, ticket: Ticket, expected: Expected | None = None
    ) -> Mapping[str, Exception | None]: ...
    def commit(self, version: int) -> Mapping[str, dict[str, Any] | Exception]: ...
    def score(self, tokens: Sequence[int]) -> Mapping[str, np.ndarray | Exception]: ...
    def admit(self, names: Sequence[str], version: int) -> None: ...


class PublishError(RunError):
    """No engine serves the new version. Says what went wrong on each."""


class Publisher:
    """Export, announce, stage everywhere, load everywhere, prove, admit.

    An engine is admitted to serve version v only after it has acknowledged v with the digest of
    what it loaded, and its log-probs on the probe prompt are the trainer's. One that fails at any
    point is left out, and named; if none is left the publish has failed.
    """

    def __init__(
        self,
        export: Exporter,
        channel: Channel,
        engines: Engines,
        score: Score,
        *,
        probe: Sequence[int],
        probe_tolerance: float,
        bucket_bytes: int,
        warn: Callable[[str], None],
    ) -> None:
        self._export, self._channel, self._engines, self._score = export, channel, engines, score
        self._probe, self._tolerance = list(probe), probe_tolerance
        self._bucket_bytes, self._warn = bucket_bytes, warn

    def publish(self, params: Any, version: int) -> PublishReport:
        """Returns when every engine that will serve `version` has proved that it holds it.

        Raises:
          PublishError: no engine could be admitted.
          bridge.channels.ChannelError: the channel could not carry the version.
        """
        start = time.perf_counter()
        failed: dict[str, str] = {}
        manifest, loaded = self._carry(self._export(params), version, failed)
        difference = self._prove(params, loaded - failed.keys(), failed)
        proven = self._survivors(loaded, version, failed)
        self._engines.admit(proven, version)
        seconds = time.perf_counter() - start
        return PublishReport(
            version, manifest.digest, manifest.nbytes, seconds, len(proven), difference
        )

    def publish_frozen(
        self, tensors: Iterable[HostTensor], expected: Expected, version: int
    ) -> None:
        """Carries the weights that never change, ahead of the first version of those that do.

        Nothing is admitted yet: an engine proves itself with the two together.

        Raises:
          PublishError, bridge.channels.ChannelError: as `publish`.
        """
        failed: dict[str, str] = {}
        _, loaded = self._carry(tensors, version, failed, expected)
        self._survivors(loaded, version, failed)

    def _carry(
        self,
        tensors: Iterable[HostTensor],
        version: int,
        failed: dict[str, str],
        expected: Expected | None = None,
    ) -> tuple[Manifest, set[str]]:
        """Stages and commits; returns the engines that say they loaded just what was sent."""
        manifest, buckets = pack(version, tensors, self._bucket_bytes)
        ticket = self._channel.publish(manifest, buckets)
        _answers(self._engines.stage(ticket, expected), failed)
        acknowledged = _answers(self._engines.commit(version), failed)
        for name, said in acknowledged.items():
            if (said["version"], said["digest"]) != (version, manifest.digest):
                failed[name] = (
                    f"acknowledged version {said['version']} with digest {said['digest']}, "
                    f"published was {version} with {manifest.digest}"
                )
        return manifest, acknowledged.keys() - failed.keys()

    def _survivors(self, names: set[str], version: int, failed: dict[str, str]) -> list[str]:
        proven = sorted(names - failed.keys())
        report = "; ".join(f"{name}: {why}" for name, why in sorted(failed.items()))
        if not proven:
            raise PublishError(f"weight version {version}: no engine serves it ({report})")
        if failed:
            self._warn(f"weight version {version}: left out {report}")
        return proven

    def _prove(self, params: Any, names: set[str], failed: dict[str, str]) -> float:
        """Largest difference of log-probs on the probe among the engines that pass, nats."""
        ours = self._score(params, self._probe)
        worst = 0.0
        theirs = _answers(self._engines.score(self._probe), failed)
        for name in names - failed.keys():
            if name not in theirs or theirs[name].shape != ours.shape:
                failed[name] = "it gave no log-prob for each token of the probe prompt"
                continue
            difference = float(np.max(np.abs(theirs[name] - ours)))
            if difference <= self._tolerance:  # False for NaN
                worst = max(worst, difference)
            else:
                failed[name] = (
                    f"its log-probs on the probe prompt differ from the trainer's by "
                    f"{difference:.2g} nats, more than publish.probe_tolerance = {self._tolerance}"
                )
        return worst


def _answers(outcomes: Mapping[str, Any], failed: dict[str, str]) -> dict[str, Any]:
    """What the engines answered; those that failed are added to `failed` instead."""
    answers = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, Exception):
            failed.setdefault(name, str(outcome))  # the first thing that went wrong is the cause
        else:
            answers[name] = outcome
    return answers
