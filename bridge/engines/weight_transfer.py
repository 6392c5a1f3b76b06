"""The receiving end of the bridge, inside vLLM's worker processes.

vLLM's own engines touch the model as soon as an update starts, and one that fails half way leaves a
model that can neither serve nor be updated. Here an update is staged: everything that can be wrong
with it is found while the model still serves its old weights, and `finish_weight_update` only
loads. So a refused update costs nothing.

An update has at most three steps, each in vLLM's protocol: start (no-op), update (`receive_weights`
checks the staged version, or refuses it), finish (load). Fetching and hashing happen in a thread,
begun by `BridgeWorker.bridge_prefetch`, so that decoding goes on meanwhile.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from bridge import channels, torch_view, wire

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]: what a version must hold


class UpdateRefused(Exception):
    """A version that must not be loaded. The model is untouched."""


@dataclasses.dataclass
class BridgeInitInfo(WeightTransferInitInfo):
    """Nothing is negotiated: a ticket says all that a worker needs."""


@dataclasses.dataclass
class BridgeUpdateInfo(WeightTransferUpdateInfo):
    """Plain JSON types, because vLLM carries this between its processes."""

    ticket: str  # channels.Ticket as JSON
    deadline_s: float
    expected: list  # see Expected


@dataclasses.dataclass(frozen=True)
class Staged:
    """A version that arrived: its tensors, and what was measured on those very tensors."""

    version: int
    tensors: list[tuple[str, torch.Tensor]]
    digest: str
    seconds: float


class Prefetch:
    """Fetches and hashes one version in a thread of its own.

    Twice the deadline bounds it as a whole: the bytes must arrive within one, and what cannot be
    interrupted, such as joining a cluster that is gone, gets another.
    """

    def __init__(self, ticket: channels.Ticket, deadline_s: float):
        self.ticket = ticket
        self._deadline_s = deadline_s
        self._end = time.monotonic() + 2 * deadline_s
        self._staged: Staged | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="bridge-prefetch", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether `result` would return, or raise, without waiting."""
        return not self._thread.is_alive() or time.monotonic() >= self._end

    def result(self) -> Staged:
        """Waits, and returns the version or raises what kept it from arriving."""
        self._thread.join(max(0.0, self._end - time.monotonic()))
        if self._error is not None:
            raise self._error
        if self._staged is None:
            raise UpdateRefused(
                f"weight version {self.ticket.version} was not fetched and hashed within "
                f"{2 * self._deadline_s:g} s"
            )
        return self._staged

    def _run(self) -> None:
        try:
            self._staged = _stage(self.ticket, self._deadline_s)
        except Exception as error:  # every failure is raised again by `result`, in vLLM's thread
            self._error = error


class BridgeWeightTransferEngine(WeightTransferEngine[BridgeInitInfo, BridgeUpdateInfo]):
    """Stages a version beside the model, then loads it through the model's own loader."""

    init_info_cls = BridgeInitInfo
    update_info_cls = BridgeUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.updating = False  # whether vLLM believes that an update is under way
        self.loaded: dict[str, Any] = {}  # what the last update loaded: version, digest, tensors
        self._prefetch: Prefetch | None = None
        self._staged: Staged | None = None

    def init_transfer_engine(self, init_info: BridgeInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.drop()
        self.updating = True

    def prefetch(self, ticket_json: str, deadline_s: float) -> None:
        """Begins to fetch; `receive_weights` with the same ticket takes the result."""
        self._prefetch = Prefetch(channels.Ticket.from_json(ticket_json), deadline_s)

    def prefetched(self) -> bool:
        return self._prefetch is None or self._prefetch.done()

    def receive_weights(self, update_info: BridgeUpdateInfo) -> None:
        """Stages a version that is proven complete.

        Raises:
          UpdateRefused, WireError, ChannelError: with every reason; the old version stays.
        """
        try:
            ticket = channels.Ticket.from_json(update_info.ticket)
            prefetch, self._prefetch = self._prefetch, None
            if prefetch is None or prefetch.ticket != ticket:
                prefetch = Prefetch(ticket, update_info.deadline_s)
            staged = prefetch.result()
            problems = differences(update_info.expected, staged.tensors)
            if problems:
                raise UpdateRefused(f"weight version {ticket.version}: " + "; ".join(problems))
            self._staged = staged
        except BaseException:
            self.updating = False  # vLLM closes the update on any error that leaves this method
            raise

    def finish_weight_update(self) -> None:
        """Loads what is staged; with nothing staged it only closes the update.

        An error from here leaves the model in pieces: the engine must not serve again.
        """
        staged, self._staged = self._staged, None
        self.updating = False
        if staged is None:
            return
        started = time.perf_counter()
        model: Any = self.model  # vLLM's models load themselves; torch's type does not say so
        wanted = _parameters(model)
        initialize_layerwise_reload(model)
        wanted &= _parameters(model)  # not a tied head, nor what only exists once processed
        loaded = model.load_weights(iter(staged.tensors))
        # Some models do not say what they loaded.
        missing = sorted(wanted - loaded) if loaded is not None else []
        if missing:
            raise UpdateRefused(
                f"weight version {staged.version}: the model has {len(missing)} parameters that "
                f"nothing was loaded into: {_list(missing)}"
            )
        finalize_layerwise_reload(model, self.model_config)
        _repack_tied_embeddings(model)
        self.loaded = {
            "version": staged.version,
            "digest": staged.digest,
            "tensors": len(staged.tensors),
            "stage_s": staged.seconds,
            "load_s": time.perf_counter() - started,
        }

    def drop(self) -> None:
        """Forgets what is staged, and lets its memory go."""
        self._staged = self._prefetch = None

    def shutdown(self) -> None:
        self.drop()


class BridgeWorker:
    """Methods that vLLM adds to its worker class; the front end calls them by name."""

    weight_transfer_engine: BridgeWeightTransferEngine

    def bridge_prefetch(self, ticket_json: str, deadline_s: float) -> None:
        self.weight_transfer_engine.prefetch(ticket_json, deadline_s)

    def bridge_prefetched(self) -> bool:
        return self.weight_transfer_engine.prefetched()

    def bridge_loaded(self) -> dict[str, Any]:
        """What the last update loaded; see BridgeWeightTransferEngine.loaded."""
        return self.weight_transfer_engine.loaded

    def bridge_abort(self) -> None:
        """Closes an update that was not finished. The model keeps its weights."""
        self.weight_transfer_engine.drop()
        if self.weight_transfer_engine.updating:
            self.finish_weight_update()  # type: ignore[attr-defined]  # vLLM's worker


def differences(expected: Expected, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
    """Every way in which `tensors` are not exactly the expected ones; empty when they are."""
    want = {name: (dtype, tuple(shape)) for name, dtype, shape in expected}
    have = {name: (_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors}
    missing = sorted(want.keys() - have.keys())
    extra = sorted(have.keys() - want.keys())
    changed = [name for name in sorted(want.keys() & have.keys()) if want[name] != have[name]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_list(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors are not the model's: {_list(extra)}")
    if changed:
        found = [f"{name} is {have[name]}, expected {want[name]}" for name in changed]
        problems.append(f"{len(changed)} tensors have another dtype or shape: {_list(found)}")
    return problems


def _stage(ticket: channels.Ticket, deadline_s: float) -> Staged:
    started = time.perf_counter()
    manifest, buckets = channels.fetch(ticket, deadline_s)
    tensors = list(torch_view.tensors(manifest, buckets))
    # Hashed as the tensors that the loader gets, not as buckets: this also proves the views.
    arrived = [
        dataclasses.replace(
            entry,
            dtype=_dtype(tensor),
            shape=tuple(tensor.shape),
            sha256=wire.sha256(torch_view.tensor_bytes(tensor)),
        )
        for entry, (_, tensor) in zip(manifest.tensors, tensors, strict=True)
    ]
    torn = [
        entry.name
        for entry, promised in zip(arrived, manifest.tensors, strict=True)
        if entry.sha256 != promised.sha256
    ]
    if torn:
        raise UpdateRefused(
            f"weight version {ticket.version}: {len(torn)} tensors did not arrive as they were "
            f"sent (SHA-256 differs): {_list(torn)}"
        )
    digest = wire.version_digest(arrived)
    return Staged(ticket.version, tensors, digest, time.perf_counter() - started)


def _repack_tied_embeddings(model: torch.nn.Module) -> None:
    """Brings a tied output head up to date on CPU.

    There the head keeps its own packed copy of the embedding (`cpu_linear`), and vLLM 0.32 renews
    only the embedding's when it reloads: without this the logits use the old head, silently.
    Linear layers free their weight once it is packed, which tells the two apart.
    """
    if not current_platform.is_cpu():
        return
    module: Any
    for module in model.modules():
        packed, weight = getattr(module, "cpu_linear", None), getattr(module, "weight", None)
        if packed is not None and weight is not None and weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


def _parameters(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
