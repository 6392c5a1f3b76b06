"""`bridge.generate`: rows in, arrays out, against a reference that works row by row."""

from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.generate import GenerationConfig, generate
from jaxrl.types import Group, Rollout, Sampling

PAD = 99
ROWS = st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=5), min_size=1, max_size=4)


def sampling(n=3, max_new_tokens=4):
    return Sampling(n=n, max_new_tokens=max_new_tokens, temperature=1.0, stop_tokens=())


class FakeEngines:
    """Answers a request by what its prompt and seed are; leaves some siblings behind."""

    def __init__(self, left=(), later=False):
        self.left, self.later = set(left), later
        self.requests, self.futures = [], []

    def completion(self, prompt, sibling, longest):
        length = 1 + (sum(prompt) + sibling) % longest
        tokens = np.array([(sum(prompt) + 7 * sibling + k) % 98 for k in range(length)], np.int32)
        reason = "length" if length == longest else "stop"
        return tokens, -tokens.astype(np.float32) / 8, tokens.astype(np.int64) // 9, reason

    def submit(self, requests, urgent=False):
        self.requests += requests
        for request in requests:
            rollouts = tuple(
                Rollout(
                    *self.completion(request.prompt.tokens, g, request.sampling.max_new_tokens),
                    seed=request.seed + g,
                )
                for g in range(request.sampling.n)
                if (request.prompt.id, g) not in self.left
            )
            future = Future()
            if not self.later:
                future.set_result(Group(request.prompt, rollouts[::-1]))
            self.futures.append(future)
        return list(self.futures)


def padded(rows, side, extra):
    width = max(map(len, rows)) + extra
    tokens, mask = np.full((len(rows), width), PAD, np.int32), np.zeros((len(rows), width), int)
    for p, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(len(row))
        tokens[p, at], mask[p, at] = row, 1
    return tokens, mask


@given(
    rows=ROWS,
    side=st.sampled_from(["left", "right", "ragged"]),
    extra=st.integers(0, 2),
    n=st.integers(1, 3),
    longest=st.integers(1, 5),
    left=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 2))),
)
@settings(max_examples=150, deadline=None)
def test_each_row_is_its_prompt_and_its_completion(rows, side, extra, n, longest, left):
    engines = FakeEngines(left)
    config = GenerationConfig(sampling(n, longest), PAD, seed=3)
    if side == "ragged":
        width, out = max(map(len, rows)), generate(rows, config, engines)
    else:
        tokens, mask = padded(rows, side, extra)
        width, out = tokens.shape[1], generate(tokens, config, engines, mask)
    assert [list(request.prompt.tokens) for request in engines.requests] == rows
    for p, row in enumerate(rows):
        for g in range(n):
            empty = np.array([], np.int32)
            there = (p, g) not in left
            sampled, logprobs, versions, reason = (
                engines.completion(row, g, longest) if there else (empty, empty, empty, "")
            )
            behind, before = longest - len(sampled), width - len(row)
            pads = [PAD] * before
            assert out.prompts_PT[p].tolist() == pads + row
            assert out.prompt_mask_PT[p].tolist() == [False] * before + [True] * len(row)
            assert out.completions_PGC[p, g].tolist() == [*sampled, *[PAD] * behind]
            assert out.sequences_PGS[p, g].tolist() == [*pads, *row, *sampled, *[PAD] * behind]
            real = [False] * before + [True] * (len(row) + len(sampled)) + [False] * behind
            assert out.sequence_mask_PGS[p, g].tolist() == real
            assert out.completion_mask_PGC[p, g].tolist() == real[width:]
            assert out.logprobs_PGC[p, g].tolist() == [*logprobs, *[0.0] * behind]
            assert out.versions_PGC[p, g].tolist() == [*versions, *[-1] * behind]
            assert out.finish_PG[p, g] == reason and out.lengths_PG[p, g] == len(sampled)
    dtypes = [str(array.dtype) for array in out]
    ids, flag = "int32", "bool"
    assert dtypes == [ids, flag, ids, flag, ids, flag, "float32", "int64", "<U6", ids]


def test_seeds_are_of_the_batch_and_the_row():
    seeds = []
    for seed, rows in [(1, [[5], [6]]), (1, [[7], [8], [9]]), (2, [[5]])]:
        engines = FakeEngines()
        generate(rows, GenerationConfig(sampling(), PAD, seed), engines)
        seeds.append([request.seed for request in engines.requests])
    assert seeds[0] == seeds[1][:2] and len({*seeds[1], *seeds[2]}) == 4


@pytest.mark.parametrize(
    ("tokens", "mask", "why"),
    [
        ([[1, 2, 3]], [[1, 0, 1]], "prompt 0"),
        ([[1, 2, 3]], [[0, 0, 0]], r"prompts \[0\] have no tokens"),
        ([[1, 2, 3]], [[1, 1]], "shape"),
        ([[1], []], None, r"prompts \[1\]"),
    ],
)
def test_what_is_not_a_batch_of_prompts_is_refused(tokens, mask, why):
    engines = FakeEngines()
    with pytest.raises(ValueError, match=why):
        generate(tokens, GenerationConfig(sampling(), PAD), engines, mask and np.array(mask))
    assert not engines.requests


def test_what_is_late_is_cancelled():
    engines = FakeEngines(later=True)
    with pytest.raises(TimeoutError, match="2 of 2 prompts"):
        generate([[1], [2]], GenerationConfig(sampling(), PAD, timeout_s=0.01), engines)
    assert all(future.cancelled() for future in engines.futures)


def test_an_error_ends_the_others():
    engines = FakeEngines(later=True)

    class Failing(FakeEngines):
        def submit(self, requests, urgent=False):
            futures = engines.submit(requests)
            futures[1].set_exception(RuntimeError("no engine is left"))
            return futures

    with pytest.raises(RuntimeError, match="no engine is left"):
        generate([[1], [2]], GenerationConfig(sampling(), PAD), Failing())
    assert engines.futures[0].cancelled()
