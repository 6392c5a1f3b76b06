"""A reward is the scorer's number, or unknown: never a crash, never a silent zero."""

import math
import re

import numpy as np
import pytest
import reasoning_gym

from jaxrl import rewards
from jaxrl.config import Config
from jaxrl.rewards import describe_each, exact, extract, make_reward, score, total, with_overlong
from jaxrl.types import Prompt, UserError


def make_config(kind="exact", pattern=None, task="chain_sum", **reward) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test", "steps": 20},
            "model": {"path": "nowhere"},
            "data": {"source": "reasoning_gym", "task": task},
            "reward": {"kind": kind, "answer_pattern": pattern, **reward},
            "rollout": {"max_new_tokens": 10},
        }
    )


def prompt(answer="42", id=0) -> Prompt:
    return Prompt(id, "", (1,), {"answer": answer})


def with_scorer(monkeypatch, scorer):
    monkeypatch.setattr(rewards, "exact", scorer)
    return make_reward(make_config())


def worth(reward, prompt, completion) -> float:
    (value,) = reward(prompt, completion)
    return float(value)


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
    assert worth(reward, prompt("42"), "6 x 7 = 42.") == 1.0
    assert worth(reward, prompt("41"), "6 x 7 = 42.") == 0.0
    assert worth(reward, prompt("42"), "42") == 0.0


def test_a_verifier_that_fails_makes_the_reward_unknown_and_is_logged(monkeypatch, caplog):
    def fails(answer, task):
        raise RuntimeError("no judge today")

    assert math.isnan(worth(with_scorer(monkeypatch, fails), prompt(id=17), "42"))
    assert "exact failed on prompt 17" in caplog.text and "no judge today" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "high", [1, 2]])
def test_a_verifier_that_gives_no_finite_number_makes_the_reward_unknown(value, monkeypatch):
    reward = with_scorer(monkeypatch, lambda answer, task: value)
    assert math.isnan(worth(reward, prompt(), "42"))


@pytest.mark.parametrize("value", [True, np.float32(0.25), -3, "0.5"])
def test_whatever_is_a_number_is_a_reward(value, monkeypatch):
    assert worth(with_scorer(monkeypatch, lambda *_: value), prompt(), "") == float(value)


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
    rewards_PGR = score(reward, [prompt("1"), prompt("2"), prompt("3")], texts, 3)
    assert rewards_PGR.dtype == np.float32 and rewards_PGR.shape == (3, 3, 1)
    nan = math.nan  # unknown, as are those that stragglers leave
    expected = [[11, 12, 10], [23, nan, 21], [31, nan, nan]]
    np.testing.assert_array_equal(rewards_PGR[:, :, 0], expected)


def test_the_task_s_own_scorer_is_used():
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    asked = Prompt(0, entry["question"], (1,), entry)
    reward = make_reward(make_config("task", r"-?\d+"))
    right = int(entry["answer"])
    assert worth(reward, asked, f"I get {right}") == 1.0
    assert worth(reward, asked, f"I get {right + 1}") < 0.5
    assert worth(reward, asked, "") == 0.0
    judge = reasoning_gym.get_score_answer_fn("chain_sum")
    for text in (f"{right}.0", f"{right} apples"):
        expected = np.float32(judge(text, entry))
        assert worth(make_reward(make_config("task")), asked, text) == expected


def test_a_task_without_a_scorer_is_an_error_that_names_it():
    with pytest.raises(UserError, match="no_such_task"):
        make_reward(make_config("task", task="no_such_task"))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"answer_pattern": "(unclosed"}, r"reward\.answer_pattern: not a regular expression"),
        ({"also": {"x": {"matches": "("}}}, r"also\.x\.matches: not a regular expression"),
        (
            {"also": {"x": {"function": "nowhere:f"}}},
            r"also\.x\.function = nowhere:f: .* cannot be",
        ),
        (
            {"also": {"x": {"function": f"{__name__}:worth_too_much"}}},
            r"it is called as worth_too_much\(prompt, completion, task\)",
        ),
    ],
)
def test_what_cannot_judge_is_an_error_that_names_its_key(reward, message):
    with pytest.raises(UserError, match=message):
        make_reward(make_config(**reward))


def worth_too_much(completion):
    raise AssertionError


def length_against_the_answer(prompt, completion, task):
    return {"long": 0.5, "?": 2.0}[prompt] * len(completion) / task["answer"]


ALSO = {
    "format": {"weight": -2.0, "matches": r"<\w+>$"},
    "length": {"weight": 0.0, "function": f"{__name__}:length_against_the_answer"},
}


def test_a_completion_has_a_reward_of_each_kind_and_is_worth_their_weighted_sum(caplog):
    reward = make_reward(make_config(pattern="4+", weight=3.0, also=ALSO))
    assert reward.names == ("exact", "format", "length")
    prompts = [Prompt(5, "long", (1,), {"answer": 4}), Prompt(6, "?", (1,), {"answer": 4})]
    prompts.append(Prompt(7, "!", (1,), {"answer": 4}))
    rewards_PGR = score(reward, prompts, [["4 <b>", "<b>44"], ["4"], ["4"]], 2)
    nan = math.nan
    np.testing.assert_array_equal(
        rewards_PGR,
        [
            [[1, 1, 0.625], [0, 0, 0.625]],
            [[1, 0, 0.5], [nan, nan, nan]],
            [[1, 0, nan], [nan, nan, nan]],
        ],
    )
    assert "length failed on prompt 7: KeyError('!')" in caplog.text
    totals_PG = total(rewards_PGR, reward.weights)
    assert totals_PG.dtype == np.float32
    np.testing.assert_array_equal(totals_PG, [[1, 0], [3, nan], [nan, nan]])
    means = {
        "reward/exact/mean": 0.75,
        "reward/format/mean": 0.25,
        "reward/length/mean": 1.75 / 3,
    }
    found = describe_each(reward.names, rewards_PGR, reward.weights)
    assert found == pytest.approx(means)


def test_the_penalty_of_a_long_completion_is_one_more_reward():
    c = make_config(overlong_tokens=4, overlong_penalty=0.5)
    lengths_PG = np.array([[0, 6, 7, 8], [9, 10, 11, 10]])
    rewards_PGR = np.ones((2, 4, 1), np.float32)
    rewards_PGR[1, 3] = math.nan
    shaped_PGR, weights_R = with_overlong(rewards_PGR, np.array([2.0]), lengths_PG, c)
    expected_PG = np.zeros((2, 4))
    for (p, g), length in np.ndenumerate(lengths_PG):  # eq. 13 of DAPO, its longest 10, its cache 4
        if 10 - 4 < length <= 10:
            expected_PG[p, g] = ((10 - 4) - length) / 4
        elif length > 10:
            expected_PG[p, g] = -1
    np.testing.assert_array_equal(shaped_PGR[:, :, 1], expected_PG)
    np.testing.assert_array_equal(shaped_PGR[:, :, :1], rewards_PGR)
    known_PG = np.isfinite(rewards_PGR[:, :, 0])
    np.testing.assert_allclose(
        total(shaped_PGR, weights_R)[known_PG], 2 + 0.5 * expected_PG[known_PG]
    )
    assert describe_each(("exact",), shaped_PGR, weights_R) == {
        "reward/exact/mean": 1.0,
        "reward/overlong_mean": pytest.approx(-0.5 * expected_PG[known_PG].mean()),
    }
    without = with_overlong(rewards_PGR, np.array([2.0]), lengths_PG, make_config())
    np.testing.assert_array_equal(without[0], rewards_PGR)
