"""What the loop does in which order, with stand-ins that write down when they are used."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import Config
from jaxrl.train import Parts, run
from jaxrl.types import EnginesGone, Group, Prompt, PublishReport, Rollout, RunError

STEPS = 4
PROMPTS, GROUP = 3, 2


class Run:
    """Stand-ins for every part. `skipped` is what the updates report; `asked_at` a step's log."""

    def __init__(self, skipped: int = 0, interrupt_at: int | None = None, version_drawn: int = 0):
        self.events: list[tuple] = []
        self.cursor, self.skipped_too_long = 0, 0
        self.version, self.drawn_before = 0, version_drawn
        self.skipped, self.interrupt_at = skipped, interrupt_at
        self.interrupt = SimpleNamespace(signal=None)
        self.waiting = 0

    def take(self, count: int) -> list[Prompt]:
        prompts = [Prompt(self.cursor + i, "?", (5, 6), {}) for i in range(count)]
        self.cursor += count
        return prompts

    def begin(self, prompts, sampling, seeds):
        assert not self.waiting, "two batches at once"
        self.waiting += 1
        self.events.append(("begin", prompts[0].id // PROMPTS + 1, self.version))
        rollouts = tuple(
            Rollout(
                np.array([7, 8], np.int32),
                np.array([-1.0, -1.0], np.float32),
                np.full(2, self.version - self.drawn_before),
                "length",
                i,
            )
            for i in range(sampling.n)
        )

        def wait() -> list[Group]:
            self.waiting -= 1
            self.events.append(("wait", prompts[0].id // PROMPTS + 1))
            return [Group(prompt, rollouts) for prompt in prompts]

        return wait

    def next_version(self) -> int:
        return self.version + 1

    def publish(self, params, version: int) -> PublishReport:
        assert not self.waiting, "published while the engines sample"
        self.version = version
        self.events.append(("publish", version))
        return PublishReport(version, "", 0, 0.0, 1, 0.0)

    def update(self, state, batch):
        step = int(state.step) + 1
        self.events.append(("update", step))
        state = SimpleNamespace(
            params=jnp.full(2, step), step=step, skipped_in_a_row=jnp.asarray(self.skipped)
        )
        return state, {"loss": jnp.asarray(float(step))}

    def log_step(self, step: int, metrics: dict) -> None:
        self.events.append(("log", step))
        if step:
            assert metrics["loss"] == step and metrics["data/cursor"] == step * PROMPTS
            assert all(isinstance(value, int | float) for value in metrics.values())
        if step == self.interrupt_at:
            self.interrupt.signal = 15

    def save(self, step: int, state, version: int, cursor: int) -> None:
        assert (state.step, version, cursor) == (step, step + 1, step * PROMPTS)
        self.events.append(("save", step))

    def go(self, steps: int = STEPS, save_every: int = 1) -> list[tuple]:
        config = Config.model_validate(
            {
                "run": {"name": "x", "steps": steps},
                "model": {"path": "x"},
                "data": {"source": "reasoning_gym", "task": "x"},
                "rollout": {"prompts_per_step": PROMPTS, "group_size": GROUP},
                "optimizer": {"max_skipped_updates": 2},
                "eval": {"every_steps": 0},
                "checkpoint": {"every_steps": save_every},
            }
        )
        parts = Parts(
            config=config,
            key_cost=0.0,
            stream=self,
            held_out=[],
            tokenizer=SimpleNamespace(decode=str),
            reward=lambda prompt, text: float(prompt.id % 2),
            engines=self,
            publish=self.publish,
            next_version=self.next_version,
            update=self.update,
            save=self.save,
            log=SimpleNamespace(step=self.log_step, samples=lambda *_: None),
            stop_tokens=(1,),
        )
        start = SimpleNamespace(params=jnp.zeros(2), step=0, skipped_in_a_row=jnp.asarray(0))
        run(parts, start, 0, self.interrupt)
        return self.events


def test_a_step_is_reported_and_saved_while_the_engines_sample_the_next():
    expected = [("publish", 1), ("log", 0), ("begin", 1, 1)]
    for step in range(1, STEPS + 1):
        expected += [("wait", step), ("update", step), ("publish", step + 1)]
        if step < STEPS:
            expected.append(("begin", step + 1, step + 1))
        expected += [("log", step), ("save", step)]
    assert Run().go() == expected


def test_a_signal_while_the_engines_sample_lets_that_step_end():
    events = Run(interrupt_at=2).go(save_every=100)
    assert [event for event in events if event[0] in ("log", "save")][1:] == [
        ("log", 1),
        ("log", 2),
        ("log", 3),
        ("save", 3),
    ]
    assert events[-4:] == [("update", 3), ("publish", 4), ("log", 3), ("save", 3)]


def test_a_run_that_skips_too_often_ends_before_it_reports_or_saves_that_step():
    stand_ins = Run(skipped=2)
    with pytest.raises(RunError, match="not finite in 2 updates in a row"):
        stand_ins.go()
    assert not [event for event in stand_ins.events if event in (("log", 1), ("save", 1))]
    assert stand_ins.events.count(("update", 1)) == 1 and ("update", 2) not in stand_ins.events


def test_tokens_of_an_older_version_are_not_trained_on():
    stand_ins = Run(version_drawn=1)
    with pytest.raises(RunError, match="1 weight versions ago"):
        stand_ins.go()
    assert ("update", 1) not in stand_ins.events


def test_a_step_whose_engines_are_all_lost_is_sampled_again_by_those_in_their_place():
    stand_ins = Run()
    begin, losses = stand_ins.begin, iter([True])

    def lossy(prompts, sampling, seeds):
        wait = begin(prompts, sampling, seeds)

        def lost():
            if stand_ins.version == 2 and next(losses, False):
                stand_ins.waiting -= 1
                raise EnginesGone("no engine is left")
            return wait()

        return lost

    stand_ins.begin = lossy
    stand_ins.save = lambda *saved: None
    events = [event for event in stand_ins.go() if event[0] in ("publish", "begin", "update")]
    assert events[:7] == [
        ("publish", 1),
        ("begin", 1, 1),
        ("update", 1),
        ("publish", 2),
        ("begin", 2, 2),
        ("publish", 3),
        ("begin", 2, 3),
    ]
    assert events.count(("update", 2)) == 1 and events[-1] == ("publish", STEPS + 2)
