"""Times what an objective adds to the update; see `tools.bench`."""

import resource
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl.config import AlgorithmSection, OptimizerSection, SftSection
from jaxrl.logprobs import Scores
from jaxrl.objectives.choices import LOSSES
from jaxrl.objectives.objective import Objective, make_objective
from jaxrl.objectives.tokens import NO_ANCHORS, Anchors
from jaxrl.types import TrainBatch
from jaxrl.update import make_optimizer, make_step
from tools.bench.timing import in_turn
from tools.bench.work import Learner, Work, matmul_rate

# All that costs something at once. Not the entropy bonus: its gradient is the model's.
COSTLIEST = {
    "correction": "sequence_tis",
    "token_mask": [0.5, 2.0],
    "sequence_mask": [0.1, 10.0],
    "geometric_mask": [0.9, 1.1],
    "k3_mask": 0.1,
    "opsm_threshold": 0.5,
    "kl_coefficient": 0.04,
    "kl_estimator": "k3+",
    "kl_corrected": True,
}
PLAIN = "share * -log pi"  # in the place of an objective, and nothing measured of it


def bench_loss(work: Work, repeat: int) -> dict[str, Any]:
    """Prints a table, and returns its numbers: each loss with the costliest of all else.

    An update with the objective beside the same with the log-probs' weighted sum, in turn; and the
    objective alone, as an update has it: its gradient with respect to the scores, and its value
    with its metrics. Log-probs of the reference and of pi_old are given: nothing scores them.
    """
    learner = Learner(work)
    mesh, batch = learner.policy.mesh, _batch(work, learner)
    assert mesh is not None
    anchors, scores = _policies(batch)
    losses = {loss: AlgorithmSection(loss=loss, **COSTLIEST) for loss in LOSSES}
    optimizer = make_optimizer(OptimizerSection())
    state, alone = learner.state, {}
    cases: dict[str, Callable[[], Any]] = {}

    def updating(c: AlgorithmSection | SftSection, anchors: Anchors) -> Callable[[], Any]:
        step = make_step(learner.policy, optimizer, c, learner.section, 1.0, mesh, learner.state)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batch, {}, anchors)
            return jax.block_until_ready((state, metrics))

        return run

    cases[PLAIN] = updating(SftSection(), NO_ANCHORS)
    for loss, c in losses.items():
        cases[loss] = updating(c, anchors)
        alone[loss] = _alone(make_objective(c), scores, batch, anchors)
    rate = matmul_rate()
    updates = in_turn(cases, repeat)
    seconds = in_turn(alone, 20 * repeat)
    rows = {
        loss: {
            "update_s": updates[loss],
            "added_share": updates[loss] / updates[PLAIN] - 1,
            "alone_s": seconds[loss],
            "alone_share": seconds[loss] / updates[loss],
        }
        for loss in losses
    }
    record = {
        "what": "loss",
        **work.record(),
        "sampled_tokens": "{} x {}".format(*batch.targets_BC.shape),
        "plain_update_s": updates[PLAIN],
        "losses": rows,
        "matmul_flops_per_s": rate,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    _print(record)
    return record


def _batch(work: Work, learner: Learner) -> TrainBatch:
    shape = work.lengths().shape
    advantages_PG = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    return learner.pack(work.groups(), advantages_PG, np.ones(shape))


def _policies(batch: TrainBatch) -> tuple[Anchors, Scores]:
    """Log-probs under pi_old, the reference and pi, each somewhat off the engine's."""
    rng = np.random.default_rng(4)

    def near() -> np.ndarray:
        noise_BC = rng.normal(0.0, 0.05, batch.behavior_logprobs_BC.shape)
        return batch.behavior_logprobs_BC + noise_BC.astype(np.float32)

    return Anchors(near(), near()), (near(), np.abs(near()))


def _alone(
    objective: Objective, scores: Scores, batch: TrainBatch, anchors: Anchors
) -> Callable[[], Any]:
    def gradient_and_value(scores: Scores, batch: TrainBatch, anchors: Anchors) -> Any:
        def loss(scores: Scores) -> jax.Array:
            return objective(scores, batch, anchors)[0]

        return jax.grad(loss)(scores), objective(scores, batch, anchors)

    run = jax.jit(gradient_and_value)
    given = jax.device_put((scores, batch, anchors))
    return lambda: jax.block_until_ready(run(*given))


def _print(record: dict[str, Any]) -> None:
    plain = record["plain_update_s"]
    print(f"an update of {record['sampled_tokens']} sampled tokens, size {record['size']}")
    print(f"{'':16s} {'update':>10s} {'added':>8s} {'alone':>12s} {'of it':>8s}")
    print(f"{PLAIN:16s} {plain:8.4f} s")
    for loss, row in record["losses"].items():
        print(
            f"{loss:16s} {row['update_s']:8.4f} s {row['added_share']:8.2%} "
            f"{1000 * row['alone_s']:9.3f} ms {row['alone_share']:8.2%}"
        )
