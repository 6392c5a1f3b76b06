"""A reward is the scorer's number, or unknown: never a crash, never a silent zero."""

import math
import re

import numpy as np
import pytest
import reasoning_gym

from jaxrl import rewards
from jaxrl.config import Config
from jaxrl.rewards import exact, extract, make_reward, score
from jaxrl.types import Prompt, UserError


def make_config(kind="exact", pattern=None, task="chain_sum") -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test", "steps": 20},
            "model": {"path": "nowhere"},
            "data": {"source": "reasoning_gym", "task": task},
            "reward": {"kind": kind, "answer_pattern": pattern},
        }
    )


def prompt(answer="42", id=0) -> Prompt:
    return Prompt(id, "", (1,), {"answer": answer})


def with_scorer(monkeypatch, scorer):
    monkeypatch.setattr(rewards, "exact", scorer)
    return make_reward(make_config())


@pytest.mark.parametrize(
    ("pattern", "completion", "answer"),
    [
        (None, "  42\n", "42"),
        (r"\d+", "first 1, then 22, last 333.", "333"),
        (r"answer: (\d+)", "answer: 1. No, answer: 2. Done", "2"),
        (r"answer: (\d+)", "I do not know 7", ""),
        (r"<(a)>(\w+)", "<a>x", "a"),  # group 1, whatever else there is
        (r"<answer>(.*?)</answer>", "<answer> 5 </answer>", "5"),
        (r"answer:(\d+)?", "answer:", ""),  # a group that took no part
        (r"(?s)<answer>(.*?)</answer>", "<answer>1\n2</answer>", "1\n2"),
        (r"\d+", "", ""),
    ],
)
def test_the_answer_is_the_last_match(pattern, completion, answer):
    assert extract(completion, pattern and re.compile(pattern)) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("42", "42", 1.0),
        ("42", " 42\n", 1.0),
        ("42.0", "42", 0.0),
        ("", "42", 0.0),
        ("42", 42, 1.0),
    ],
)
def test_exact_is_one_for_the_reference_and_zero_for_all_else(answer, reference, expected):
    assert exact(answer, {"answer": reference}) == expected


def test_a_reward_judges_the_extracted_answer_against_its_own_prompt():
    reward = make_reward(make_config(pattern=r"= (\d+)"))
    assert reward(prompt("42"), "6 x 7 = 42.") == 1.0
    assert reward(prompt("41"), "6 x 7 = 42.") == 0.0
    assert reward(prompt("42"), "42") == 0.0


def test_a_verifier_that_fails_makes_the_reward_unknown_and_is_logged(monkeypatch, caplog):
    def fails(answer, task):
        raise RuntimeError("no judge today")

    assert math.isnan(with_scorer(monkeypatch, fails)(prompt(id=17), "42"))
    assert "prompt 17" in caplog.text and "no judge today" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "high", [1, 2]])
def test_a_verifier_that_gives_no_finite_number_makes_the_reward_unknown(value, monkeypatch):
    assert math.isnan(with_scorer(monkeypatch, lambda answer, task: value)(prompt(), "42"))


@pytest.mark.parametrize("value", [True, np.float32(0.25), -3, "0.5"])
def test_whatever_is_a_number_is_a_reward(value, monkeypatch):
    assert with_scorer(monkeypatch, lambda answer, task: value)(prompt(), "") == float(value)


def test_interrupting_a_verifier_interrupts_the_run(monkeypatch):
    def interrupted(answer, task):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_scorer(monkeypatch, interrupted)(prompt(), "42")


def test_scores_stand_by_prompt_and_completion(monkeypatch):
    def length(answer, task):
        if answer == "bad":
            raise ValueError
        return len(answer) + 10 * int(task["answer"])

    reward = with_scorer(monkeypatch, length)
    texts = [["a", "bb", ""], ["ccc", "bad", "d"], ["e"]]
    rewards_PG = score(reward, [prompt("1"), prompt("2"), prompt("3")], texts, 3)
    assert rewards_PG.dtype == np.float32
    nan = math.nan  # unknown, as are those that stragglers leave
    np.testing.assert_array_equal(rewards_PG, [[11, 12, 10], [23, nan, 21], [31, nan, nan]])


def test_the_task_s_own_scorer_is_used():
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    asked = Prompt(0, entry["question"], (1,), entry)
    reward = make_reward(make_config("task", r"-?\d+"))
    right = int(entry["answer"])
    assert reward(asked, f"I get {right}") == 1.0
    assert reward(asked, f"I get {right + 1}") < 0.5
    assert reward(asked, "") == 0.0
    judge = reasoning_gym.get_score_answer_fn("chain_sum")
    for text in (f"{right}.0", f"{right} apples"):
        assert make_reward(make_config("task"))(asked, text) == judge(text, entry)


def test_a_task_without_a_scorer_is_an_error_that_names_it():
    with pytest.raises(UserError, match="no_such_task"):
        make_reward(make_config("task", task="no_such_task"))


def test_a_pattern_that_is_not_a_regular_expression_is_an_error():
    with pytest.raises(UserError, match=r"reward\.answer_pattern: not a regular expression"):
        make_reward(make_config(pattern="(unclosed"))
