"""Names that `algorithm.*` knows, what a choice implies for other keys, and whole papers' choices.

Tables only: config.py reads them, and answers a typo without jax. What a user sets always wins.
"""

from collections.abc import Mapping
from typing import Any

ADVANTAGES = (
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "batch_std",
    "scalerl",
    "gdpo",
    "maxrl",
    "pass_at_k",
    "none",
)
LOSSES = ("ppo_clip", "gspo", "gspo_token", "cispo", "sapo", "dppo", "gmpo")

# Defaults that would mean nothing, or something else, beside this choice.
IMPLIED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("loss", "ppo_clip"): {"clip_low": 0.2, "clip_high": 0.28},
    ("loss", "gspo"): {"clip_low": 3e-4, "clip_high": 4e-4},
    ("loss", "gspo_token"): {"clip_low": 3e-4, "clip_high": 4e-4},
    ("loss", "dppo"): {"clip_low": 0.2, "clip_high": 0.2},
    ("loss", "gmpo"): {"clip_low": 0.4, "clip_high": 0.4},
    # Its baseline is the batch's mean, so a group of equal rewards has something to say.
    ("advantage", "reinforce_pp"): {"mask_equal_rewards": False},
    # It looks at no reward.
    ("advantage", "none"): {"mask_equal_rewards": False},
    # The ratio already measures from the engine.
    ("proximal", "engine"): {"correction": "none"},
}

_PPO = {"loss": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "grpo": _PPO
    | {
        "advantage": "grpo",
        "mask_equal_rewards": False,
        "aggregation": "sequence_mean_token_mean",
        "kl_coefficient": 0.04,
    },
    "dr_grpo": _PPO
    | {
        "advantage": "dr_grpo",
        "mask_equal_rewards": False,
        "aggregation": "sequence_mean_token_sum_norm",
    },
    "dapo": _PPO | {"advantage": "grpo", "clip_high": 0.28, "aggregation": "token_mean"},
    "rloo": _PPO
    | {
        "advantage": "rloo",
        "mask_equal_rewards": False,
        "aggregation": "sequence_mean_token_sum",
    },
    "reinforce_pp": _PPO | {"advantage": "reinforce_pp", "aggregation": "token_mean"},
    "gspo": {
        "advantage": "grpo",
        "loss": "gspo",
        "aggregation": "sequence_mean_token_mean",
        "minibatches": 4,
    },
    "cispo": {
        "advantage": "grpo",
        "loss": "cispo",
        "aggregation": "token_mean",
        "proximal": "engine",
    },
    "sapo": {"advantage": "grpo", "loss": "sapo", "aggregation": "sequence_mean_token_mean"},
    "dppo": {"loss": "dppo", "proximal": "engine"},
    "liteppo": _PPO | {"advantage": "batch_std", "aggregation": "token_mean"},
    "scalerl": {
        "advantage": "scalerl",
        "mask_equal_rewards": True,
        "loss": "cispo",
        "aggregation": "prompt_mean",
        "proximal": "engine",
    },
    "maxrl": {"advantage": "maxrl"},
    "distill": {"advantage": "none", "kl_coefficient": 1.0, "kl_estimator": "k2"},
}


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with what its preset and its choices imply for keys that it leaves open. What the
    user chose implies more than what the preset does."""
    name = given.get("preset")
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return {**_implied(preset), **preset, **_implied(given), **given}


def _implied(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for (choice, name), others in IMPLIED.items()
        if choices.get(choice) == name
        for key, value in others.items()
    }
