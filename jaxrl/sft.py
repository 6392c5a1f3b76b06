"""Supervised fine-tuning: where a policy starts from that GRPO would seldom find a reward with.

    python -m jaxrl.sft --config FILE [--resume | --dry-run] [--section.key VALUE ...]

What is learned are given completions, token by token; all else, the exit codes too, is as in
`jaxrl.train`, and the export of such a run is a `model.path` for that one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl.config import SftConfig
from jaxrl.interrupt import Interrupt
from jaxrl.learner import Checkpoints, build_learner, lead, open_model
from jaxrl.measure import Clock
from jaxrl.program import refuse_to_go_on_skipping, start, summarize
from jaxrl.report import SFT_COLUMNS
from jaxrl.settings import Command, to_yaml
from jaxrl.types import Example, Group, Rollout, TrainBatch

if TYPE_CHECKING:  # jax starts only when the configuration is known to be good
    from tokenizers import Tokenizer

    from jaxrl.data import PromptStream
    from jaxrl.hosts import Hosts
    from jaxrl.metrics import RunLog
    from jaxrl.update import Nll, TrainState, Update


def main(arguments: list[str] | None = None) -> int:
    return start(sys.argv[1:] if arguments is None else arguments, SftConfig, fine_tune)


@dataclass
class Parts:
    """Everything the loop uses, already put together."""

    config: SftConfig
    stream: PromptStream[Example]
    held_out: list[TrainBatch]
    tokenizer: Tokenizer
    update: Update
    nll: Nll
    save: Callable[[int, TrainState, int], None]  # (step, state, cursor)
    log: RunLog
    key_cost: float  # see `packing.pack`


def run(
    parts: Parts, state: TrainState, first_step: int, interrupted: Interrupt
) -> tuple[TrainState, int]:
    """Examples, update; the examples of the next step are packed while the device computes.

    Returns the state, and the step that it is of.
    """
    import jax

    c, step = parts.config, first_step
    if first_step == 0:
        parts.log.step(0, {"eval/nll": evaluate(parts, state)})
    examples = parts.stream.take(c.sft.sequences_per_step)
    batch = pack_examples(examples, c, parts.key_cost)
    interrupted.begin()
    for step in range(first_step + 1, c.run.steps + 1):
        clock, trained, tokens = Clock(), examples, np.count_nonzero(batch.group_BT)
        metrics: dict[str, Any] = {"pack/efficiency": float(tokens / batch.group_BT.size)}
        state, update_metrics = parts.update(state, [batch])

        # The device computes. A checkpoint of this step has the cursor of this step.
        cursor = parts.stream.cursor
        metrics |= {
            "data/cursor": cursor,
            "data/epochs": parts.stream.epochs,
            "data/skipped_too_long": parts.stream.skipped_too_long,
        }
        if step < c.run.steps:
            examples = parts.stream.take(c.sft.sequences_per_step)
            batch = pack_examples(examples, c, parts.key_cost)
        jax.block_until_ready(state.params)
        clock.lap("update")

        if step == c.run.steps or (c.eval.every_steps and step % c.eval.every_steps == 0):
            metrics["eval/nll"] = evaluate(parts, state)
            clock.lap("eval")
        refuse_to_go_on_skipping(c, state, step)
        metrics |= {name: float(value) for name, value in update_metrics.items()}
        metrics |= clock.metrics()
        metrics["tokens_per_s/train"] = float(tokens / clock.seconds["update"])
        # Before the checkpoint: a step that a resumed run will not repeat has been reported.
        parts.log.step(step, metrics)
        log_samples(parts, step, trained[: c.log.samples_per_step])
        ends = step == c.run.steps or interrupted.signal is not None
        if ends or step % c.checkpoint.every_steps == 0:
            parts.save(step, state, cursor)
        if ends:
            break
    return state, step


def evaluate(parts: Parts, state: TrainState) -> float:
    """Negative log-likelihood of the held-out completions, in nats per token."""
    if not parts.held_out:
        return float("nan")
    total = sum(parts.nll(state.params, batch) for batch in parts.held_out)
    return float(total / sum(batch.loss_mask_BC.sum() for batch in parts.held_out))


def pack_examples(examples: Sequence[Example], c: SftConfig, key_cost: float) -> TrainBatch:
    from jaxrl.packing import pack

    ones_P1 = np.ones((len(examples), 1), np.float32)
    groups = [as_group(example) for example in examples]
    return pack(groups, ones_P1, ones_P1, c.update, c.mesh.row_shards, key_cost)


def as_group(example: Example) -> Group:
    """As if its completion had been sampled, with certainty."""
    tokens = np.array(example.completion, np.int32)
    logprobs, versions = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int64)
    return Group(example, (Rollout(tokens, logprobs, versions, "stop", 0),))


def log_samples(parts: Parts, step: int, examples: Sequence[Example]) -> None:
    """What was learned from, as it was put together; there is no reward."""
    groups = [as_group(example) for example in examples]
    texts = [
        [parts.tokenizer.decode(list(example.completion), skip_special_tokens=False)]
        for example in examples
    ]
    parts.log.samples(step, groups, np.full((len(examples), 1), np.nan), texts)


def fine_tune(command: Command[SftConfig], hosts: Hosts) -> int:
    """Puts the parts together, runs the loop, and leaves the run directory complete."""
    from jaxrl.data import fingerprint, load_tokenizer, open_examples
    from jaxrl.rundir import open_run

    c = command.config
    model_dir, decoder = open_model(c)
    tokenizer = load_tokenizer(model_dir, decoder)
    stream, held_out = open_examples(c, tokenizer, decoder.eos_token_ids)
    data_fingerprint = fingerprint(c.data)  # now: of the data that the stream has just read
    n = c.sft.sequences_per_step
    with contextlib.ExitStack() as cleanup:
        run_dir = cleanup.enter_context(open_run(c.run_dir, to_yaml(c), command.resume))
        interrupt = cleanup.enter_context(Interrupt(starting=True).listening())
        hosts.on_interrupt = interrupt.asked_elsewhere
        hosts.announce("run_dir", run_dir.holder)

        from jaxrl.metrics import RunLog

        learner = lead(hosts, build_learner(c, model_dir, decoder))
        for line in learner.kept_whole:
            print(f"mesh: {line}")
        checkpoints = Checkpoints(c, hosts, learner, run_dir, data_fingerprint)
        state, first_step = learner.state, 0
        if command.resume and (restored := checkpoints.newest()):
            state, first_step = restored.arrays, restored.step
            stream.cursor = restored.host["cursor"]
        log = cleanup.enter_context(
            RunLog(
                run_dir.path,
                steps_total=c.run.steps,
                resume_step=first_step or -1,
                tensorboard=c.log.tensorboard,
                columns=SFT_COLUMNS,
            )
        )
        parts = Parts(
            config=c,
            stream=stream,
            held_out=[
                pack_examples(held_out[i : i + n], c, decoder.key_cost)
                for i in range(0, len(held_out), n)
            ],
            tokenizer=tokenizer,
            update=learner.update,
            nll=learner.nll,
            save=lambda step, state, cursor: checkpoints.save(step, state, {"cursor": cursor}),
            log=log,
            key_cost=decoder.key_cost,
        )
        state, step = run(parts, state, first_step, interrupt)
        finished = step == c.run.steps
        if finished:
            learner.save(state.params, c.model.path, model_dir, run_dir)
        log.closing(summarize(command, run_dir, interrupt, finished))
        return 0 if finished or interrupt.signal is None else 128 + interrupt.signal


if __name__ == "__main__":
    sys.exit(main())
