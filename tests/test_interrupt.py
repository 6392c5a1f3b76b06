"""The first signal asks, the second one ends; before the first step the first one does."""

import signal
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxrl import sft
from jaxrl.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(number, capsys):
    with Interrupt().listening() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(number)
        assert interrupt.signal == number
        assert "ending after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_handlers_are_put_back_even_after_an_error():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), Interrupt().listening():
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] != before
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_to_one_run_is_unknown_to_the_next():
    with Interrupt().listening():
        signal.raise_signal(signal.SIGTERM)
    assert Interrupt().signal is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_until_there_is_a_step_the_first_signal_ends_at_once(number, capsys):
    with Interrupt(starting=True).listening() as interrupt:
        with pytest.raises(KeyboardInterrupt) as error:
            signal.raise_signal(number)
        assert error.value.signal == number and "after this step" not in capsys.readouterr().err
        interrupt.begin()
        signal.raise_signal(number)
        assert interrupt.signal == number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_another_process_wakes_the_one_that_still_starts(number):
    """Its main thread waits for engines; who hears of the signal is another thread."""
    interrupt = Interrupt(starting=True)
    heard = threading.Timer(0.2, interrupt.asked_elsewhere, [int(number)])
    with interrupt.listening():
        heard.start()
        with pytest.raises(KeyboardInterrupt) as error:
            threading.Event().wait(20)
        assert error.value.signal == number
        heard.join()
        interrupt.begin()
        interrupt.asked_elsewhere(number)
        assert interrupt.signal == number


def test_fine_tuning_ends_at_once_until_its_first_step_begins(monkeypatch):
    def signalled(*_):
        signal.raise_signal(signal.SIGTERM)

    def update(*_):
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError  # the step is under way

    parts: Any = SimpleNamespace(
        config=SimpleNamespace(
            run=SimpleNamespace(steps=3), sft=SimpleNamespace(sequences_per_step=1)
        ),
        held_out=[],
        stream=SimpleNamespace(take=lambda count: []),
        key_cost=0.0,
        log=SimpleNamespace(step=signalled),
        update=update,
    )
    batch = SimpleNamespace(group_BT=np.ones((1, 1)))
    monkeypatch.setattr(sft, "pack_examples", lambda *_: batch)
    with Interrupt(starting=True).listening() as interrupt, pytest.raises(KeyboardInterrupt):
        sft.run(parts, None, 0, interrupt)
    with Interrupt(starting=True).listening() as interrupt:
        parts.log.step = lambda *_: None
        with pytest.raises(ZeroDivisionError):
            sft.run(parts, None, 0, interrupt)
        assert interrupt.signal == signal.SIGTERM
