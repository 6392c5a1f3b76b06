"""What a token computes, and what is learned from it, do not depend on what shares its row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge.checkpoints import load_params
from jaxrl.config import AlgorithmSection, MeshSection, UpdateSection
from jaxrl.mesh import batch_sharding, make_mesh, param_shardings, row_shards
from jaxrl.models.attention import Packed
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy
from jaxrl.models.params import param_specs
from jaxrl.objectives.objective import make_objective
from jaxrl.packing import pack
from jaxrl.types import Group, Prompt, Rollout, TrainBatch
from jaxrl.update import make_gradient, score_sampled
from tests.reference_policy import FAMILIES, FAMILY_VOCAB, family_model
from tests.test_update import TEMPERATURE, make_sampled

# Dense; windows of 16 and another rotary embedding on some layers; experts.
NAMES = ["llama", "gemma3", "qwen3_moe"]
WINDOW = FAMILIES["gemma3"][1]["sliding_window"]
# Prompts longer than the window, as long, and shorter.
LENGTHS = {WINDOW + 7: (5, 2, 20, 4), 2: (3, 18, 1, 4), WINDOW: (8, 2, 5, 3), 9: (1, 2, 1, 2)}
CAP = 1.3
ONE, MESH = MeshSection(), MeshSection(data=2, fsdp=2, tensor=2)
LAYOUTS = {  # how rows are made, the mesh, and empty rows behind them
    "shared": (UpdateSection(), ONE, 0),
    "split_groups_and_padding_rows": (UpdateSection(row_tokens=64), ONE, 3),
    "microbatches": (UpdateSection(max_tokens_per_microbatch=128), ONE, 0),
    "mesh_microbatches": (
        UpdateSection(share_prompts=False, max_tokens_per_microbatch=64),
        MESH,
        0,
    ),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(name, mesh) -> (policy, params)."""

    @functools.cache
    def directory(name):
        folder = tmp_path_factory.mktemp(name)
        family_model(name).save_pretrained(folder)
        return folder

    def load(name, mesh=ONE):
        config = load_config(directory(name))
        specs = param_specs(config)
        params = load_params(directory(name), specs, param_shardings(specs, make_mesh(mesh)))
        return Policy(config, jnp.float32, mesh=make_mesh(mesh)), params

    return load


def one_a_row(policy, sampled):
    """objective(params) -> (loss, (log-probs, entropies)) with a completion in each right-padded
    row and its formula written out; scores are of the trained tokens, one after the other."""
    cases = list(sampled.completions())
    longest = max(len(prompt) + len(tokens) for prompt, tokens, *_ in cases)
    rows, numbers = np.zeros((len(cases), longest), np.int32), []
    for b, (prompt, tokens, mask, behavior, advantage) in enumerate(cases):
        rows[b, : len(prompt) + len(tokens)] = [*prompt, *tokens]
        numbers += [
            (b, len(prompt) + i, behavior[i], advantage) for i in range(len(tokens)) if mask[i]
        ]
    b_N, t_N, behavior_N, advantages_N = (np.array(x) for x in zip(*numbers, strict=True))

    def objective(params):
        logs_NV = jax.nn.log_softmax(policy.logits(params, rows)[b_N, t_N - 1] / TEMPERATURE)
        logprobs_N = logs_NV[jnp.arange(len(numbers)), rows[b_N, t_N]]
        held_N = jax.lax.stop_gradient(logprobs_N)
        weight_N = jnp.minimum(jnp.exp(held_N - behavior_N), CAP)
        loss = -(weight_N * jnp.exp(logprobs_N - held_N) * advantages_N).mean()
        return loss, (logprobs_N, -(jnp.exp(logs_NV) * logs_NV).sum(-1))

    return objective


@pytest.fixture(scope="module")
def case(load):
    """case(name) -> (sampled, loss, sorted scores, gradients) of one completion a row."""

    @functools.cache
    def case(name):
        policy, params = load(name)
        sampled = make_sampled(1, lambda _, tokens: -3.0, FAMILY_VOCAB, LENGTHS)
        run = jax.jit(jax.value_and_grad(one_a_row(policy, sampled), has_aux=True))
        (loss, scores), gradients = run(params)
        return sampled, float(loss), [np.sort(x) for x in scores], jax.device_get(gradients)

    return case


def with_empty_rows(batch: TrainBatch, rows: int) -> TrainBatch:
    return TrainBatch(*(np.pad(x, ((0, rows), (0, 0))) for x in batch))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_one_completion_a_row(name, layout, load, case):
    sampled, expected, expected_scores, expected_gradients = case(name)
    c, section, empty = LAYOUTS[layout]
    policy, params = load(name, section)
    mesh = make_mesh(section)
    batch = with_empty_rows(pack(*sampled, c, row_shards(mesh)), empty)
    objective = make_objective(AlgorithmSection(correction_cap=CAP))
    gradient = jax.jit(make_gradient(policy, objective, c, TEMPERATURE, mesh))
    on_mesh = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim)), batch)
    gradients, scores = gradient(params, {}, on_mesh)

    loss, _ = objective(scores, on_mesh)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, other in zip(scores, expected_scores, strict=True):
        found = np.sort(np.asarray(found)[batch.loss_mask_BC > 0])
        np.testing.assert_allclose(found, other, atol=1e-5 * np.ptp(other))
    for path, leaf in jax.tree.leaves_with_path(expected_gradients):
        found = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
        most = np.abs(leaf).max()
        assert most > 0, path
        np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-5 * most, err_msg=str(path))


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_chunks_give_the_same_scores_and_gradients(name, load, case):
    most = row_shards(make_mesh(MESH))
    batch = pack(*case(name)[0], UpdateSection(row_tokens=64), most)
    factors_BC = np.random.default_rng(0).normal(size=batch.targets_BC.shape)

    def run(section, chunk_tokens, shards):
        policy, params = load(name, section)

        def total(params):
            scores = score_sampled(policy, params, batch, TEMPERATURE, chunk_tokens, shards)
            return sum((x * factors_BC * batch.loss_mask_BC).sum() for x in scores), scores

        return jax.device_get(jax.jit(jax.grad(total, has_aux=True))(params))

    expected_gradients, expected = run(ONE, None, 1)
    for section, shards in ((ONE, 1), (MESH, most)):
        gradients, found = run(section, 7 * shards, shards)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.ptp(other))
        for one, other in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("name", NAMES)
def test_tokens_out_of_sight_have_exactly_no_influence(name, load):
    """Every slot of the row holds another token id, so that the gradient of the embedding's rows
    is that of the slots."""
    policy, params = load(name)
    ids = iter(np.random.default_rng(0).permutation(np.arange(1, FAMILY_VOCAB)).tolist())

    def rollout(length):
        tokens = np.array([next(ids) for _ in range(length)], np.int32)
        return Rollout(tokens, -np.ones(length, np.float32), np.zeros(length), "stop", 0)

    groups = [
        Group(Prompt(i, "", tuple(next(ids) for _ in range(start)), {}), tuple(map(rollout, ends)))
        for i, (start, ends) in enumerate([(WINDOW + 6, (5, 4, 3)), (3, (5, 2, 4))])
    ]
    batch = pack(groups, np.ones((2, 3)), np.ones((2, 3)), UpdateSection())
    tokens_T, _, group_T, _, predictor_C, targets_C = (x[0] for x in batch[:6])
    assert len(batch.tokens_BT) == 1 and len(set(tokens_T[group_T > 0])) == (group_T > 0).sum()
    seen = Packed(batch.group_BT, batch.branch_BT, batch.positions_BT)

    @jax.jit
    def influence(params, factors_T):
        """Of each slot on the states that predict a completion."""

        def total(embed):
            changed = params | {"embed": embed}
            hidden, _ = policy.hidden(changed, batch.tokens_BT, batch.positions_BT, seen)
            return (jnp.sin(hidden[0]) * factors_T[:, None]).sum()

        return jnp.abs(jax.grad(total)(params["embed"])[tokens_T]).sum(axis=-1)

    for group in groups:
        for r in group.rollouts:
            own_C = np.isin(targets_C, r.tokens)
            factors_T = np.zeros(len(tokens_T), np.float32)
            factors_T[predictor_C[own_C]] = 1.0
            in_sight = {*group.prompt.tokens, *r.tokens[:-1].tolist()}
            found_T = influence(params, factors_T)
            for t in np.flatnonzero(group_T):
                assert (found_T[t] > 0) == (tokens_T[t] in in_sight), (t, found_T[t])
