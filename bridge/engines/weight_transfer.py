"""The receiving end of the bridge, inside vLLM's worker processes.

vLLM's own engines touch the model as soon as an update starts, and one that fails half way leaves a
model that can neither serve nor be updated. Here an update is staged: everything that can be wrong
with it is found while the model still serves its old weights, and `finish_weight_update` only
loads. So a refused update costs nothing.

An update has at most three steps, each in vLLM's protocol: start (no-op), update (`receive_weights`
checks the staged version, or refuses it), finish (load). Fetching and hashing happen in a thread,
begun by `BridgeWorker.bridge_prefetch`, so that decoding goes on meanwhile.

A version is either the model's weights or a LoRA adapter's. vLLM unloads every adapter when it
finishes an update, so an adapter is loaded after that, by `BridgeWorker.bridge_load_adapter`.
"""

import dataclasses
import itertools
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _layerwise_process,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

from bridge import channels, torch_view, wire
from bridge.engines.examine import Examination, renames
from bridge.receive import Received, Receiver
from bridge.transaction import begun

ADAPTER_ID = 1  # vLLM's number for the one adapter; every request names it
ADAPTER_PREFIX = "base_model.model."  # of every tensor's name in PEFT's files, and of no model's

_LORA_NAME = re.compile(rf"{re.escape(ADAPTER_PREFIX)}.+\.lora_[AB]\.weight")

# For which decoding waits, at most, until a version that is not examined after all is let go.
_REREAD_S = 0.5

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]: what a version must hold


class UpdateRefused(Exception):
    """A version that must not be loaded. The model is untouched."""


class NotHeld(Exception):
    """What this process holds is not the version that was loaded last."""


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
    nbytes: int  # that came for it
    seconds: float

    @property
    def is_adapter(self) -> bool:
        return any(name.startswith(ADAPTER_PREFIX) for name, _ in self.tensors)

    def loaded(self, load_s: float) -> dict[str, Any]:
        return {
            "version": self.version,
            "digest": self.digest,
            "tensors": len(self.tensors),
            "bytes": self.nbytes,
            "stage_s": self.seconds,
            "load_s": load_s,
        }


class Prefetch:
    """Fetches and hashes one version in a thread of its own.

    Twice the deadline bounds it as a whole: the bytes must arrive within one, and what cannot be
    interrupted, such as joining a cluster that is gone, gets another.
    """

    def __init__(self, receiver: Receiver, ticket: channels.Ticket, deadline_s: float):
        self.ticket, self.receiver = ticket, receiver
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
            self._staged = stage(self.receiver, self.ticket, self._deadline_s)
        except Exception as error:  # every failure is raised again by `result`, in vLLM's thread
            self._error = error


class BridgeWeightTransferEngine(WeightTransferEngine[BridgeInitInfo, BridgeUpdateInfo]):
    """Stages a version beside the model, then loads it through the model's own loader."""

    init_info_cls = BridgeInitInfo
    update_info_cls = BridgeUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loaded: dict[str, Any] = {}  # what the last update loaded: version, digest, tensors
        self._prefetch: Prefetch | None = None
        self._staged: Staged | None = None
        self._kept = Receiver(prove)
        self._direct: set[torch.nn.Module] = set()  # see _load
        self._examination: Examination | None = None
        self._reread: tuple[Receiver, Future[Received]] | None = None  # to be examined
        self._config: dict[str, Any] | None = None

    def init_transfer_engine(self, init_info: BridgeInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.drop()

    def prefetch(self, ticket_json: str, deadline_s: float) -> None:
        """Begins to fetch; `receive_weights` with the same ticket takes the result."""
        self._prefetch = self._begun(channels.Ticket.from_json(ticket_json), deadline_s)

    def _begun(self, ticket: channels.Ticket, deadline_s: float) -> Prefetch:
        return Prefetch(self._lent(), ticket, deadline_s)

    def _lent(self) -> Receiver:
        """The receiver that holds the last version, for a thread. It comes back with the result: a
        late thread may still write to it, and nobody else may use it then."""
        receiver, self._kept = self._kept, Receiver(prove)
        return receiver

    def prefetched(self) -> bool:
        return self._prefetch is None or self._prefetch.done()

    def receive_weights(self, update_info: BridgeUpdateInfo) -> None:
        """Stages a version that is proven complete.

        Raises:
          UpdateRefused, WireError, ChannelError: with every reason; the old version stays.
        """
        ticket = channels.Ticket.from_json(update_info.ticket)
        prefetch, self._prefetch = self._prefetch, None
        if prefetch is None or prefetch.ticket != ticket:
            prefetch = self._begun(ticket, update_info.deadline_s)
        staged = prefetch.result()
        self._kept = prefetch.receiver
        problems = differences(update_info.expected, staged.tensors)
        if staged.is_adapter:
            problems += _unplaced(self.model, staged.tensors)
        if problems:
            raise UpdateRefused(f"weight version {ticket.version}: " + "; ".join(problems))
        self._staged = staged

    def finish_weight_update(self) -> None:
        """Loads what is staged, unless it is an adapter: `load_adapter` comes after this.

        An error from here leaves the model in pieces: the engine must not serve again.
        """
        if self._staged is None or self._staged.is_adapter:
            return
        staged, self._staged = self._staged, None
        started = time.perf_counter()
        model: Any = self.model  # vLLM's models load themselves; torch's type does not say so
        missing = _load(model, staged.tensors, self._direct)
        if missing:
            raise UpdateRefused(
                f"weight version {staged.version}: the model has {len(missing)} parameters that "
                f"nothing was loaded into: {_list(missing)}"
            )
        finalize_layerwise_reload(model, self.model_config)
        _repack_tied_embeddings(model)
        self._kept.release()
        self.loaded = staged.loaded(time.perf_counter() - started)

    def load_adapter(self, config: dict[str, Any]) -> None:
        """Puts the staged adapter, or one of zeros when none is staged, in the place of the old.

        Args:
          config: PEFT's adapter_config.
        """
        staged, self._staged = self._staged, None
        started = time.perf_counter()
        model: Any = self.model
        manager = model.lora_manager
        peft = PEFTHelper.from_dict(config)
        peft.validate_legal(manager.lora_config)
        if staged is None:
            adapter = manager.create_dummy_lora(ADAPTER_ID, peft.r, model.embedding_modules)
        else:
            adapter = LoRAModel.from_lora_tensors(
                ADAPTER_ID,
                # vLLM scales what it is given in place, and what arrived must not be written.
                {name: tensor.clone() for name, tensor in staged.tensors},
                peft,
                device="cpu",
                dtype=manager.lora_config.lora_dtype,
                weights_mapper=renames(model),
            )
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapter)
        manager.activate_adapter(ADAPTER_ID)
        self._kept.release()
        if staged is not None:
            self.loaded = staged.loaded(time.perf_counter() - started)

    def begin_examination(self, config: dict[str, Any] | None, deadline_s: float) -> None:
        """Has the version that was loaded last found again, for `examine`, in a thread: where
        engines have no copy of it, all of it is fetched.

        Args:
          config: PEFT's adapter_config, where there are adapters.

        Raises:
          NotHeld: there is nothing to compare the model with.
        """
        if self._staged is not None:
            raise NotHeld(
                f"weight version {self._staged.version} is staged beside the model, and is what "
                "this process holds; commit or abort it, and examine then"
            )
        self._config = config
        receiver = self._lent()
        self._reread = receiver, begun(receiver.reread, deadline_s)

    def found(self) -> bool:
        """Whether `examine` can begin, or say why not."""
        return self._reread is None or self._reread[1].done()

    def examine(self, budget_s: float) -> dict[str, Any] | None:
        """See Examination.work.

        Raises:
          NotHeld, ChannelError: there is nothing to compare the model with.
        """
        if self._examination is None:
            assert self._reread is not None, "begin_examination comes first"
            receiver, reread = self._reread
            if not wait([reread], budget_s).done:
                return None
            self._reread, self._kept = None, receiver
            self._examination = self._examination_of(reread.result())
        return self._examination.work(budget_s)

    def _examination_of(self, received: Received) -> Examination:
        version, config = received.manifest.version, self._config
        if version != self.loaded.get("version"):
            self._kept.release()
            raise NotHeld(
                f"weight version {version} is held, and was not loaded; publish a version and "
                "examine that"
            )
        tensors = torch_view.tensors(received.manifest, received.data)
        scaling = None
        if config and any(name.startswith(ADAPTER_PREFIX) for name, _ in tensors):
            scaling = PEFTHelper.from_dict(config).vllm_lora_scaling_factor
        return Examination(self.model, version, tensors, scaling)

    def end_examination(self) -> None:
        """Lets the version go, if one is examined. One that is still fetched is left to its
        thread."""
        if self._reread is not None:
            receiver, reread = self._reread
            if wait([reread], _REREAD_S).done:
                self._kept = receiver
        self._examination = self._reread = None
        self._kept.release()

    def drop(self) -> None:
        """Forgets what is staged, and lets its memory go."""
        self._staged = self._prefetch = None
        self._kept.release()

    def shutdown(self) -> None:
        self.drop()
        self._kept.close()


class BridgeWorker:
    """Methods that vLLM adds to its worker class; the front end calls them by name."""

    weight_transfer_engine: BridgeWeightTransferEngine
    _weight_update_active: bool  # vLLM's own mark that an update is under way

    def bridge_prefetch(self, ticket_json: str, deadline_s: float) -> None:
        self.weight_transfer_engine.prefetch(ticket_json, deadline_s)

    def bridge_prefetched(self) -> bool:
        return self.weight_transfer_engine.prefetched()

    def bridge_loaded(self) -> dict[str, Any]:
        """What the last update loaded; see BridgeWeightTransferEngine.loaded."""
        return self.weight_transfer_engine.loaded

    def bridge_load_adapter(self, config: dict[str, Any]) -> None:
        """See BridgeWeightTransferEngine.load_adapter."""
        self.weight_transfer_engine.load_adapter(config)

    def bridge_begin_examination(self, config: dict[str, Any] | None, deadline_s: float) -> None:
        """See BridgeWeightTransferEngine.begin_examination."""
        self.weight_transfer_engine.begin_examination(config, deadline_s)

    def bridge_found(self) -> bool:
        """See BridgeWeightTransferEngine.found."""
        return self.weight_transfer_engine.found()

    def bridge_examine(self, budget_s: float) -> dict[str, Any] | None:
        """See Examination.work."""
        return self.weight_transfer_engine.examine(budget_s)

    def bridge_end_examination(self) -> None:
        """See BridgeWeightTransferEngine.end_examination."""
        self.weight_transfer_engine.end_examination()

    def bridge_abort(self) -> None:
        """Closes an update that was not finished. The model keeps its weights."""
        self.weight_transfer_engine.drop()
        # vLLM has no other way to close one than to finish it, which unloads the adapter.
        self._weight_update_active = False


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


def _unplaced(model: Any, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
    """The tensors of an adapter that belong to nothing in `model`: vLLM would ignore them."""
    manager = model.lora_manager
    places = {*manager.modules, *itertools.chain(*manager.packed_modules.values())}
    lost = [
        name
        for name, _ in tensors
        if not _LORA_NAME.fullmatch(name)
        or parse_fine_tuned_lora_name(name, renames(model))[0] not in places
    ]
    return [f"{len(lost)} tensors have no place in the model: {_list(lost)}"] if lost else []


def stage(receiver: Receiver, ticket: channels.Ticket, deadline_s: float) -> Staged:
    """Fetches a version and proves it, on the very tensors that the loader gets.

    Raises:
      UpdateRefused, ChannelError, WireError, DeltaError: it cannot be had whole.
    """
    started = time.perf_counter()
    received = receiver.receive(ticket, deadline_s)
    tensors = torch_view.tensors(received.manifest, received.data)
    seconds = time.perf_counter() - started
    return Staged(ticket.version, tensors, received.digest, received.nbytes, seconds)


def prove(manifest: wire.Manifest, data: Sequence[np.ndarray]) -> str:
    """The digest of a version, of the very tensors that the loader gets: this proves the views too.

    Raises:
      WireError: they are not the manifest's.
    """
    tensors = [tensor for _, tensor in torch_view.tensors(manifest, data)]
    digests = wire.xxh3_of_each(map(torch_view.tensor_bytes, tensors))
    arrived = [
        dataclasses.replace(entry, dtype=_dtype(tensor), shape=tuple(tensor.shape), xxh3=digest)
        for entry, tensor, digest in zip(manifest.tensors, tensors, digests, strict=True)
    ]
    torn = [
        entry.name
        for entry, promised in zip(arrived, manifest.tensors, strict=True)
        if entry != promised
    ]
    if torn:
        raise wire.WireError(
            f"weight version {manifest.version}: {len(torn)} tensors did not arrive as they were "
            f"sent (XXH3 differs): {_list(torn)}"
        )
    return wire.version_digest(arrived)


def _load(
    model: Any, tensors: Sequence[tuple[str, torch.Tensor]], direct: set[torch.nn.Module]
) -> list[str]:
    """Loads `tensors` in a layerwise reload, and returns the parameters that got nothing.

    vLLM sees only what a parameter's `weight_loader` is given. Some models copy into a parameter
    themselves (gpt-oss: experts, attention sinks); in a reload that copy is to the meta device and
    is lost without an error, and the old weights stay. Layers that do so are given memory to be
    written to. `direct` remembers them: the first update finds them, and loads twice.
    """
    wanted = _parameters(model)
    loaded = _load_once(model, tensors, direct)
    wanted &= _parameters(model)  # not a tied head, nor what only exists once processed
    unseen = {name: layer for name, layer in _awaiting(model).items() if name in wanted}
    if loaded is None:  # some models do not say what they loaded
        return sorted(unseen)
    found = {layer for name, layer in unseen.items() if name in loaded} - direct
    if found:
        direct |= found
        _load_once(model, tensors, direct)
    for layer in direct:
        _layerwise_process(layer, get_layerwise_info(layer))
    return sorted(wanted - loaded)


def _load_once(
    model: Any, tensors: Sequence[tuple[str, torch.Tensor]], direct: set[torch.nn.Module]
) -> set[str] | None:
    initialize_layerwise_reload(model)
    _forget_packed_experts(model)
    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0
        if layer in direct:
            materialize_layer(layer, info)
    loaded = model.load_weights(_writable_biases(tensors))
    return None if loaded is None else {_plain(name) for name in loaded}


def _writable_biases(
    tensors: Sequence[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """What arrived, but with biases of its own, which are small.

    Only one tensor-parallel rank may add a bias, so gpt-oss's loader zeroes in the others what it
    is given; the tensors are views of memory that is read-only and shared by all ranks.
    """
    for name, tensor in tensors:
        yield name, tensor.clone() if name.endswith("bias") else tensor


def _awaiting(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Parameters that no weight loader was called for in this reload, and their layers."""
    awaiting = {}
    for prefix, layer in model.named_modules():
        info = get_layerwise_info(layer)
        called = {name for name, _ in info.loaded_weights}
        for name, _ in layer.named_parameters(recurse=False):
            if info.can_load() and name not in called:  # it cannot load once it is complete
                awaiting[_plain(f"{prefix}.{name}" if prefix else name)] = layer
    return awaiting


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Has the experts of a mixture packed again on CPU, as they were when the engine started.

    There the kernel wants its own layout, and vLLM 0.32 packs for it only while a layer has no
    kernel yet: a reload would leave plain weights to a kernel that reads packed ones, silently.
    On other devices the layer must keep its kernel, which a CUDA graph may have captured.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


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
        # vars: a layer wrapped for an adapter answers for the one inside it.
        packed, weight = vars(module).get("cpu_linear"), getattr(module, "weight", None)
        if packed is not None and weight is not None and weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


def _parameters(model: torch.nn.Module) -> set[str]:
    return {_plain(name) for name, _ in model.named_parameters()}


def _plain(name: str) -> str:
    """The name that a parameter has where its layer is not wrapped for an adapter."""
    return name.replace(".base_layer.", ".")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
