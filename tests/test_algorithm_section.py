"""No key of `algorithm.*` is without effect: each changes what is learned, where it should."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxrl.advantages import estimate_advantages
from jaxrl.config import AlgorithmSection, Config, UpdateSection
from jaxrl.objectives.aggregation import make_shares
from jaxrl.objectives.tokens import Anchors
from jaxrl.packing import minibatches, pack, usable_tokens
from jaxrl.types import TrainBatch
from jaxrl.update import make_copy
from tests.test_config import tree
from tests.test_stability import LENGTHS, TABLE, rollouts, updating
from tests.test_update import Bigram, own_logprobs

# The second group's rewards are all equal.
REWARDS_PG = np.array([[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 1.0, 0.0]])


class Acts(NamedTuple):
    """Beside `context` the key's value is `to`, and something else is learned than without."""

    to: Any
    context: Mapping[str, Any] = {}
    by: str = "step"  # or "update": a step's minibatches, twice


KL, NORM = {"kl_coefficient": 0.1}, {"aggregation": "sequence_mean_token_sum_norm"}
ACTS = {
    "preset": Acts("cispo"),
    "advantage": Acts("rloo"),
    "mask_equal_rewards": Acts(False),
    "mask_truncated": Acts(True),
    "length_bounds": Acts([2, 6]),
    "loss": Acts("cispo"),
    "clip_low": Acts(0.01),
    "clip_high": Acts(0.01),
    "dual_clip": Acts(1.1),
    "cispo_max": Acts(1.1, {"loss": "cispo"}),
    "sapo_tau_positive": Acts(0.5, {"loss": "sapo"}),
    "sapo_tau_negative": Acts(0.5, {"loss": "sapo"}),
    "aggregation": Acts("prompt_mean"),
    "aggregation_constant": Acts(5, NORM),
    "entropy_coefficient": Acts(0.1),
    "kl_coefficient": Acts(0.1),
    "kl_estimator": Acts("k2", KL),
    "kl_corrected": Acts(True, KL),
    "proximal": Acts("engine"),
    "correction": Acts("sequence_tis"),
    "correction_cap": Acts(1.1),
    "token_mask": Acts([0.9, 1.1]),
    "sequence_mask": Acts([0.9, 1.1]),
    "geometric_mask": Acts([0.9, 1.1]),
    "k3_mask": Acts(0.05),
    "opsm_threshold": Acts(0.01),
    "minibatches": Acts(3, by="update"),
    "updates_per_batch": Acts(2, by="update"),
    "reference_every": Acts(1, KL, by="update"),
}
ELSEWHERE = {"reference"}  # what a model is loaded for: tests/test_distillation.py


def configured(options: Mapping[str, Any]) -> Config:
    return Config.model_validate(tree(**{f"algorithm__{k}": v for k, v in options.items()}))


def made(c: Config) -> tuple[list[TrainBatch], Anchors]:
    """What the loop makes of rollouts and rewards, with policies that are somewhat apart; anchors
    are the last minibatch's."""
    groups, _, _ = rollouts()
    tokens_PG = usable_tokens(groups, REWARDS_PG.shape[1])
    advantages_PG, weights_PG = estimate_advantages(
        REWARDS_PG,
        tokens_PG,
        c.algorithm,
        lengths_PG=np.array(LENGTHS),
        truncated_PG=np.array(LENGTHS) == max(LENGTHS[0]),
    )
    shares = make_shares(c.algorithm.aggregation, c.aggregation_constant)
    section = UpdateSection(row_tokens=16)
    batches = []
    for part in minibatches(c.algorithm.minibatches, groups, advantages_PG, weights_PG):
        batch = pack(*part, section, shares=shares)
        own_BC, trained_BC = own_logprobs(TABLE, batch)
        rng = np.random.default_rng(2)
        behavior_BC, *anchors = (
            np.float32(np.where(trained_BC, own_BC + rng.normal(0.1, 0.4, own_BC.shape), 0.0))
            for _ in range(3)
        )
        batches.append(batch._replace(behavior_logprobs_BC=behavior_BC))
    return batches, Anchors(*anchors)


@functools.cache
def learned(by: str, options: tuple[tuple[str, Any], ...]) -> np.ndarray:
    """The parameters after one batch; without `Config` in between nothing would be implied."""
    c = configured({k: list(v) if isinstance(v, tuple) else v for k, v in options})
    batches, anchors = made(c)
    if by == "step":
        state, _ = updating().step(c.algorithm, batches[0], anchors)
    else:
        update, state = Bigram().learner(**c.algorithm.model_dump())
        if c.algorithm.reference_every:
            state = state._replace(reference=make_copy(Bigram(), state.params, None)(state.params))
        for _ in range(2):
            state, _ = update(state, batches)
    return np.array(state.params["table"])


def hashable(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items())


def test_every_key_is_known_to_act():
    unknown = AlgorithmSection.model_fields.keys() - ACTS.keys() - ELSEWHERE
    assert not unknown, f"say in ACTS where {sorted(unknown)} must change what is learned"
    assert not ACTS.keys() - AlgorithmSection.model_fields.keys()


@pytest.mark.parametrize("key", ACTS)
def test_a_key_changes_what_is_learned(key):
    to, context, by = ACTS[key]
    usual = learned(by, hashable(context))
    changed = learned(by, hashable({**context, key: to}))
    assert np.all(np.isfinite(changed))
    assert np.any(changed != usual)
