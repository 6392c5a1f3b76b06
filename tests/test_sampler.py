"""The in-process engine samples from the policy, and says with which log-probs and version."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxrl import sampler
from jaxrl.config import MeshSection
from jaxrl.mesh import make_mesh, param_shardings
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy
from jaxrl.models.params import param_specs
from jaxrl.sampler import FIRST_STAGE, InProcessEngine, make_score, stages
from jaxrl.types import Prompt, Request, Sampling
from tests.reference_policy import STOP, VOCAB, logits_of, make_reference, params_of, save_reference

PROMPTS = [
    Prompt(0, "", (3, 17, 42, 5, 9), {}),
    Prompt(1, "", (60,), {}),
    Prompt(2, "", (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21), {}),
]
# Each (rows, sampling) is a program of its own to compile: the tests share these two.
GREEDY = Sampling(1, 12, 0.0, (STOP,))
SAMPLED = Sampling(2, 12, 1.0, (STOP,))
SEEDS = [100, 200, 300]


@pytest.fixture(scope="module")
def reference():
    return make_reference(seed=5)


@pytest.fixture(scope="module")
def policy(reference, tmp_path_factory):
    return Policy(
        load_config(save_reference(reference, tmp_path_factory.mktemp("model"))), jnp.float32
    )


@pytest.fixture(scope="module")
def params(reference):
    return jax.tree.map(jnp.asarray, params_of(reference))


@pytest.fixture(scope="module")
def engine(policy, params):
    engine = InProcessEngine(policy)
    engine.publish(params, 4)
    return engine


def log_softmax(logits, temperature=1.0):
    return torch.log_softmax(torch.tensor(logits).double() / temperature, -1).numpy()


def expected_logprobs(reference, prompt, tokens, temperature):
    """Of `tokens` behind the prompt, by transformers and torch in float64."""
    row = [*prompt.tokens, *map(int, tokens)]
    logprobs_TV = log_softmax(logits_of(reference, [row])[0], temperature)
    start = len(prompt.tokens)
    return np.array([logprobs_TV[t - 1, row[t]] for t in range(start, len(row))])


def assert_same(rollout, other):
    np.testing.assert_array_equal(rollout.tokens, other.tokens)
    np.testing.assert_allclose(rollout.logprobs, other.logprobs, atol=1e-5)
    assert (rollout.seed, rollout.finish_reason) == (other.seed, other.finish_reason)


# --- greedy ---


def test_greedy_equals_generate_of_transformers_token_by_token(engine, reference):
    """Prompts of three lengths in one batch, one of a single token."""
    groups = engine.generate(PROMPTS, GREEDY, SEEDS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        generated = reference.generate(
            torch.tensor([prompt.tokens]),
            attention_mask=torch.ones(1, len(prompt.tokens), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )[0, len(prompt.tokens) :].tolist()
        assert group.prompt is prompt
        assert group.rollouts[0].tokens.tolist() == generated
        expected = expected_logprobs(reference, prompt, generated, 1.0)
        np.testing.assert_allclose(group.rollouts[0].logprobs, expected, atol=1e-4)


def test_a_cache_that_grows_changes_nothing(engine, reference):
    """Past the first stage, and past one that is not full when the last row stops."""
    n = 3 * FIRST_STAGE
    assert len(stages(n)) > 2 and stages(n)[-1] == n and stages(FIRST_STAGE - 1) == [31]
    group = engine.generate(PROMPTS[:1], dataclasses.replace(GREEDY, max_new_tokens=n), SEEDS[:1])[
        0
    ]
    expected = expected_logprobs(reference, PROMPTS[0], group.rollouts[0].tokens, 1.0)
    assert len(expected) == n
    np.testing.assert_allclose(group.rollouts[0].logprobs, expected, atol=1e-4)


# --- sampled ---


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_are_those_of_the_sampling_distribution(engine, reference, temperature):
    groups = engine.generate(PROMPTS, dataclasses.replace(SAMPLED, temperature=temperature), SEEDS)
    completions = set()
    for group in groups:
        for rollout in group.rollouts:
            expected = expected_logprobs(reference, group.prompt, rollout.tokens, temperature)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
            assert (rollout.tokens.dtype, rollout.logprobs.dtype) == (np.int32, np.float32)
            completions.add(tuple(rollout.tokens.tolist()))
    assert len(completions) == 6  # no two drawn alike


def test_a_completion_depends_on_its_prompt_and_seed_alone(engine):
    together = engine.generate(PROMPTS, SAMPLED, SEEDS)
    backwards = engine.generate(PROMPTS[::-1], SAMPLED, SEEDS[::-1])[::-1]
    alone = engine.generate(PROMPTS[:1], SAMPLED, SEEDS[:1])
    for one, other in zip(together, backwards, strict=True):
        for rollout, again in zip(one.rollouts, other.rollouts, strict=True):
            assert_same(rollout, again)
    for rollout, again in zip(together[0].rollouts, alone[0].rollouts, strict=True):
        assert_same(rollout, again)


def test_fewer_prompts_than_before_are_sampled_alike_by_few_programs(policy, params):
    engine = InProcessEngine(policy)
    engine.publish(params, 1)
    prompts, seeds = (PROMPTS * 3)[:8], list(range(8))
    whole = engine.generate(prompts, GREEDY, seeds)
    compiled = sampler._prefill._cache_size()
    for count in range(1, 8):
        groups = engine.generate(prompts[:count], GREEDY, seeds[:count])
        assert len(groups) == count
        for group, same in zip(groups, whole, strict=False):
            assert_same(group.rollouts[0], same.rollouts[0])
    assert sampler._prefill._cache_size() - compiled <= 2


def test_what_is_submitted_comes_as_it_is_generated_unless_it_is_cancelled(engine):
    requests = [Request(prompt, SAMPLED, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    futures = engine.submit(requests)
    futures[1].cancel()
    generated = engine.generate(PROMPTS, SAMPLED, SEEDS)
    for i in (0, 2):
        group = futures[i].result(timeout=60)
        assert group.prompt is PROMPTS[i]
        for rollout, same in zip(group.rollouts, generated[i].rollouts, strict=True):
            assert_same(rollout, same)


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 3}, {"stop_strings": ("a",)}])
def test_an_option_that_it_does_not_have_is_refused(engine, option):
    with pytest.raises(ValueError, match="has no such options"):
        engine.generate(PROMPTS, dataclasses.replace(SAMPLED, **option), SEEDS)


def test_completion_i_is_drawn_with_the_seed_plus_i(engine):
    groups = engine.generate(PROMPTS, SAMPLED, SEEDS)
    shifted = engine.generate(PROMPTS, SAMPLED, [seed + 1 for seed in SEEDS])
    for seed, one, other in zip(SEEDS, groups, shifted, strict=True):
        assert [rollout.seed for rollout in one.rollouts] == [seed, seed + 1]
        assert_same(one.rollouts[1], other.rollouts[0])
        assert one.rollouts[0].tokens.tolist() != one.rollouts[1].tokens.tolist()


def test_tokens_are_drawn_with_the_probabilities_of_the_policy(engine, reference):
    """Pearson's chi-square over the first and the second token: 4,000 draws, seeds fixed."""
    count, temperature = 4000, 1.5
    (group,) = engine.generate(PROMPTS[:1], Sampling(count, 2, temperature, ()), [0])
    drawn_N2 = np.array([rollout.tokens for rollout in group.rollouts])

    def chi_square(tokens, expected_V):
        rare = expected_V < 5
        seen_V = np.bincount(tokens, minlength=VOCAB)
        seen = np.append(seen_V[~rare], seen_V[rare].sum())
        expected = np.append(expected_V[~rare], max(expected_V[rare].sum(), 1.0))
        degrees = len(seen) - 1
        assert degrees >= 3
        return ((seen - expected) ** 2 / expected).sum(), degrees + 5 * np.sqrt(2 * degrees)

    prompt = list(PROMPTS[0].tokens)
    first_V = np.exp(log_softmax(logits_of(reference, [prompt])[0, -1], temperature))
    found, limit = chi_square(drawn_N2[:, 0], count * first_V)
    assert found < limit
    rows = [[*prompt, token] for token in range(VOCAB)]
    second_VV = np.exp(log_softmax(logits_of(reference, rows)[:, -1], temperature))
    found, limit = chi_square(drawn_N2[:, 1], second_VV[drawn_N2[:, 0]].sum(axis=0))
    assert found < limit
    # And the second is drawn apart from the first: the same noise would often repeat the choice.
    gaps_N = np.abs(
        np.array([r.logprobs[0] for r in group.rollouts]) - np.log(first_V)[drawn_N2[:, 0]]
    )
    assert gaps_N.max() < 1e-4
    repeats = (drawn_N2[:, 0] == drawn_N2[:, 1]).sum()
    expected = second_VV[drawn_N2[:, 0], drawn_N2[:, 0]].sum()
    assert abs(repeats - expected) < 5 * np.sqrt(expected) + 5


# --- where a completion ends ---


def test_a_completion_ends_with_its_first_stop_token_and_keeps_its_log_prob(engine, reference):
    endless = dataclasses.replace(SAMPLED, stop_tokens=())
    whole = [rollout for g in engine.generate(PROMPTS, endless, SEEDS) for rollout in g.rollouts]
    for rollout in whole:
        assert len(rollout.tokens) == 12 and rollout.finish_reason == "length"
    # A token of the middle of the first row, which also ends other rows, early or late, or not.
    stop = int(whole[0].tokens[5])
    stopping = dataclasses.replace(SAMPLED, stop_tokens=(VOCAB + 5, stop))
    reasons = []
    for p, group in enumerate(engine.generate(PROMPTS, stopping, SEEDS)):
        for i, rollout in enumerate(group.rollouts):
            tokens = whole[2 * p + i].tokens.tolist()
            end = tokens.index(stop) + 1 if stop in tokens else 12
            assert rollout.tokens.tolist() == tokens[:end]
            assert rollout.finish_reason == ("stop" if stop in tokens else "length")
            assert len(rollout.logprobs) == len(rollout.versions) == end
            expected = expected_logprobs(reference, group.prompt, rollout.tokens, 1.0)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
            reasons.append(rollout.finish_reason)
    assert set(reasons) == {"stop", "length"}


# --- versions of the weights ---


def test_every_token_carries_the_version_that_sampled_it(policy, params):
    engine = InProcessEngine(policy)
    for version in (0, 3):
        report = engine.publish(params, version)
        assert (report.version, report.engines) == (version, 1)
        group, *_ = engine.generate(PROMPTS, GREEDY, SEEDS)
        assert set(group.rollouts[0].versions.tolist()) == {version}
        assert group.rollouts[0].versions.dtype == np.int64


def test_the_engine_keeps_its_own_copy_of_what_was_published(policy, params):
    engine = InProcessEngine(policy)
    mine = jax.tree.map(jnp.array, params)
    engine.publish(mine, 0)
    before, *_ = engine.generate(PROMPTS, GREEDY, SEEDS)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(overwrite(mine))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(mine))
    after, *_ = engine.generate(PROMPTS, GREEDY, SEEDS)
    assert_same(before.rollouts[0], after.rollouts[0])


def test_new_weights_are_used_from_the_next_completion_on(policy, params):
    engine = InProcessEngine(policy)
    engine.publish(params, 0)
    before, *_ = engine.generate(PROMPTS, GREEDY, SEEDS)
    engine.publish(params | {"embed": params["embed"][::-1]}, 1)
    after, *_ = engine.generate(PROMPTS, GREEDY, SEEDS)
    assert before.rollouts[0].tokens.tolist() != after.rollouts[0].tokens.tolist()


@pytest.mark.parametrize("version", [4, 3])
def test_a_version_that_is_not_newer_is_refused(engine, params, version):
    with pytest.raises(ValueError, match=f"{version} does not follow 4"):
        engine.publish(params, version)


def test_nothing_is_sampled_before_the_first_publish(policy):
    with pytest.raises(RuntimeError, match="nothing was published"):
        InProcessEngine(policy).generate(PROMPTS, GREEDY, SEEDS)


def test_parameters_on_a_mesh_give_the_same_completions(policy, params, engine):
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(params, param_shardings(param_specs(policy.config), mesh))
    other = InProcessEngine(policy)
    other.publish(sharded, 4)
    for one, two in zip(
        engine.generate(PROMPTS, SAMPLED, SEEDS),
        other.generate(PROMPTS, SAMPLED, SEEDS),
        strict=True,
    ):
        for rollout, again in zip(one.rollouts, two.rollouts, strict=True):
            np.testing.assert_array_equal(rollout.tokens, again.tokens)
            np.testing.assert_allclose(rollout.logprobs, again.logprobs, atol=1e-4)


# --- scoring ---


def test_scores_are_the_log_probs_of_transformers(policy, params, reference):
    score = make_score(policy)
    for length in (2, 5, 32, 33):
        tokens = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
        scores = score(params, tokens)
        assert scores.dtype == np.float32 and scores.shape == (length,) and scores[0] == 0.0
        first = Prompt(0, "", tuple(tokens[:1]), {})
        expected = expected_logprobs(reference, first, tokens[1:], 1.0)
        np.testing.assert_allclose(scores[1:], expected, atol=1e-4)
