"""Seeds follow the prompt, lag is counted from the oldest token, and engines have as much to do as
max_lag lets them: nothing older is trained, nothing is waited for without end, nothing is lost; and
what teaches nothing is not trained, while there is hope of something else."""

import heapq
import queue
import tempfile
from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import collect
from jaxrl.collect import Collector, lag, requests_for, seeds_for, slack
from jaxrl.config import Config
from jaxrl.ledger import Ledger, replay
from jaxrl.types import EnginesGone, Group, Judged, Prompt, Rollout, RunError, Sampling


def prompts(ids):
    return [Prompt(i, f"question {i % 3}", (1, 2), {}) for i in ids]


def group(*versions: list[int]) -> Group:
    rollouts = tuple(
        Rollout(np.zeros(len(v), np.int32), np.zeros(len(v), np.float32), np.array(v), "length", i)
        for i, v in enumerate(versions)
    )
    return Group(prompts([0])[0], rollouts)


def test_a_prompt_has_the_same_seed_in_whatever_batch_it_is():
    together = dict(zip(range(8), seeds_for(5, prompts(range(8))), strict=True))
    assert seeds_for(5, prompts([6, 2])) == [together[6], together[2]]


def test_seeds_are_those_of_every_earlier_release():
    """A resumed run must draw what the interrupted one would have drawn: the recipe is pinned."""
    expected = [
        int(np.random.SeedSequence([7, i]).generate_state(1, np.uint32)[0]) // 2 for i in range(5)
    ]
    assert seeds_for(7, prompts(range(5))) == expected


def test_seeds_differ_between_prompts_of_the_same_text_and_between_runs():
    seeds = [seed for run in range(4) for seed in seeds_for(run, prompts(range(500)))]
    assert len(set(seeds)) == len(seeds)


def test_seeds_leave_room_for_the_completions_of_a_group_in_32_bits():
    assert all(0 <= seed < 2**31 for seed in seeds_for(2**31 - 1, prompts(range(500))))


def test_lag_is_that_of_the_oldest_token():
    assert lag([group([4, 4], [4])], 4) == 0
    assert lag([group([4, 4], [4]), group([4], [3, 4])], 4) == 1
    assert lag([group([2, 3, 4])], 5) == 3
    assert lag([group([], [4])], 5) == 1 and lag([group([], [])], 5) == 0


def test_a_token_from_the_future_is_an_error_that_names_its_version():
    with pytest.raises(ValueError, match=r"version 6\b.* newer than 5"):
        lag([group([5, 5]), group([5, 6])], 5)


# --- the rule ---


def all_in_time(deadlines: list[int], trained: int, per_step: int) -> bool:
    """By trying: the most urgent first, so many at each version."""
    return all(trained + i // per_step <= end for i, end in enumerate(sorted(deadlines)))


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 4), st.integers(1, 3), st.data())
def test_slack_is_how_many_more_can_be_trained_in_time(deadlines, trained, per_step, data):
    new = data.draw(st.integers(0, 7))
    found = slack(Counter(deadlines), trained, per_step, since=new)
    fits = [n for n in range(40) if all_in_time([*deadlines, *[new] * n], trained, per_step)]
    if fits:
        assert found == max(fits)
    else:
        everything = slack(Counter(deadlines), trained, per_step, since=min([new, *deadlines]))
        fewest = next(k for k in range(13) if all_in_time(sorted(deadlines)[k:], trained, per_step))
        assert fewest == 0 or everything == -fewest


# --- against a fleet in a time of its own ---

STEPS, PER_STEP, N = 7, 3, 2


class Fleet:
    """Engines, and the queue that a collector hears of them by: time passes where it waits."""

    def __init__(self, draw, slots: int):
        self.draw, self.slots = draw, slots
        self.now, self.events, self.ended, self.order = 0, [], deque(), 0
        self.version, self.known, self.next = 0, 0, 1
        self.waiting, self.asked = deque(), {}
        self.on_wait = lambda: None

    def at(self, delay, action):
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, action))

    def put(self, future):
        self.ended.append(future)

    def get(self, timeout=None):
        if not self.ended:
            self.on_wait()
        while not self.ended:
            assert self.events, "the collector waits for nothing"
            self.now, _, action = heapq.heappop(self.events)
            action()
        return self.ended.popleft()

    def empty(self):
        return not self.ended

    def timer(self, delay, action=lambda: None) -> Future:
        future = Future()
        self.at(delay, lambda: (action(), future.set_result(None)))
        return future

    def submit(self, requests, urgent=False):
        futures = [Future() for _ in requests]
        for request, future in zip(requests, futures, strict=True):
            self.asked[request.prompt.id] = (self.known, future)
            self.waiting.append((request, future))
        self.start()
        return futures

    def start(self):
        while self.slots and self.waiting:
            request, future = self.waiting.popleft()
            if not future.cancelled():
                self.slots -= 1
                begun = self.version
                self.at(self.draw(1, 30), lambda r=request, f=future, b=begun: self.end(r, f, b))

    def end(self, request, future, begun):
        self.slots += 1
        if not future.cancelled():
            versions = np.linspace(begun, self.version, 4).astype(np.int64)
            rollout = Rollout(np.zeros(4, np.int32), np.zeros(4, np.float32), versions, "stop", 0)
            future.set_result(Group(request.prompt, (rollout,) * request.sampling.n))
        self.start()

    def publish(self, version) -> Future:
        """Engines sample with it some time before the trainer knows."""

        def loaded():
            self.version = version

        def acknowledged():
            self.known = version

        self.at(self.draw(0, 10), loaded)
        return self.timer(self.draw(10, 20), acknowledged)


class Stream:
    """Every third id is of a prompt that is held out."""

    def __init__(self, cursor=0):
        self.cursor, self.rewards = cursor, {}

    def at(self, index):
        return Prompt(index, f"{index}", (1, 2), {})

    def take(self, count):
        ids = []
        while len(ids) < count:
            ids += [self.cursor] if self.cursor % 3 else []
            self.cursor += 1
        return [self.at(i) for i in ids]

    def measured(self, index, reward):
        self.rewards[index] = reward


def judging(rewards_of):
    """rewards_of(prompt id) -> [N]"""

    def judge(group: Group) -> Judged:
        rewards_G = np.array(rewards_of(group.prompt.id), np.float32)
        return Judged(group, [""] * N, rewards_G[:, None], rewards_G)

    return judge


def all_differ(_) -> list[float]:
    return [1.0, 0.0]


def config(**rollout) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "x", "steps": STEPS},
            "model": {"path": "x"},
            "data": {"source": "reasoning_gym", "task": "x"},
            "rollout": {"prompts_per_step": PER_STEP, "group_size": N, **rollout},
        }
    )


def loop(fleet: Fleet, c: Config, path: Path, rewards_of) -> list[list[Group]]:
    """The loop of a trainer with everything left out that is not about versions and rewards."""
    continuous, trained = c.rollout.mode == "continuous", []
    ledger = Ledger(path)
    sampling = Sampling(N, 4, 1.0, ())
    judge, said = judging(rewards_of), []
    collector = Collector(fleet, Stream(), ledger, sampling, judge, c, 1, STEPS, said.append)
    most, full_steps, dropped = c.rollout.max_resample * PER_STEP, 0, 0

    def outstanding():
        """Deadlines, as the versions of finished groups or those at the time of asking say it."""
        return [
            (int(f.result().rollouts[0].versions.min()) if f.done() else asked) + c.max_lag
            for i, (asked, f) in fleet.asked.items()
            if i in ledger.outstanding and not f.cancelled()
        ]

    def check():
        there = outstanding()
        if c.rollout.too_old == "wait":
            assert all_in_time(there, fleet.next, PER_STEP)
        left = (STEPS - len(trained)) * PER_STEP
        more = all_in_time([*there, fleet.known + c.max_lag], fleet.next, PER_STEP)
        most = left if continuous else min(left, PER_STEP)
        assert len(there) >= most or not more, "the engines could have more to do"

    taken: set[int] = set()
    publishing = fleet.publish(1)
    collector.until(publishing)
    fleet.on_wait = check
    collector.serve(1, publishing)
    for version in range(1, STEPS + 1):
        groups = [judged.group for judged in collector.take(version)]
        assert len(groups) == PER_STEP and not taken & {group.prompt.id for group in groups}
        taken |= {group.prompt.id for group in groups}
        if c.rollout.resample_equal:
            step = collector.metrics()
            equal = sum(len(set(rewards_of(group.prompt.id))) == 1 for group in groups)
            assert step["rollout/taken_equal"] == equal
            assert step["rollout/dropped_equal"] <= most
            assert not equal or step["rollout/dropped_equal"] == most
            dropped, full_steps = dropped + step["rollout/dropped_equal"], full_steps + (equal > 0)
        assert lag(groups, version) <= c.max_lag
        trained.append(groups)
        fleet.next = version + 1
        ledger.train(version, version, groups)
        collector.check()
        assert version == STEPS or all_in_time(outstanding(), version + 1, PER_STEP)
        collector.until(fleet.timer(fleet.draw(1, 40)))
        if continuous:
            collector.until(publishing)
        else:
            collector.finish()
        publishing = fleet.publish(version + 1)
        if not continuous:
            collector.until(publishing)
        if version < STEPS:
            collector.serve(version + 1, publishing)
    assert len(said) == 1 if full_steps else len(said) <= 1
    assert ledger.dropped["equal_rewards"] == dropped * N
    return trained


MODES = st.one_of(
    st.just({"mode": "synchronous"}),
    st.just({"mode": "overlap"}),
    st.fixed_dictionaries(
        {
            "mode": st.just("continuous"),
            "max_lag": st.integers(1, 4),
            "too_old": st.sampled_from(["wait", "drop", "resample"]),
        }
    ),
)


RESAMPLING = st.one_of(  # the share of groups with equal rewards, and what is done about them
    st.just((0.5, {})),
    st.just((0.4, {"resample_equal": True})),
    st.tuples(
        st.sampled_from([0.8, 1.0]),
        st.fixed_dictionaries({"resample_equal": st.just(True), "max_resample": st.integers(1, 3)}),
    ),
)


@settings(deadline=None)
@given(st.randoms(use_true_random=False), MODES, st.integers(1, 10), RESAMPLING)
def test_nothing_is_too_old_lost_or_waited_for_in_vain(random, mode, slots, resampling):
    equal, resampling = resampling
    alike = np.random.default_rng(random.randint(0, 999)).random(200 * STEPS) < equal

    def rewards_of(prompt):
        return [float(prompt % 2)] * N if alike[prompt] else [0.0, 1.0]

    c, fleet = config(**mode, **resampling), Fleet(random.randint, slots)
    events = SimpleNamespace(SimpleQueue=lambda: fleet, Empty=queue.Empty)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(collect, "queue", events):
        path = Path(folder) / "ledger.jsonl"
        trained = loop(fleet, c, path, rewards_of)
        book = replay(path)
    assert book.trained == STEPS * PER_STEP * N
    ids = sorted(group.prompt.id for groups in trained for group in groups)
    if c.rollout.too_old == "wait":
        assert not book.outstanding
        if not resampling or not any(alike[ids]):
            hoped = [i for i in range(len(alike)) if i % 3 and not (resampling and alike[i])]
            assert ids == hoped[: len(ids)]
    if c.rollout.too_old != "drop":
        assert book.dropped["too_old"] == 0
    if not resampling:
        assert book.dropped["equal_rewards"] == 0
    if c.rollout.mode != "continuous":  # step by step, each of one version
        assert ids == [group.prompt.id for groups in trained for group in groups]
        lags = [
            {int(v - g.rollouts[0].versions.min()) for g in gs} for v, gs in enumerate(trained, 1)
        ]
        assert lags == [{0}] + [{c.max_lag}] * (STEPS - 1)
        assert all(np.ptp(g.rollouts[0].versions) == 0 for gs in trained for g in gs)


# --- engines that break their promises ---


class Hand:
    """Engines whose groups end when the test says so."""

    def __init__(self):
        self.requests, self.urgent = {}, []

    def submit(self, requests, urgent=False):
        futures = [Future() for _ in requests]
        self.requests |= {r.prompt.id: (r, f) for r, f in zip(requests, futures, strict=True)}
        self.urgent += [r.prompt.id for r in requests if urgent]
        return futures

    def end(self, prompt, version, rollouts=N):
        request, future = self.requests[prompt]
        rollout = group([version]).rollouts[0]
        future.set_result(Group(request.prompt, (rollout,) * rollouts))


def served() -> Future:
    future = Future()
    future.set_result(None)
    return future


def collector(
    folder,
    engines,
    version=1,
    ledger=None,
    steps=STEPS,
    rewards_of=all_differ,
    warn=print,
    **rollout,
) -> Collector:
    ledger = ledger or Ledger(folder / "ledger.jsonl")
    sampling, stream = Sampling(N, 4, 1.0, ()), Stream(ledger.cursor)
    c, judge = config(**rollout), judging(rewards_of)
    made = Collector(engines, stream, ledger, sampling, judge, c, version, steps, warn)
    made.serve(version, served())
    return made


def taken(made: Collector, version: int) -> list[int]:
    return [judged.group.prompt.id for judged in made.take(version)]


def test_tokens_older_than_asked_for_are_not_trained_on(tmp_path):
    engines = Hand()
    made = collector(tmp_path, engines, version=3)
    for prompt in list(engines.requests):
        engines.end(prompt, 3 if prompt < 4 else 2)
    with pytest.raises(RunError, match=r"1 weight versions ago.*max_lag = 0"):
        made.take(3)


def test_what_must_be_trained_soonest_is_taken_first(tmp_path):
    engines = Hand()
    made = collector(tmp_path, engines, version=3, mode="continuous", max_lag=2)
    for prompt in list(engines.requests):
        engines.end(prompt, 1 if prompt in (5, 8, 13) else 3)
    assert taken(made, 3) == [5, 8, 13]


def test_too_old_groups_make_room_for_others_or_are_sampled_again(tmp_path):
    for too_old in ("drop", "resample"):
        engines = Hand()
        folder = tmp_path / too_old
        folder.mkdir()
        made = collector(folder, engines, 3, mode="continuous", too_old=too_old)
        assert list(engines.requests) == [1, 2, 4, 5, 7, 8]
        first = engines.requests[1]
        for prompt in (1, 2, 4, 5):
            engines.end(prompt, 1 if prompt == 1 else 3)  # it promised 3, and 2 would do
        assert taken(made, 3) == [2, 4, 5]
        again = engines.requests[1]
        assert (again[1] is not first[1]) == (too_old == "resample") and again[0] == first[0]
        dropped = replay(folder / "ledger.jsonl").dropped["too_old"]
        assert dropped == (N if too_old == "drop" else 0)


def test_a_group_that_is_late_is_cancelled_at_its_engine(tmp_path):
    engines = Hand()
    made = collector(tmp_path, engines, 3, mode="continuous", too_old="drop")
    for prompt in (4, 5, 7):
        engines.end(prompt, 3)
    made.take(3)
    made.serve(4, served())
    for prompt in list(engines.requests)[6:]:
        engines.end(prompt, 4)
    assert taken(made, 4) == [10, 11, 13]
    assert [engines.requests[i][1].cancelled() for i in (1, 2, 8)] == [True] * 3


def test_a_wait_has_a_deadline_and_says_for_what_it_waited(tmp_path):
    made = collector(tmp_path, Hand(), timeout_s=0.05)
    with pytest.raises(
        RunError,
        match=r"0\.1 s \(twice rollout\.timeout_s\) while 3 are under way, prompts 1, 2, 4",
    ):
        made.take(1)


def test_what_engines_raise_ends_the_wait(tmp_path):
    engines = Hand()
    made = collector(tmp_path, engines)
    engines.requests[2][1].set_exception(EnginesGone("nobody is left"))
    with pytest.raises(EnginesGone, match="nobody"):
        made.take(1)


def test_a_publish_that_fails_ends_the_wait(tmp_path):
    made = collector(tmp_path, Hand(), mode="continuous")
    failed = Future()
    made.serve(2, failed)
    failed.set_exception(RunError("no engine serves it"))
    with pytest.raises(RunError, match="no engine serves it"):
        made.take(1)


def test_a_version_that_was_waited_for_serves_before_the_next_is_on_its_way(tmp_path):
    engines, published = Hand(), Future()
    made = collector(tmp_path, engines, mode="continuous")
    for prompt in (1, 2, 4):
        engines.end(prompt, 1)
    made.take(1)
    made.serve(2, published)
    assert list(engines.requests) == [1, 2, 4, 5, 7, 8]
    published.set_result(None)
    made.until(published)
    assert list(engines.requests) == [1, 2, 4, 5, 7, 8, 10, 11, 13]


def test_groups_with_nothing_to_compare_are_dropped_and_others_asked_for(tmp_path):
    """What is not known does not differ."""
    engines, nan = Hand(), float("nan")
    submit = engines.submit

    def at_once(requests, urgent=False):
        futures = submit(requests, urgent)
        for request in requests:
            engines.end(request.prompt.id, 1)
        return futures

    engines.submit = at_once
    rewards = {1: [1, 1 - 1e-7], 2: [0, nan], 4: [0, 1], 5: [nan, nan], 7: [0.5, 0.5], 8: [3, 2]}
    made = collector(
        tmp_path, engines, rewards_of=lambda i: rewards.get(i, [0, 1]), resample_equal=True
    )
    judged = made.take(1)
    assert [j.group.prompt.id for j in judged] == [4, 8, 10]
    assert list(engines.requests) == [1, 2, 4, 5, 7, 8, 10]
    np.testing.assert_array_equal(np.stack([j.rewards_G for j in judged]), [[0, 1], [3, 2], [0, 1]])
    found = made.metrics()
    names = ("dropped_equal", "dropped_all_0", "dropped_all_1", "taken_equal")
    assert [found[f"rollout/{name}"] for name in names] == [4, 1, 1, 0]
    assert found["time/reward_s"] > 0
    assert replay(tmp_path / "ledger.jsonl").dropped["equal_rewards"] == 4 * N
    assert made._stream.rewards == pytest.approx(
        {1: 1, 2: 0, 4: 0.5, 5: nan, 7: 0.5, 8: 2.5, 10: 0.5}, nan_ok=True
    )


@pytest.mark.parametrize("engine, asked", [("vllm", [1, 2, 4, 5]), ("inprocess", [1, 2, 4])])
def test_only_an_engine_that_samples_in_batches_ends_one_before_the_next(tmp_path, engine, asked):
    engines, judged = Hand(), Future()

    def rewards_of(_):
        judged.set_result(None)
        return [1, 1]

    made = collector(tmp_path, engines, rewards_of=rewards_of, resample_equal=True, engine=engine)
    engines.end(1, 1)
    made.until(judged)
    assert list(engines.requests) == asked


def test_what_is_asked_beside_training_is_urgent_and_no_part_of_it(tmp_path):
    engines = Hand()
    made = collector(tmp_path, engines)
    held_out = requests_for(0, prompts([100, 101]), Sampling(1, 4, 0.0, ()))
    submit = engines.submit

    def at_once(requests, urgent=False):
        futures = submit(requests, urgent)
        for request in requests:
            engines.end(request.prompt.id, 1, 1)
        return futures

    engines.submit = at_once
    assert [group.prompt.id for group in made.ask(held_out)] == [100, 101]
    assert engines.urgent == [100, 101] and made.metrics()["rollout/in_flight"] == PER_STEP
    made.check()


def test_a_resumed_run_asks_again_for_what_was_in_flight_with_the_same_seeds(tmp_path):
    engines, ledger = Hand(), Ledger(tmp_path / "ledger.jsonl")
    made = collector(tmp_path, engines, 1, ledger, mode="continuous")
    for prompt in (2, 4, 7):
        engines.end(prompt, 1)
    ledger.train(1, 1, [judged.group for judged in made.take(1)])
    resumed, book = Hand(), Ledger(tmp_path / "ledger.jsonl", ledger.saved(), step=1)
    collector(tmp_path, resumed, 5, book, STEPS - 1, mode="continuous").check()
    assert list(resumed.requests) == [1, 5, 8, 10, 11, 13]
    for prompt in (1, 5, 8):
        assert resumed.requests[prompt][0] == engines.requests[prompt][0]
