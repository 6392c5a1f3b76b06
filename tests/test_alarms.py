"""An alarm is one line when a threshold is crossed, and none while it stays so."""

import pytest

from jaxrl.alarms import Alarms
from jaxrl.config import AlarmSection

CALM = {
    "mismatch/k3": 1e-4,
    "mismatch/ess": 0.99,
    "entropy": 2.0,
    "grad_norm": 0.5,
    "reward/unknown": 0.0,
    "update/nonfinite": 0.0,
    "host/disk_free_bytes": 2**31,
}
LOUD = [
    ("mismatch_k3", {"mismatch/k3": 0.02}, "mismatch/k3 = 0.02 nats, more than alarm.mismatch_k3"),
    ("ess", {"mismatch/ess": 0.4}, "mismatch/ess = 0.40, less than alarm.ess = 0.5"),
    ("entropy", {"entropy": 0.19}, "less than alarm.entropy = 0.1 of the first step's 2"),
    ("grad_norm", {"grad_norm": 5.1}, "more than alarm.grad_norm = 10 times its median of 0.5"),
    ("disk_free_gib", {"host/disk_free_bytes": 1e9}, "0.9 GiB are free on the disk of run.dir"),
    ("unknown_rewards", {"reward/unknown": 4.0}, "6% of the rewards are unknown"),
    (
        "nonfinite_updates",
        {"update/nonfinite": 1.0, "loss": float("nan"), "grad_norm": float("nan")},
        "update/nonfinite = 1, more than alarm.nonfinite_updates = 0: updates without effect; "
        "loss = nan and grad_norm = nan in this step",
    ),
]


def after(steps: int, **settings) -> Alarms:
    alarms = Alarms(AlarmSection(**settings))
    for _ in range(steps):
        assert alarms.heard(CALM, 64) == []
    return alarms


@pytest.mark.parametrize(("key", "change", "words"), LOUD)
def test_a_line_when_it_begins_and_another_when_it_begins_again(key, change, words):
    alarms = after(10)
    (line,) = alarms.heard(CALM | change, 64)
    assert words in line
    assert alarms.heard(CALM | change, 64) == []
    assert alarms.heard(CALM, 64) == []
    assert alarms.heard(CALM | change, 64) == [line]


def lines_of_k3(alarms: Alarms, *values: float) -> list[int]:
    """How many lines each step has, of steps with these mismatch/k3."""
    return [len(alarms.heard(CALM | {"mismatch/k3": value}, 64)) for value in values]


def test_a_mismatch_that_grows_in_three_steps_is_said_before_it_is_large():
    alarms = after(5, mismatch_growth=2.0)
    assert lines_of_k3(alarms, 0.0021, 0.0043, 0.0087, 0.0088, 0.0021) == [0, 0, 1, 0, 0]
    assert lines_of_k3(alarms, 0.0043, float("nan"), 0.0045, 0.0095) == [0, 0, 0, 0]
    for quiet in ((0.0019, 0.0043, 0.0087), (0.0021, 0.0041, 0.0087), (1e-5, 1e-4, 9e-4)):
        assert lines_of_k3(after(5, mismatch_growth=2.0), *quiet) == [0, 0, 0]
    assert lines_of_k3(after(5, mismatch_growth=None), 0.0021, 0.0043, 0.0087) == [0, 0, 0]


@pytest.mark.parametrize(("key", "change", "words"), LOUD)
def test_null_is_never_passed(key, change, words):
    assert after(10, **{key: None}).heard(CALM | change, 64) == []


def test_below_their_thresholds_all_are_silent():
    just = {
        "mismatch/k3": 0.01,
        "mismatch/ess": 0.5,
        "entropy": 0.2,
        "grad_norm": 5.0,
        "reward/unknown": 3.2,
        "update/nonfinite": 0.0,
    }
    assert after(10).heard(just, 64) == []


def test_a_gradient_is_held_against_a_median_of_some_steps():
    assert after(9).heard(CALM | {"grad_norm": 100.0}, 64) == []


def test_several_at_once_and_what_is_not_a_number():
    alarms = after(10)
    assert alarms.heard(dict.fromkeys(CALM, float("nan")), 64) == []
    assert alarms.heard({}, 64) == []
    loud = {name: value for _, change, _ in reversed(LOUD) for name, value in change.items()}
    assert len(alarms.heard(CALM | loud, 64)) == len(LOUD)
