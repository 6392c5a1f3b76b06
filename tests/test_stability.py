"""Whatever engines say and however far policies are apart, an update is finite or did not happen.

Every loss meets every correction, mask, estimator and aggregation, two at a time, in `make_step`
itself. It runs one operation after the other: to compile each combination would take minutes.
"""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import AlgorithmSection, MeshSection, OptimizerSection, UpdateSection
from jaxrl.mesh import make_mesh
from jaxrl.objectives import choices
from jaxrl.objectives.aggregation import make_shares
from jaxrl.objectives.tokens import Anchors
from jaxrl.packing import pack
from jaxrl.types import Group, Prompt, Rollout, TrainBatch
from jaxrl.update import init_state, make_optimizer, make_step
from tests.reference_policy import VOCAB
from tests.test_update import TEMPERATURE, Bigram, assert_bitwise, host, own_logprobs

FACTORS = {
    "loss": {loss: {"loss": loss} for loss in choices.LOSSES},
    "correction": {
        **{name: {"correction": name} for name in ("none", "token_tis", "sequence_tis")},
        "engine": {"proximal": "engine", "correction": "none"},
    },
    "mask": {
        "none": {},
        "token": {"token_mask": [0.5, 2.0]},
        "sequence": {"sequence_mask": [0.0, 3.0]},
        "geometric": {"geometric_mask": [0.9, 1.1]},
        "k3": {"k3_mask": 0.01},
        "opsm": {"opsm_threshold": 0.5},
    },
    "distance": {
        "none": {},
        **{name: {"kl_coefficient": 0.1, "kl_estimator": name} for name in ("k1", "k2", "k3")},
        "k3+": {"kl_coefficient": 0.1, "kl_estimator": "k3+", "entropy_coefficient": 0.01},
        "corrected": {"kl_coefficient": 0.1, "kl_corrected": True},
    },
    "aggregation": {
        name: {"aggregation": name}
        for name in (
            "token_mean",
            "sequence_mean_token_mean",
            "sequence_mean_token_sum",
            "sequence_mean_token_sum_norm",
            "prompt_mean",
        )
    },
    "dual": {"off": {}, "on": {"dual_clip": 3.0}},
}


def pairwise() -> list[dict[str, str]]:
    """Few combinations, in which any two choices of different factors meet: of random ones always
    that which brings most new pairs."""
    rng = np.random.default_rng(0)
    missing = {
        ((one, x), (other, y))
        for one, other in itertools.combinations(FACTORS, 2)
        for x in FACTORS[one]
        for y in FACTORS[other]
    }
    found = []

    def new(combination: dict[str, str]) -> set:
        return missing & set(itertools.combinations(combination.items(), 2))

    while missing:
        certain = dict(min(missing))
        drawn = (
            {name: str(rng.choice(list(options))) for name, options in FACTORS.items()} | certain
            for _ in range(50)
        )
        found.append(max(drawn, key=lambda combination: len(new(combination))))
        missing -= new(found[-1])
    return found


COMBINATIONS = pairwise()
TABLE = np.sin(np.arange(VOCAB**2.0, dtype=np.float32)).reshape(VOCAB, VOCAB)
LENGTHS = [(1, 5, 3, 1), (4, 0, 2, 6), (1, 1, 3, 2)]  # of completions, by prompt
FAR = 80.0  # nats: exp(80) is 5e34, its square more than float32 holds


def rollouts() -> tuple[list[Group], np.ndarray, np.ndarray]:
    """With log-probs that no ratio can be made of, and a completion that is left out."""
    rng = np.random.default_rng(5)

    def rollout(length: int, i: int) -> Rollout:
        tokens = rng.integers(1, VOCAB, length).astype(np.int32)
        logprobs = np.full(length, -3.0, np.float32)
        if length > 2:
            logprobs[1] = (math.nan, -math.inf, math.inf)[i % 3]
        return Rollout(tokens, logprobs, np.zeros(length, np.int64), "stop", i)

    groups = [
        Group(Prompt(p, "", (1, 2, 3), {}), tuple(rollout(n, i) for i, n in enumerate(lengths)))
        for p, lengths in enumerate(LENGTHS)
    ]
    weights_PG = np.ones((3, 4), np.float32)
    weights_PG[2, 3] = 0.0
    return groups, np.float32(rng.normal(size=(3, 4))), weights_PG


def hostile(section: AlgorithmSection) -> tuple[TrainBatch, Anchors]:
    """Advantages of a million, and policies that are 80 nats apart both ways, completion by
    completion; two empty rows, and NaN wherever nothing is trained."""
    groups, advantages_PG, weights_PG = rollouts()
    batch = pack(
        groups,
        1e6 * advantages_PG,
        weights_PG,
        UpdateSection(row_tokens=16),
        shares=make_shares(section.aggregation, 8),
    )
    batch = TrainBatch(*(np.pad(x, ((0, 2), (0, 0))) for x in batch))
    own_BC, trained_BC = own_logprobs(TABLE, batch)
    rng = np.random.default_rng(1)

    def near_or_far() -> np.ndarray:
        offsets_BN = rng.choice([-FAR, 0.0, FAR], (len(own_BC), 9))  # by completion of the row
        there_BC = own_BC + np.take_along_axis(offsets_BN, batch.completion_BC, axis=1)
        return np.where(trained_BC, there_BC, np.nan).astype(np.float32)

    batch = batch._replace(behavior_logprobs_BC=near_or_far())
    return batch, Anchors(near_or_far(), near_or_far())


class Updating:
    """One state, and `make_step` of any section on it."""

    def __init__(self):
        self.mesh = make_mesh(MeshSection())
        self.optimizer = make_optimizer(OptimizerSection(learning_rate=0.01, warmup_steps=0))
        state = init_state({"table": jnp.array(TABLE)}, self.optimizer, self.mesh)
        moments = jax.tree.map(lambda x: x + 0.01 if x.ndim else x, state.opt_state)
        self.state = state._replace(opt_state=moments)

    def step(self, section: AlgorithmSection, batch: TrainBatch, anchors: Anchors):
        """(state, metrics) after a step that was applied, or that left no trace."""
        compiled = make_step(
            Bigram(), self.optimizer, section, UpdateSection(), TEMPERATURE, self.mesh, self.state
        )
        batch = jax.tree.map(jnp.asarray, batch)
        state, metrics = inspect.unwrap(compiled)(self.state, batch, {}, anchors)
        applied = metrics["update/skipped"] == 0
        assert applied or metrics["update/nonfinite"] or not metrics["tokens/trained"]
        assert int(state.skipped_in_a_row) == metrics["update/nonfinite"]
        if applied:
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(host(state)))
        else:
            assert_bitwise(host(state.params), host(self.state.params))
            assert_bitwise(host(state.opt_state), host(self.state.opt_state))
        return state, host(metrics)


updating = functools.cache(Updating)


def sections(loss: str) -> list[AlgorithmSection]:
    chosen = [row for row in COMBINATIONS if row["loss"] == loss]
    options = [[FACTORS[name][choice] for name, choice in row.items()] for row in chosen]
    return [AlgorithmSection(**{k: v for part in row for k, v in part.items()}) for row in options]


@pytest.mark.parametrize("loss", choices.LOSSES)
def test_policies_far_apart_and_huge_advantages_give_a_finite_update(loss):
    for section in sections(loss):
        batch, anchors = hostile(section)
        state, metrics = updating().step(section, batch, anchors)
        assert metrics["update/skipped"] == 0, section
        unknown = [name for name, value in metrics.items() if not np.isfinite(value)]
        assert not unknown, (section, unknown)
        assert np.any(state.params["table"] != TABLE)


@pytest.mark.parametrize("loss", choices.LOSSES)
def test_at_the_end_of_float32_an_update_is_finite_or_leaves_no_trace(loss):
    most, skipped = float(np.finfo(np.float32).max), 0
    for i, section in enumerate(sections(loss)[:2]):
        batch, anchors = hostile(section)
        trained_BC = batch.loss_mask_BC > 0
        if i % 2:
            advantages_BC = np.where(batch.advantages_BC > 0, most, -most)
            batch = batch._replace(advantages_BC=np.float32(advantages_BC))
        else:
            lowest_BC = np.where(trained_BC, np.float32(-most), np.nan)
            batch = batch._replace(behavior_logprobs_BC=np.float32(lowest_BC))
            anchors = Anchors(np.float32(lowest_BC), np.float32(lowest_BC))
        _, metrics = updating().step(section, batch, anchors)
        skipped += metrics["update/skipped"]
    assert skipped > 0  # advantages of 3e38 have no finite norm


def test_nothing_to_train_on_changes_nothing_whatever_stands_there():
    for section in (sections(loss)[0] for loss in choices.LOSSES):
        batch, anchors = hostile(section)
        nothing = batch._replace(
            loss_mask_BC=np.zeros_like(batch.loss_mask_BC),
            behavior_logprobs_BC=np.full_like(batch.loss_mask_BC, np.nan),
        )
        _, metrics = updating().step(section, nothing, anchors)
        assert metrics["update/skipped"] == 1 and metrics["update/nonfinite"] == 0
        assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
        unknown = [name for name, value in metrics.items() if not np.isfinite(value)]
        assert not unknown, (section, unknown)
