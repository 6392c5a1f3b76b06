"""The policy on its mesh, and what is compiled for it. All processes of a run have one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrl.config import Config, RunConfig, SftConfig
from jaxrl.types import TrainBatch, UserError

if TYPE_CHECKING:  # jax starts only when the configuration is known to be good
    from jax.sharding import Mesh

    from bridge.encoding import Shadow
    from bridge.export import Exporter
    from bridge.publisher import Score
    from bridge.wire import HostTensor
    from jaxrl.checkpoint import Restored
    from jaxrl.hosts import Hosts
    from jaxrl.models.config import DecoderConfig, LoraConfig
    from jaxrl.models.decoder import Params, Policy
    from jaxrl.models.params import ParamSpec
    from jaxrl.models.params import Path as ParamPath
    from jaxrl.rundir import RunDir
    from jaxrl.update import Metrics, Nll, Still, TrainState, Update

FROZEN_DTYPE = "bfloat16"  # of the weights beside adapters, in the trainer and on the wire


def open_model(c: Config | SftConfig) -> tuple[Path, DecoderConfig]:
    from jaxrl.model_dir import find_model
    from jaxrl.models.config import load_config
    from jaxrl.models.params import trained_specs

    model_dir = find_model(c.model.path)
    decoder = load_config(model_dir, c.model.ignore_config_fields)
    check_lengths(c, decoder)
    check_mesh(c, decoder)
    trained_specs(decoder, lora_config(c))  # refuses adapters for a layer that the model lacks
    if c.algorithm.reference is not None:
        check_reference(c, model_dir, decoder)
    return model_dir, decoder


def open_reference(c: Config | SftConfig) -> tuple[Path, DecoderConfig]:
    from jaxrl.model_dir import find_model
    from jaxrl.models.config import load_config

    assert c.algorithm.reference is not None
    directory = find_model(c.algorithm.reference, "algorithm.reference")
    return directory, load_config(directory, c.model.ignore_config_fields)


@dataclass
class Learner:
    """The policy on its mesh, and what is compiled for it. All processes call these together."""

    policy: Policy
    lora: LoraConfig | None
    specs: dict[ParamPath, ParamSpec]  # of the whole policy
    trained: dict[ParamPath, ParamSpec]  # of what trains: the whole policy, or adapters
    mesh: Mesh
    kept_whole: list[str]  # what the mesh does not divide
    frozen: Params | None  # with adapters: the weights beside them
    frozen_fingerprint: int
    state: TrainState
    update: Update
    score: Score
    nll: Nll
    export: Exporter | LedExporter  # of what trains, for every publish
    export_frozen: Exporter | LedExporter  # of the weights beside adapters
    export_merged: Callable[[Params], list[HostTensor]]  # of the whole policy, from what trains

    def save(self, params: Params, model_path: str, model_dir: Path, run_dir: RunDir) -> None:
        """What the run was for: a Hugging Face directory, and of adapters a PEFT one as well."""
        from bridge.checkpoints import save_model
        from bridge.peft import adapter_config, save_adapter

        if self.lora is not None:
            settings = adapter_config(self.lora, self.trained, model_path)
            save_adapter(self.export(params), settings, run_dir.adapter)
        save_model(self.export_merged(params), model_dir, run_dir.export)


def build_learner(c: Config | SftConfig, model_dir: Path, decoder: DecoderConfig) -> Learner:
    import jax

    from bridge.checkpoints import load_params
    from bridge.export import Exporter
    from jaxrl.mesh import kept_whole, make_mesh, param_shardings
    from jaxrl.models.decoder import init_params
    from jaxrl.models.lora import fingerprint, merged_params, with_adapters
    from jaxrl.models.params import param_specs, trained_specs
    from jaxrl.sampler import make_score
    from jaxrl.update import init_state, make_copy, make_nll, make_optimizer, make_update

    mesh, lora = make_mesh(c.mesh), lora_config(c)
    specs, trained = param_specs(decoder), trained_specs(decoder, lora)
    shardings = param_shardings(specs, mesh)
    if lora is None:
        frozen, params = None, load_params(model_dir, specs, shardings)
    else:
        frozen = load_params(model_dir, specs, shardings, FROZEN_DTYPE)
        start = jax.jit(
            lambda key: init_params(trained, key), out_shardings=param_shardings(trained, mesh)
        )
        params = start(jax.random.key(c.run.seed))
    policy = make_policy(c, decoder, mesh)
    optimizer = make_optimizer(c.optimizer)
    state = init_state(params, optimizer, mesh)
    if c.algorithm.reference_every:
        state = state._replace(reference=make_copy(policy, params, frozen)(params))
    reference = None if c.algorithm.reference is None else load_reference(c, mesh)
    update = make_update(
        policy, optimizer, c.algorithm, c.update, c.temperature, mesh, state, frozen, reference
    )
    bucket_bytes, processes = c.publish.bucket_mib << 20, jax.process_count()
    export = Exporter(trained, c.wire_dtype, bucket_bytes, c.publish.compare, processes)
    export_frozen = Exporter(specs, FROZEN_DTYPE, bucket_bytes, processes=processes)

    def export_merged(params: Params) -> list[HostTensor]:
        if lora is None:
            return export(params)
        return export_frozen(merged_params(specs, lora, with_adapters(frozen or {}, params)))

    return Learner(
        policy=policy,
        lora=lora,
        specs=specs,
        trained=trained,
        mesh=mesh,
        kept_whole=kept_whole(specs, mesh),
        frozen=frozen,
        frozen_fingerprint=0 if frozen is None else int(fingerprint(frozen)),
        state=state,
        update=update,
        score=make_score(policy, frozen),
        nll=make_nll(policy, c.update, mesh, frozen),
        export=export,
        export_frozen=export_frozen,
        export_merged=export_merged,
    )


def load_reference(c: Config | SftConfig, mesh: Mesh) -> Still:
    """The model that `algorithm.reference` names, in the dtype that it computes in."""
    from bridge.checkpoints import load_params
    from jaxrl.mesh import param_shardings
    from jaxrl.models.params import param_specs
    from jaxrl.update import Still

    directory, decoder = open_reference(c)
    policy, specs = make_policy(c, decoder, mesh), param_specs(decoder)
    dtype = str(policy.compute_dtype)
    return Still(policy, load_params(directory, specs, param_shardings(specs, mesh), dtype))


def lead(hosts: Hosts, learner: Learner) -> Learner:
    """The learner of the first process: whatever it is asked, the others are told first."""
    if hosts.alone:
        return learner

    def announce_rows(order: str, batches: Sequence[TrainBatch]) -> list[TrainBatch]:
        """Each process gets the rows that lie on its devices; returns those of this one."""
        from jaxrl.mesh import rows_of_process

        def rows_of(process: int) -> list[TrainBatch]:
            held = [rows_of_process(learner.mesh, len(batch[0]), process) for batch in batches]
            return [
                TrainBatch(*(array[rows] for array in batch))
                for batch, rows in zip(batches, held, strict=True)
            ]

        shards = [rows_of(process) for process in range(hosts.count)]
        hosts.announce(order, arrays=[[x for batch in of_one for x in batch] for of_one in shards])
        return shards[0]

    def update(state: TrainState, batches: Sequence[TrainBatch]) -> tuple[TrainState, Metrics]:
        return learner.update(state, announce_rows("update", batches))

    def nll(params: Params, batch: TrainBatch) -> float:
        return learner.nll(params, *announce_rows("nll", [batch]))

    def led(order: str, exporter: Exporter | LedExporter) -> LedExporter:
        assert not isinstance(exporter, LedExporter), order
        return LedExporter(hosts, order, exporter)

    return dataclasses.replace(
        learner,
        update=update,
        score=hosts.together("score", learner.score),
        nll=nll,
        export=led("export", learner.export),
        export_frozen=led("export_frozen", learner.export_frozen),
        export_merged=hosts.together("export_merged", learner.export_merged),
    )


@dataclass
class Checkpoints:
    """Those of a run. The first process uses them; the others write and read their shards then."""

    c: RunConfig
    hosts: Hosts
    learner: Learner
    run_dir: RunDir
    data_fingerprint: str
    _whole: set[str] = field(default_factory=set)  # found so in this process

    def save(self, step: int, state: TrainState, own: Mapping[str, Any]) -> None:
        """`own`: what the kind of run needs beside the state to go on, JSON-able."""
        from jaxrl import checkpoint

        host = {
            **own,
            "data_fingerprint": self.data_fingerprint,
            "frozen_fingerprint": self.learner.frozen_fingerprint,
            "config": self.c.model_dump(mode="json"),
        }
        self.hosts.announce("save", step)
        folder, keep = self.run_dir.checkpoints, self.c.checkpoint.keep
        checkpoint.save(folder, step, state, host, keep, self._whole)

    def newest(self) -> Restored | None:
        """The newest verified one; None: none was written yet.

        Raises:
          UserError: it belongs to other data or other frozen weights, or the run is complete.
        """
        from jaxrl import checkpoint

        for change in self.run_dir.changes:
            print(f"resuming with {change}")
        newest, rejected = checkpoint.find_newest(self.run_dir.checkpoints)
        if newest is None:
            print("no checkpoint was written yet: starting from the first step")
            return None
        self._whole.add(newest.name)
        self.hosts.announce("restore", newest.name)
        restored = checkpoint.restore(newest, abstract(self.learner.state), rejected)
        for line in restored.rejected:
            print(f"passed over a damaged checkpoint: {line}", file=sys.stderr)
        if restored.host["data_fingerprint"] != self.data_fingerprint:
            raise UserError(
                f"{self.run_dir.path}: the data is not what this run was trained on so far "
                "(another file, or other data.* keys); bring it back, or start a new run"
            )
        if restored.host["frozen_fingerprint"] != self.learner.frozen_fingerprint:
            raise UserError(
                f"{self.run_dir.path}: the weights in model.path are not those that these adapters "
                "were trained beside; bring them back, or start a new run"
            )
        print(f"resumed after step {restored.step}")
        if restored.step >= self.c.run.steps:
            raise UserError(
                f"{self.run_dir.path}: the run is complete, {restored.step} of run.steps = "
                f"{self.c.run.steps} steps; raise --run.steps to train further"
            )
        return restored


@dataclass
class LedExporter:
    """An exporter of the first process, which the others export with."""

    hosts: Hosts
    order: str
    exporter: Exporter

    @property
    def plan(self) -> Sequence[Any]:
        return self.exporter.plan

    @property
    def nbytes(self) -> int:
        return self.exporter.nbytes

    def groups(self, params: Params) -> Iterator[list[HostTensor]]:
        self.hosts.announce(self.order)
        return self.exporter.groups(params)

    def groups_since(self, kept: Shadow, params: Params) -> Iterator[list[HostTensor]]:
        """Whole: the others have no last version to compare with."""
        return self.groups(params)

    @property
    def device_bytes(self) -> int:
        return self.exporter.device_bytes

    def __call__(self, params: Params) -> list[HostTensor]:
        self.hosts.announce(self.order)
        return self.exporter(params)


def make_policy(c: RunConfig, decoder: DecoderConfig, mesh: Mesh) -> Policy:
    """What `auto` means in model.* is decided by the mesh's devices. Says so where attention cannot
    be what they are best at."""
    import jax.numpy as jnp

    from jaxrl.models.attention import backend_for
    from jaxrl.models.decoder import Policy

    platform, compute, lora = mesh.devices.flat[0].platform, c.model.compute_dtype, lora_config(c)
    if compute == "auto":
        compute = "float32" if platform == "cpu" else "bfloat16"
    attention, instead = backend_for(c.model.attention, platform, decoder, compute)
    if instead:
        print(instead, file=sys.stderr)
    remat = c.model.remat
    if remat == "auto":
        remat = "none" if platform == "cpu" else "full"
    lora_scale = lora.scale if lora else 0.0
    return Policy(decoder, jnp.dtype(compute), remat, lora_scale, attention, mesh)


def lora_config(c: RunConfig) -> LoraConfig | None:
    from jaxrl.models.config import LoraConfig

    if not c.lora.rank:
        return None
    return LoraConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))


def abstract(state: TrainState) -> TrainState:
    """Its shapes, dtypes and shardings."""
    import jax

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def check_lengths(c: Config | SftConfig, decoder: DecoderConfig) -> None:
    if c.max_model_len > decoder.max_positions:
        raise UserError(
            f"{c.lengths} are {c.max_model_len} tokens together, but the policy has "
            f"{decoder.max_positions} positions; lower one of them"
        )
    if not decoder.eos_token_ids:
        raise UserError(
            f"{c.model.path}: config.json has no eos_token_id: nothing ends a completion"
        )


def check_reference(c: Config | SftConfig, model_dir: Path, decoder: DecoderConfig) -> None:
    """Raises UserError unless the reference can score whatever the policy samples."""
    from jaxrl.data import load_tokenizer

    folder, other = open_reference(c)
    ours, theirs = (
        load_tokenizer(directory, config).get_vocab(with_added_tokens=True)
        for directory, config in ((model_dir, decoder), (folder, other))
    )
    where, moe = f"algorithm.reference = {c.algorithm.reference}", other.moe
    if ours != theirs:
        text, _ = min(ours.items() ^ theirs.items(), key=lambda item: item[::-1])
        raise UserError(
            f"{where}: its tokenizer is not that of {c.model.path} ({text!r} is another token "
            "there); take a model with the same"
        )
    if other.vocab_size < decoder.vocab_size:
        raise UserError(
            f"{where}: has a vocabulary of {other.vocab_size} tokens, and {c.model.path} samples "
            f"from {decoder.vocab_size}; take a model with as many"
        )
    if other.max_positions < c.max_model_len:
        raise UserError(
            f"{where}: has {other.max_positions} positions, but {c.lengths} are "
            f"{c.max_model_len} tokens together; lower one of them"
        )
    if moe is not None and moe.num_experts % c.mesh.expert:
        raise UserError(
            f"{where}: mesh.expert = {c.mesh.expert} does not divide its {moe.num_experts} experts"
        )


def check_mesh(c: RunConfig, decoder: DecoderConfig) -> None:
    size, moe = c.mesh.expert, decoder.moe
    if size > 1 and moe is None:
        raise UserError(
            f"mesh.expert = {size}: {c.model.path} has no experts to split; set it to 1, and make "
            f"mesh.fsdp = {c.mesh.fsdp * size} to use the same devices"
        )
    if moe is not None and moe.num_experts % size:
        fit = max(n for n in range(1, size) if moe.num_experts % n == 0)
        raise UserError(
            f"mesh.expert = {size} does not divide the {moe.num_experts} experts of "
            f"{c.model.path}; the next that does is {fit}. mesh.fsdp takes any number of devices"
        )
