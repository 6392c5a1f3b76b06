"""Beam search over made-up models, against all completions and against the search done by hand."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.beam import Search
from jaxrl.types import Sampling

STOP = 0


class Model:
    """Log-probs of the next token, made up for every beginning of a completion."""

    def __init__(self, seed, vocabulary):
        self.seed, self.vocabulary = seed, vocabulary

    def after(self, tokens):
        """By token, the likeliest first."""
        weights = [hash((self.seed, tokens, token)) % 9973 / 900 for token in self.vocabulary]
        norm = math.log(sum(math.exp(weight) for weight in weights))
        by_token = dict(zip(self.vocabulary, (w - norm for w in weights), strict=True))
        return dict(sorted(by_token.items(), key=lambda item: -item[1]))

    def logprobs(self, tokens):
        return [self.after(tokens[:t])[token] for t, token in enumerate(tokens)]

    def worth(self, prompt, tokens, stop=(STOP,)):
        length = prompt + len([token for token in tokens if token not in stop])
        return sum(self.logprobs(tokens)) / length

    def completions(self, longest, stop=(STOP,)):
        """All that there are."""
        go_on = [token for token in self.vocabulary if token not in stop]
        for length in range(longest):
            last = self.vocabulary if length == longest - 1 else stop
            for beginning in itertools.product(go_on, repeat=length):
                yield from ((*beginning, token) for token in last)


def searched(model, prompt, stop=(STOP,), **options):
    """The completions found, and how many steps that took."""
    sampling = Sampling(temperature=0.0, stop_tokens=stop, **options)
    search, steps = Search(prompt, sampling), 0
    while not search.over:
        all_after = [model.after(beam.tokens) for beam in search.live]
        search = search.step([dict(list(after.items())[: search.wanted]) for after in all_after])
        steps += 1
    return search.completions(), steps


def by_hand(model, prompt, beams, longest):
    """To its end, however long nothing better can come: as vLLM does it."""
    live, done = [()], []
    for _ in range(longest):
        after = [(*b, token) for b in live for token in list(model.after(b))[: 2 * beams]]
        done += [tokens for tokens in after if tokens[-1] == STOP]
        after = [tokens for tokens in after if tokens[-1] != STOP]
        live = sorted(after, key=lambda tokens: -sum(model.logprobs(tokens)))[:beams]
    return sorted(done + live, key=lambda tokens: -model.worth(prompt, tokens))[:beams]


@given(seed=st.integers(0, 10**6), prompt=st.integers(1, 40), longest=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_search_that_is_wide_enough_finds_the_best_of_all(seed, prompt, longest):
    model = Model(seed, range(4))
    ranked = sorted(model.completions(longest), key=lambda tokens: -model.worth(prompt, tokens))
    n = min(5, len(ranked))
    found, _ = searched(model, prompt, n=n, beams=3**longest + n, max_new_tokens=longest)
    assert [beam.tokens for beam in found] == ranked[:n]
    for beam in found:
        assert list(beam.logprobs) == model.logprobs(beam.tokens)
        assert beam.stopped == (beam.tokens[-1] == STOP)


@given(
    seed=st.integers(0, 10**6),
    prompt=st.integers(1, 40),
    beams=st.integers(2, 5),
    longest=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_narrow_search_ends_early_and_finds_what_one_to_the_end_finds(
    seed, prompt, beams, longest, data
):
    model, n = Model(seed, range(16)), data.draw(st.integers(1, beams))
    found, steps = searched(model, prompt, n=n, beams=beams, max_new_tokens=longest)
    assert [beam.tokens for beam in found] == by_hand(model, prompt, beams, longest)[:n]
    assert steps <= longest


def test_it_ends_as_soon_as_nothing_better_can_come():
    """Stopping at once is nearly certain, and the next best is far behind."""

    class Certain:
        def after(self, tokens):
            return {STOP: math.log(0.99), 1: math.log(0.006), 2: math.log(0.004)}

    found, steps = searched(Certain(), 10, n=1, beams=2, max_new_tokens=1000)
    assert found[0].tokens == (STOP,) and steps == 1
    found, steps = searched(Certain(), 10, n=2, beams=2, max_new_tokens=20)
    assert [beam.tokens for beam in found] == [(STOP,), (1, STOP)] and steps == 3


def test_many_stop_tokens_leave_enough_that_go_on():
    """More of them than beams, and all of them likelier than the others."""
    stop = tuple(range(6))

    class Stopping:
        def after(self, tokens):
            likely = {token: math.log(0.9 / 6) for token in stop}
            return likely | {6: math.log(0.06), 7: math.log(0.04)}

    search = Search(1, Sampling(1, 3, 0.0, stop, beams=2))
    search = search.step([dict(list(Stopping().after(()).items())[: search.wanted])])
    assert [beam.tokens for beam in search.live] == [(6,), (7,)]


@pytest.mark.parametrize("stop", [(), (STOP,)])
def test_without_more_completions_there_are_fewer(stop):
    model = Model(3, range(3))
    found, _ = searched(model, 2, stop, n=5, beams=5, max_new_tokens=1)
    assert sorted(beam.tokens for beam in found) == [(0,), (1,), (2,)]
