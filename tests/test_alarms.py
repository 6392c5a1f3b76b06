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
}
LOUD = [
    ("mismatch_k3", {"mismatch/k3": 0.02}, "mismatch/k3 = 0.02 nats, more than alarm.mismatch_k3"),
    ("ess", {"mismatch/ess": 0.4}, "mismatch/ess = 0.40, less than alarm.ess = 0.5"),
    ("entropy", {"entropy": 0.19}, "less than alarm.entropy = 0.1 of the first step's 2"),
    ("grad_norm", {"grad_norm": 5.1}, "more than alarm.grad_norm = 10 times its median of 0.5"),
    ("unknown_rewards", {"reward/unknown": 4.0}, "6% of the rewards are unknown"),
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
    }
    assert after(10).heard(just, 64) == []


def test_a_gradient_is_held_against_a_median_of_some_steps():
    assert after(9).heard(CALM | {"grad_norm": 100.0}, 64) == []


def test_several_at_once_and_what_is_not_a_number():
    alarms = after(10)
    assert alarms.heard(dict.fromkeys(CALM, float("nan")), 64) == []
    assert alarms.heard({}, 64) == []
    loud = CALM | {name: value for _, change, _ in LOUD for name, value in change.items()}
    assert len(alarms.heard(loud, 64)) == len(LOUD)
