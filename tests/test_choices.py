"""One line of YAML is a whole paper's objective, and what stands beside it wins."""

import pytest

from jaxrl.config import AlgorithmSection, Config, contradictions
from jaxrl.objectives.choices import ADVANTAGES, LOSSES, PRESETS, resolved
from jaxrl.objectives.custom import load_all
from jaxrl.settings import to_yaml
from jaxrl.types import UserError
from tests.test_config import command, load_tree, problems, tree

PAPERS = {
    "grpo": "grpo ppo_clip 0.2 0.2 sequence_mean_token_mean trainer token_tis",
    "dr_grpo": "dr_grpo ppo_clip 0.2 0.2 sequence_mean_token_sum_norm trainer token_tis",
    "dapo": "grpo ppo_clip 0.2 0.28 token_mean trainer token_tis",
    "rloo": "rloo ppo_clip 0.2 0.2 sequence_mean_token_sum trainer token_tis",
    "reinforce_pp": "reinforce_pp ppo_clip 0.2 0.2 token_mean trainer token_tis",
    "gspo": "grpo gspo 0.0003 0.0004 sequence_mean_token_mean trainer token_tis",
    "cispo": "grpo cispo 0.2 0.28 token_mean engine none",
    "sapo": "grpo sapo 0.2 0.28 sequence_mean_token_mean trainer token_tis",
    "dppo": "grpo dppo 0.2 0.2 token_mean engine none",
    "liteppo": "batch_std ppo_clip 0.2 0.2 token_mean trainer token_tis",
    "scalerl": "scalerl cispo 0.2 0.28 prompt_mean engine none",
    "maxrl": "maxrl ppo_clip 0.2 0.28 token_mean trainer token_tis",
    "distill": "none ppo_clip 0.2 0.28 token_mean trainer token_tis",
}
KL = {"grpo": 0.04, "distill": 1.0}
NO_MASK = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "distill")


def with_preset(name: str) -> dict:
    """What a distillation lacks is the teacher."""
    teacher = {"algorithm__reference": "teacher"} if name == "distill" else {}
    return tree(algorithm__preset=name, **teacher)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_paper(tmp_path, preset):
    config = load_tree(tmp_path, with_preset(preset))
    c = config.algorithm
    keys = ("advantage", "loss", "clip_low", "clip_high", "aggregation", "proximal", "correction")
    assert " ".join(str(getattr(c, key)) for key in keys) == PAPERS[preset]
    assert c.kl_coefficient == KL.get(preset, 0.0)
    assert c.kl_estimator == ("k2" if preset == "distill" else "k3")
    assert c.minibatches == c.steps_per_batch == (4 if preset == "gspo" else 1)
    assert c.scores_first == (preset == "gspo")  # more than one step a batch
    assert c.mask_equal_rewards == (preset not in NO_MASK)
    # What --dry-run prints and a run keeps is resolved, and means the same.
    assert load_tree(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_set_beside_a_preset_wins(preset):
    others = {
        "advantage": "dr_grpo" if PRESETS[preset].get("advantage") != "dr_grpo" else "rloo",
        "mask_equal_rewards": not AlgorithmSection(preset=preset).mask_equal_rewards,
        "clip_low": 0.11,
        "clip_high": 0.12,
        "aggregation": "sequence_mean_token_sum",
        "kl_coefficient": 0.5,
        "minibatches": 3,
        "cispo_max": 7.0,
    }
    section = AlgorithmSection(preset=preset, **others)
    assert {key: getattr(section, key) for key in others} == others


def test_a_choice_brings_the_defaults_that_belong_to_it(tmp_path):
    c = command(tmp_path, "--algorithm.preset=dapo", "--algorithm.loss=gspo").config.algorithm
    assert (c.clip_low, c.clip_high, c.aggregation) == (3e-4, 4e-4, "token_mean")
    assert AlgorithmSection(preset="gspo", loss="ppo_clip").clip_high == 0.28
    assert AlgorithmSection(proximal="engine").correction == "none"
    assert AlgorithmSection(loss="own.module:loss").clip_low == 0.2
    assert resolved({}) == {}  # nothing chosen, nothing implied: the fields' own defaults


def test_the_constant_of_the_norm_is_the_longest_completion_unless_it_is_set(tmp_path):
    assert load_tree(tmp_path, tree(rollout__max_new_tokens=77)).aggregation_constant == 77
    given = tree(algorithm__aggregation_constant=5)
    assert load_tree(tmp_path, given).aggregation_constant == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm__preset": "gpro"}, ["algorithm.preset = 'gpro': expected", "dr_grpo"]),
        ({"algorithm__preset": ["grpo"]}, ["algorithm.preset = ['grpo']: expected"]),
        ({"algorithm__loss": "gsop"}, [*LOSSES, "or MODULE:FUNCTION"]),
        ({"algorithm__loss": "a b:c"}, ["algorithm.loss = 'a b:c': expected"]),
        ({"algorithm__advantage": "gae"}, [*ADVANTAGES, "or MODULE:FUNCTION"]),
        ({"algorithm__token_mask": [2.0, 0.5]}, ["algorithm.token_mask = [2.0, 0.5]", "[lowest"]),
        ({"algorithm__sequence_mask": [-1.0, 2.0]}, ["algorithm.sequence_mask = [-1.0, 2.0]"]),
        ({"algorithm__geometric_mask": [1.0]}, ["algorithm.geometric_mask = [1.0]: expected"]),
        ({"algorithm__dual_clip": 1.0}, ["algorithm.dual_clip = 1.0: expected greater than 1"]),
        (
            {"algorithm__proximal": "engine", "algorithm__correction": "token_tis"},
            [
                "algorithm.correction = token_tis",
                "algorithm.proximal = engine",
                "correction = none",
            ],
        ),
        (
            {"algorithm__minibatches": 33},
            ["algorithm.minibatches = 33", "rollout.prompts_per_step = 32"],
        ),
        (
            {"algorithm__reference": "teacher"},
            ["algorithm.reference = teacher with algorithm.kl_coefficient = 0"],
        ),
        (
            {"algorithm__reference_every": 5},
            ["algorithm.reference_every = 5 with algorithm.kl_coefficient = 0"],
        ),
        (
            {
                "algorithm__reference": "teacher",
                "algorithm__reference_every": 5,
                "algorithm__kl_coefficient": 0.1,
            },
            ["algorithm.reference_every = 5 with algorithm.reference = teacher", "leave out one"],
        ),
        ({"algorithm__preset": "distill"}, ["algorithm.advantage = none", "algorithm.reference"]),
    ],
)
def test_mistakes_are_told_with_the_way_out(tmp_path, changes, words):
    (line,) = problems(tmp_path, tree(**changes))
    assert all(word in line for word in words), line


def test_presets_contradict_nothing():
    for preset in PRESETS:
        content = with_preset(preset)
        assert contradictions(Config.model_validate(content)) == []


def test_functions_of_the_user_s_own_are_looked_for_before_a_run_starts():
    load_all(AlgorithmSection(loss="tests.test_objectives:twice_reinforce"))
    for key in ("loss", "advantage"):
        with pytest.raises(UserError, match=rf"algorithm\.{key} = nowhere:f: nowhere cannot be"):
            load_all(AlgorithmSection(**{key: "nowhere:f"}))
