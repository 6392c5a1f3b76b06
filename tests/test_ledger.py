"""Every sample is accounted for once, whatever killed the process that kept the books."""

import json

import numpy as np
import pytest

from jaxrl.ledger import Ledger, LedgerError, replay
from jaxrl.types import Group, Prompt, Rollout


def group(prompt: int, rollouts: int) -> Group:
    one = Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int64), "stop", 0)
    return Group(Prompt(prompt, "", (1,), {}), (one,) * rollouts)


def counts(book) -> tuple:
    return book.dispatched, book.trained, dict(book.dropped), dict(book.outstanding)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_samples_are_trained_dropped_or_in_flight(path):
    ledger = Ledger(path)
    ledger.dispatch([0, 2, 3], 4, version=1)
    ledger.drop([2], "too_old")
    ledger.dispatch([5], 4, version=2)
    ledger.drop([5], "equal_rewards")
    ledger.again([3], version=2)
    ledger.train(1, 2, [group(0, 3)])
    expected = (16, 3, {"too_old": 4, "straggler": 1, "equal_rewards": 4}, {3: 4})
    assert counts(ledger) == expected and ledger.cursor == 6
    ledger.check([3])
    assert counts(replay(path)) == expected
    assert ledger.metrics() == {
        "ledger/dispatched": 16,
        "ledger/trained": 3,
        "ledger/in_flight": 4,
        "ledger/dropped_too_old": 4,
        "ledger/dropped_straggler": 1,
        "ledger/dropped_equal_rewards": 4,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ledger: ledger.train(2, 3, [group(0, 2)]),  # twice
        lambda ledger: ledger.train(2, 3, [group(1, 3)]),  # more than were asked for
        lambda ledger: ledger.train(2, 3, [group(9, 2)]),  # nobody asked for it
        lambda ledger: ledger.dispatch([0], 2, 3),
        lambda ledger: ledger.check([]),
        lambda ledger: ledger.check([1, 2]),
        lambda ledger: (vars(ledger).update(trained=5), ledger.check([1])),
    ],
)
def test_what_cannot_be_is_an_error(path, wrong):
    ledger = Ledger(path)
    ledger.dispatch([0, 1], 2, version=1)
    ledger.train(1, 1, [group(0, 2)])
    ledger.check([1])
    with pytest.raises(LedgerError):
        wrong(ledger)


@pytest.mark.parametrize("torn", [b"", b'{"n": 3, "what": "trai', b"\0\0\0", b'{"n": 3}\n{"n": 4'])
def test_a_run_goes_on_from_a_checkpoint_whatever_the_kill_left(path, torn):
    killed = Ledger(path)
    killed.dispatch([0, 1, 5], 2, version=1)
    killed.train(1, 1, [group(1, 2)])
    state = json.loads(json.dumps(killed.saved()))  # as a checkpoint keeps it
    killed.train(2, 2, [group(0, 2)])
    killed.dispatch([6], 2, version=3)
    killed.close()
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn)

    resumed = Ledger(path, state, step=1)
    assert list(resumed.outstanding) == [0, 5] and resumed.cursor == 6
    resumed.train(2, 4, [group(5, 2)])
    resumed.dispatch([7], 2, version=5)
    assert path.read_bytes().startswith(before)
    nothing = dict.fromkeys(("too_old", "straggler", "equal_rewards"), 0)
    assert counts(replay(path)) == (8, 4, nothing, {0: 2, 7: 2})
    (line,) = [line for line in path.read_bytes().split(b"\n") if b"resumed" in line]
    assert json.loads(line)["step"] == 1


def test_a_run_without_a_checkpoint_begins_its_book_anew(path):
    Ledger(path).dispatch([0, 1], 2, version=1)
    Ledger(path).dispatch([0], 2, version=2)
    assert counts(replay(path))[3] == {0: 2}


def test_a_missing_line_is_found(path):
    ledger = Ledger(path)
    for prompt in range(3):
        ledger.dispatch([prompt], 2, version=1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(LedgerError, match="line 2: 1 lines are missing"):
        replay(path)


def test_a_ledger_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(LedgerError, match=r"ledger\.jsonl: cannot be written"):
        Ledger(tmp_path / "no" / "ledger.jsonl")
