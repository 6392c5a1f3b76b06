"""What the loop does in which order, with stand-ins that write down when they are used."""

import itertools
import json
import random
import signal
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import Config
from jaxrl.interrupt import Interrupt
from jaxrl.ledger import Ledger, replay
from jaxrl.rewards import Reward
from jaxrl.train import Parts, run
from jaxrl.types import EnginesGone, Group, Prompt, PublishReport, Rollout, RunError, Sampling

STEPS = 4
PROMPTS, GROUP = 3, 2
LONG_S = 30.0  # by then whatever a test waits for has happened, or never will


class Killed(BaseException):
    pass


class Run:
    """Stand-ins for every part. `skipped` is what the updates report; `interrupt_at` a step's log;
    `version_drawn` how much older than promised tokens are; `held`: groups end when the engines
    are let go, and not at once."""

    def __init__(self, skipped: int = 0, interrupt_at: int | None = None, version_drawn: int = 0):
        self.events: list[tuple] = []
        self.cursor = 0
        self.version, self.drawn_before = 0, version_drawn
        self.skipped, self.interrupt_at = skipped, interrupt_at
        self.interrupt = Interrupt()
        self.saved: dict | None = None
        self.published = self.publish
        self.left_behind = lambda prompt: 0
        self.held: list | None = None
        self.held_out: list[Prompt] = []
        self.logged: list[dict] = []
        # The second is not the main reward, which evaluation looks at alone.
        judges = (lambda prompt, _: float(prompt.id % 2), lambda *_: 1.0)
        self.reward = Reward(("odd", "one"), np.array([1.0, 1.0]), judges)

    # the stream

    def at(self, index: int) -> Prompt:
        return Prompt(index, "?", (5, 6), {})

    def take(self, count: int) -> list[Prompt]:
        self.cursor += count
        return [self.at(i) for i in range(self.cursor - count, self.cursor)]

    def measured(self, index: int, reward: float) -> None:
        pass

    def metrics(self) -> dict[str, int]:
        return {"data/skipped_too_long": 0}

    # the engines

    def submit(self, requests, urgent=False):
        self.events.append(("begin", requests[0].prompt.id // PROMPTS + 1, self.version))
        futures = []
        for request in requests:
            versions = np.full(2, self.version - self.drawn_before)
            logprobs = np.array([-1.0, -1.0], np.float32)
            n = request.sampling.n - self.left_behind(request.prompt.id)
            rollouts = [
                Rollout(np.array([7, i], np.int32), logprobs, versions, "length", 0)
                for i in range(n)
            ]
            futures.append((Future(), Group(request.prompt, tuple(rollouts))))
        if self.held is None:
            self.end(futures)
        else:
            self.held.append(futures)
        return [future for future, _ in futures]

    def end(self, futures):
        for future, group in futures:
            future.set_result(group)

    def status(self) -> dict[str, float]:
        return {"fleet/ready": 1.0}

    # the bridge

    def next_version(self) -> int:
        return self.version + 1

    def publish(self, params, version: int):
        self.version = version
        self.events.append(("publish", version))
        return lambda: PublishReport(version, "", 0, 0.0, 1, 0.0)

    # the trainer

    def update(self, state, batches):
        assert [int(batch.group_BT.max(axis=1).sum()) for batch in batches] == [1, 2]
        step = int(state.step) + 1
        self.events.append(("update", step))
        state = SimpleNamespace(
            params=jnp.full(2, step), step=step, skipped_in_a_row=jnp.asarray(self.skipped)
        )
        return state, {"loss": jnp.asarray(float(step))}

    def log_step(self, step: int, metrics: dict) -> None:
        self.events.append(("log", step))
        self.logged.append(metrics)
        if step:
            assert metrics["loss"] == step
            assert all(isinstance(value, int | float) for value in metrics.values())
        if step == self.interrupt_at:
            self.interrupt.signal = 15

    def save(self, step: int, state, version: int, ledger) -> None:
        assert state.step == step
        self.events.append(("save", step))
        self.saved = json.loads(json.dumps({"step": step, "version": version, "ledger": ledger}))

    def go(
        self,
        folder,
        steps: int = STEPS,
        save_every: int = 1,
        resume: dict | None = None,
        evaluate: dict | None = None,
        sections: dict | None = None,
        **rollout,
    ) -> list[tuple]:
        config = Config.model_validate(
            {
                "run": {"name": "x", "dir": str(folder), "steps": steps},
                "model": {"path": "x"},
                "data": {"source": "reasoning_gym", "task": "x"},
                "rollout": {"prompts_per_step": PROMPTS, "group_size": GROUP, **rollout},
                "algorithm": {"minibatches": 2},
                "optimizer": {"max_skipped_updates": 2},
                "eval": {"every_steps": 0} | (evaluate or {}),
                "checkpoint": {"every_steps": save_every},
                **(sections or {}),
            }
        )
        resume = resume or {"step": 0, "version": 0, "ledger": None}
        ledger = Ledger(folder / "ledger.jsonl", resume["ledger"], resume["step"])
        self.cursor, self.version = ledger.cursor, max(self.version, resume["version"])
        parts = Parts(
            config=config,
            key_cost=0.0,
            stream=self,
            held_out=self.held_out,
            tokenizer=SimpleNamespace(decode=str),
            reward=self.reward,
            engines=self,
            publish=lambda params, version: self.published(params, version),
            next_version=self.next_version,
            update=self.update,
            ledger=ledger,
            save=self.save,
            log=SimpleNamespace(step=self.log_step, samples=lambda *_: None),
            stop_tokens=(1,),
        )
        first = resume["step"]
        start = SimpleNamespace(params=jnp.zeros(2), step=first, skipped_in_a_row=jnp.asarray(0))
        self.ended = run(parts, start, first, self.interrupt)[1]
        return self.events


def test_a_step_is_reported_and_saved_while_the_engines_sample_the_next(tmp_path):
    expected = [("publish", 1), ("log", 0), ("begin", 1, 1)]
    for step in range(1, STEPS + 1):
        expected += [("update", step), ("publish", step + 1)]
        if step < STEPS:
            expected.append(("begin", step + 1, step + 1))
        expected += [("log", step), ("save", step)]
    stand_ins = Run()
    assert stand_ins.go(tmp_path) == expected
    for step, metrics in enumerate(stand_ins.logged[1:], 1):
        assert (metrics["data/cursor"], metrics["lag/max"]) == (step * PROMPTS, 0)
        assert metrics["ledger/trained"] == step * PROMPTS * GROUP and metrics["fleet/ready"] == 1
        odd = sum(i % 2 for i in range((step - 1) * PROMPTS, step * PROMPTS))
        assert metrics["reward/pass_at_k"] == pytest.approx(odd / PROMPTS)


def test_a_signal_while_the_engines_sample_lets_that_step_end(tmp_path):
    stand_ins = Run(interrupt_at=2)
    events = stand_ins.go(tmp_path, save_every=100)
    assert [event for event in events if event[0] in ("log", "save")][1:] == [
        ("log", 1),
        ("log", 2),
        ("log", 3),
        ("save", 3),
    ]
    assert events[-4:] == [("update", 3), ("publish", 4), ("log", 3), ("save", 3)]
    assert stand_ins.ended == 3


@pytest.mark.parametrize("version, updates", [(1, 0), (2, 1)])
def test_until_the_first_step_begins_a_signal_ends_at_once(tmp_path, version, updates):
    """It comes with the publish of this version: the first is ahead of all steps, the second is a
    part of the first step."""
    stand_ins = Run()
    stand_ins.interrupt = Interrupt(starting=True)

    def publish(params, number):
        if number == version:
            signal.raise_signal(signal.SIGTERM)
        return stand_ins.publish(params, number)

    stand_ins.published = publish
    with stand_ins.interrupt.listening():
        if updates:
            stand_ins.go(tmp_path)
        else:
            with pytest.raises(KeyboardInterrupt):
                stand_ins.go(tmp_path)
    assert sum(event[0] == "update" for event in stand_ins.events) == updates


def test_a_run_that_skips_too_often_ends_before_it_reports_or_saves_that_step(tmp_path):
    stand_ins = Run(skipped=2)
    with pytest.raises(RunError, match="not finite in 2 updates in a row"):
        stand_ins.go(tmp_path)
    assert not [event for event in stand_ins.events if event in (("log", 1), ("save", 1))]
    assert stand_ins.events.count(("update", 1)) == 1 and ("update", 2) not in stand_ins.events


def test_tokens_of_an_older_version_are_not_trained_on(tmp_path):
    stand_ins = Run(version_drawn=1)
    with pytest.raises(RunError, match="1 weight versions ago"):
        stand_ins.go(tmp_path)
    assert ("update", 1) not in stand_ins.events


def test_completions_left_behind_are_unknown_to_their_group_and_dropped_in_the_ledger(tmp_path):
    stand_ins = Run()
    stand_ins.left_behind = lambda prompt: int(prompt == 4)
    stand_ins.go(tmp_path, straggler_s=1.0)
    assert [metrics["reward/unknown"] for metrics in stand_ins.logged[1:]] == [0, 1, 0, 0]
    assert stand_ins.logged[-1]["ledger/dropped_straggler"] == 1


def as_they_are(rewards_PG, tokens_PG):
    return rewards_PG


AS_THEY_ARE = {"advantage": f"{__name__}:as_they_are"}


@pytest.mark.parametrize(
    ("algorithm", "reward", "advantages"),
    [
        (AS_THEY_ARE, {}, [0.5, 1.0, 1.5]),
        (AS_THEY_ARE, {"overlong_tokens": 1, "overlong_penalty": 3.0}, [-2.5, -2.0, -1.5]),
        ({"mask_truncated": True}, {}, []),  # as all of them are
        ({"length_bounds": [0, 1]}, {}, []),  # they have 2 tokens
        ({"length_bounds": [2, 2]}, {}, [-0.7071, 0.7071]),
        # -1 / sqrt(2) in two groups, and half of it in the one whose rewards differ both
        ({"advantage": "gdpo"}, {}, [-1.0541, -0.5270, 0.5270, 1.0541]),
    ],
    ids=str,
)
def test_what_is_known_of_a_completion_reaches_its_advantage(
    tmp_path, algorithm, reward, advantages
):
    stand_ins, batches, turns = Run(), [], [itertools.count(), itertools.count()]
    update = stand_ins.update
    stand_ins.update = lambda state, parts: batches.append(parts) or update(state, parts)
    judges = (
        lambda *_: float(next(turns[0]) % 2),  # 0 and 1 in each group
        lambda prompt, _: 1.0 - next(turns[1]) % 2 * (prompt.id % 2),  # 1, and in one group 1 and 0
    )
    stand_ins.reward = Reward(("main", "further"), np.array([1.0, 0.5]), judges)
    algorithm = {"mask_equal_rewards": False, "minibatches": 2} | algorithm
    sections = {"algorithm": algorithm, "reward": reward}
    stand_ins.go(tmp_path, steps=1, sections=sections, max_new_tokens=2)
    (batches,), metrics = batches, stand_ins.logged[-1]
    trained = [batch.advantages_BC[batch.loss_mask_BC > 0] for batch in batches]
    found = np.unique(np.concatenate(trained).round(4))
    np.testing.assert_allclose(found, advantages, atol=2e-4)
    assert metrics["reward/main/mean"] == 0.5 and metrics["reward/mean"] == pytest.approx(11 / 12)
    assert metrics.get("reward/overlong_mean", 0.0) == reward.get("overlong_penalty", 0.0)


def test_overlap_samples_the_next_step_under_an_update_and_publishes_when_it_is_there(tmp_path):
    stand_ins = Run()
    submit, update, publish = stand_ins.submit, stand_ins.update, stand_ins.publish

    def submit_and_hold(requests, urgent=False):
        futures = submit(requests, urgent)
        stand_ins.held = stand_ins.held or []  # from the second step on
        return futures

    def let_go():
        stand_ins.end(stand_ins.held.pop())

    def update_while_they_sample(state, batch):
        state = update(state, batch)
        if stand_ins.events[-1] != ("update", STEPS):
            assert [len(futures) for futures in stand_ins.held] == [PROMPTS]
            threading.Timer(0.05, let_go).start()
        return state

    def publish_to_idle(params, version):
        assert not stand_ins.held, "published while the engines sample"
        return publish(params, version)

    stand_ins.submit, stand_ins.update = submit_and_hold, update_while_they_sample
    stand_ins.published = publish_to_idle
    stand_ins.go(tmp_path, mode="overlap")
    assert [metrics["lag/max"] for metrics in stand_ins.logged[1:]] == [0, 1, 1, 1]
    assert [metrics["lag/1"] for metrics in stand_ins.logged[1:]] == [0.0, 1.0, 1.0, 1.0]


def test_continuous_trains_while_a_version_is_on_its_way(tmp_path):
    """Each publish but the first and the last ends only once the next update has begun."""
    stand_ins = Run()
    update, publish = stand_ins.update, stand_ins.publish
    began = {step: threading.Event() for step in range(STEPS + 2)}

    def updating(state, batch):
        began[int(state.step) + 1].set()
        return update(state, batch)

    def on_its_way(params, version):
        finish = publish(params, version)
        if 1 < version <= STEPS:
            return lambda: began[version].wait(LONG_S) and finish()
        return finish

    stand_ins.update, stand_ins.published = updating, on_its_way
    stand_ins.go(tmp_path, mode="continuous")
    assert [m["weights/version_served"] for m in stand_ins.logged[1:]] == [1, 2, 3, STEPS + 1]
    assert stand_ins.logged[-1]["lag/max"] <= 1
    book = replay(tmp_path / "ledger.jsonl")
    assert book.trained == book.dispatched == STEPS * PROMPTS * GROUP


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("synchronous", {"temperature": 0.7, "top_p": 0.9}),
        ("overlap", {"temperature": 0.7, "top_k": 5}),
        ("continuous", {"temperature": 0.0, "beams": 4}),
    ],
)
def test_an_evaluation_goes_first_with_settings_of_its_own_once_its_version_is_there(
    tmp_path, mode, options
):
    stand_ins = Run()
    stand_ins.held_out = [stand_ins.at(1000), stand_ins.at(1001)]
    publish, submit, served, asked = stand_ins.publish, stand_ins.submit, [], []

    def on_its_way(params, version):
        finish = publish(params, version)
        return lambda: served.append(version) or finish()

    def watched(requests, urgent=False):
        if urgent:
            asked.append((served[-1], {request.sampling for request in requests}))
            assert [request.prompt.id for request in requests] == [1000, 1001]
        return submit(requests, urgent)

    stand_ins.published, stand_ins.submit = on_its_way, watched
    settings = {"every_steps": 2, "max_new_tokens": 5} | options
    stand_ins.go(tmp_path, evaluate=settings, mode=mode)
    sampling = Sampling(1, 5, stop_tokens=(1,), **options)
    assert asked == [(version, {sampling}) for version in (1, 3, 5)]
    assert [m.get("eval/accuracy") for m in stand_ins.logged] == [0.5, None, 0.5, None, 0.5]
    assert stand_ins.logged[-1]["ledger/dispatched"] == STEPS * PROMPTS * GROUP


@pytest.mark.parametrize("mode", ["synchronous", "overlap", "continuous"])
def test_engines_that_are_gone_end_the_run_with_a_checkpoint(tmp_path, mode):
    stand_ins = Run()
    submit = stand_ins.submit

    def lossy(requests, urgent=False):
        futures = submit(requests, urgent)
        if stand_ins.version == 3:
            futures[0] = Future()
            futures[0].set_exception(EnginesGone("nobody is left"))
        return futures

    stand_ins.submit = lossy
    with pytest.raises(EnginesGone, match="nobody is left"):
        stand_ins.go(tmp_path, save_every=100, mode=mode)
    last = max(step for kind, step, *_ in stand_ins.events if kind == "log")
    assert last >= 2 and stand_ins.events[-1] == ("save", last)


@pytest.mark.parametrize("mode", ["synchronous", "continuous"])
def test_a_publish_that_fails_ends_the_run_with_a_checkpoint(tmp_path, mode):
    stand_ins = Run()
    publish = stand_ins.publish

    def fails(params, version):
        def finish():
            raise RunError("no engine serves it")

        return finish if version == 3 else publish(params, version)

    stand_ins.published = fails
    with pytest.raises(RunError, match="no engine serves it"):
        stand_ins.go(tmp_path, save_every=100, mode=mode)
    last = max(step for kind, step, *_ in stand_ins.events if kind == "log")
    assert last >= 2 and stand_ins.events[-1] == ("save", last)


MODES = [
    {"mode": "synchronous"},
    {"mode": "overlap"},
    {"mode": "continuous"},
    {"mode": "continuous", "max_lag": 3},
    {"mode": "synchronous", "resample_equal": True},
    {"mode": "continuous", "max_lag": 2, "resample_equal": True},
]


def differs(prompt: int) -> bool:
    """Whether the completions of it get different rewards, where they do for some."""
    return prompt % 3 > 0


@pytest.mark.parametrize("rollout", MODES, ids=str)
def test_however_often_it_is_killed_every_prompt_is_trained_once(tmp_path, rollout):
    """Or dropped once, if it teaches nothing. Kills where a run touches the world: a call of a
    part, before or after it was made."""
    resamples = rollout.get("resample_equal", False)
    steps, dice = 12, random.Random(str(rollout))
    stand_ins, resume, kills = Run(), None, 0
    while True:
        left = dice.randint(1, 25)
        doomed = Run()
        doomed.version = stand_ins.version  # the counter of versions is on the disk
        if resamples:
            judge = lambda prompt, text: float(differs(prompt.id) and text == "[7, 1]")  # noqa: E731
            doomed.reward = Reward(("differs",), np.ones(1), (judge,))

        def mortal(part):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0 and dice.random() < 0.5:
                    raise Killed
                outcome = part(*args, **kwargs)
                if left == 0:
                    raise Killed
                return outcome

            return call

        for name in ("submit", "publish", "update", "log_step", "save", "next_version"):
            setattr(doomed, name, mortal(getattr(doomed, name)))
        doomed.published = doomed.publish
        try:
            doomed.go(tmp_path, steps, save_every=2, resume=resume, **rollout)
            break
        except Killed:
            kills += 1
            with (tmp_path / "ledger.jsonl").open("ab") as file:
                file.write(b'{"n": 1, "wha'[: dice.randint(0, 12)])
        finally:
            stand_ins.version, resume = doomed.version, doomed.saved or resume
    assert kills > 2
    book = replay(tmp_path / "ledger.jsonl")
    assert book.trained == steps * PROMPTS * GROUP and not book.outstanding
    assert book.dispatched == book.trained + book.dropped["equal_rewards"]
    lines: list[dict] = []
    for text in (tmp_path / "ledger.jsonl").read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines[line["n"] :] = [line]
    trained = [line for line in lines if line["what"] == "trained"]
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    prompts = [int(prompt) for line in trained for prompt in line["samples"]]
    wanted = [i for i in range(book.cursor) if differs(i) or not resamples]
    assert sorted(prompts) == wanted and book.cursor >= steps * PROMPTS
