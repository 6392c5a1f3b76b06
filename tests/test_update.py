"""An update is the torch one on the transformers model, on any mesh; a bad one never happened."""

import logging
import math
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl import checkpoint
from jaxrl.config import AlgorithmSection, MeshSection, OptimizerSection, UpdateSection
from jaxrl.mesh import make_mesh, param_shardings
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy
from jaxrl.models.params import param_specs
from jaxrl.objectives.aggregation import make_shares
from jaxrl.objectives.objective import make_objective
from jaxrl.objectives.tokens import Anchors
from jaxrl.optimizer import slicing
from jaxrl.packing import minibatches, pack, rows_of_microbatch
from jaxrl.types import Group, Prompt, Rollout, TrainBatch, UserError
from jaxrl.update import (
    init_state,
    make_copy,
    make_gradient,
    make_optimizer,
    make_step,
    make_update,
    microbatch_tokens,
    score_sampled,
)
from tests.reference_policy import VOCAB, make_reference, params_of, save_reference

# eps is far above the rounding of a gradient, or Adam would blow that up to a whole step.
OPTIMIZER = OptimizerSection(
    learning_rate=3e-3,
    warmup_steps=3,
    beta1=0.8,
    beta2=0.95,
    eps=1e-3,
    weight_decay=0.1,
    max_grad_norm=3.0,
)
FAST = OPTIMIZER.model_copy(update={"learning_rate": 0.3, "warmup_steps": 0})
ALGORITHM = AlgorithmSection(correction_cap=1.3)
TEMPERATURE = 1.4
MESHES = {"one_device": MeshSection(), "mesh": MeshSection(data=2, fsdp=2, tensor=2)}
# Lengths of prompts, and of the completions behind each: 21, 15 and 24 tokens, prompts shared.
LENGTHS = {3: (5, 2, 7, 4), 1: (3, 6, 1, 4), 6: (8, 2, 5, 3)}
SHARDS = 4
LAYOUTS = {
    "shared": UpdateSection(),
    "alone": UpdateSection(share_prompts=False),
    "microbatches": UpdateSection(row_tokens=16, max_tokens_per_microbatch=64),
}


class Sampled(NamedTuple):
    """What one update trains on, before it is packed."""

    groups: list[Group]
    advantages_PG: np.ndarray
    weights_PG: np.ndarray

    def completions(self):
        """(prompt, tokens, mask, behaviour log-probs, advantage) of each."""
        for group, advantages, weights in zip(*self, strict=True):
            for rollout, advantage, weight in zip(group.rollouts, advantages, weights, strict=True):
                usable = np.isfinite(rollout.logprobs)
                behavior = np.where(usable, rollout.logprobs, 0.0)
                yield group.prompt.tokens, rollout.tokens, usable * weight, behavior, advantage


def make_sampled(seed: int, logprobs_of, vocab: int = VOCAB, lengths=None) -> Sampled:
    """Behaviour log-probs near the policy's own, so that some weights reach the cap; a completion
    and a token are not trained on."""
    rng = np.random.default_rng(seed)

    def rollout(prompt, length, i):
        tokens = rng.integers(1, vocab, length).astype(np.int32)
        logprobs = logprobs_of(prompt, tokens) + rng.normal(0, 0.5, length)
        return Rollout(tokens, np.float32(logprobs), np.zeros(length, np.int64), "stop", i)

    groups = []
    for p, (start, ends) in enumerate((lengths or LENGTHS).items()):
        prompt = tuple(rng.integers(1, vocab, start).tolist())
        rollouts = tuple(rollout(prompt, length, i) for i, length in enumerate(ends))
        groups.append(Group(Prompt(p, "", prompt, {}), rollouts))
    groups[0].rollouts[2].logprobs[1] = np.nan
    shape = (len(groups), len(groups[0].rollouts))
    weights_PG = np.ones(shape, np.float32)
    weights_PG[-1, 0] = 0.0
    return Sampled(groups, np.float32(rng.normal(size=shape)), weights_PG)


def make_batch(reference, seed: int) -> Sampled:
    def own(prompt, tokens):
        with torch.no_grad():
            return torch_scores(reference, prompt, tokens)[0].numpy()

    return make_sampled(seed, own)


def torch_scores(model, prompt, tokens):
    """Log-probs and entropies of the tokens behind the prompt, alone in their row."""
    row = torch.tensor([[*prompt, *tokens.tolist()]])
    logits_TV = model(row).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    logs_TV = torch.log_softmax(logits_TV, -1)
    picked_T = logs_TV.gather(-1, row[0, len(prompt) :, None])[:, 0]
    return picked_T, -(logs_TV.exp() * logs_TV).sum(-1)


class TorchUpdate:
    """The same update in torch, float64: AdamW, clip_grad_norm_, linear warm-up."""

    def __init__(self, model):
        o = OPTIMIZER
        self.model = model.double()
        self.adamw = torch.optim.AdamW(
            model.parameters(),
            lr=o.learning_rate,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            weight_decay=o.weight_decay,
        )
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min(1.0, (step + 1) / o.warmup_steps)
        )

    def __call__(self, sampled: Sampled) -> dict[str, float]:
        columns = []
        for prompt, tokens, *numbers in sampled.completions():
            mask, behavior, advantage = (torch.tensor(x).double() for x in numbers)
            scores = torch_scores(self.model, prompt, tokens)
            columns.append((*scores, mask, behavior, advantage.expand(len(tokens))))
        logprobs_N, entropy_N, mask_N, behavior_N, advantages_N = (
            torch.cat(column) for column in zip(*columns, strict=True)
        )
        proximal_N = logprobs_N.detach()
        ratio_N = (logprobs_N - proximal_N).exp()
        clipped_N = ratio_N.clamp(1 - ALGORITHM.clip_low, 1 + ALGORITHM.clip_high)
        rho_N = (proximal_N - behavior_N).exp()
        weight_N = rho_N.clamp(max=ALGORITHM.correction_cap)
        surrogate_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
        loss = -(mask_N * weight_N * surrogate_N).sum() / mask_N.sum()
        self.adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.max_grad_norm)
        before = [p.detach().clone() for p in self.model.parameters()]
        learning_rate = self.adamw.param_groups[0]["lr"]
        self.adamw.step()
        self.warmup.step()
        moved = [p.detach() - b for p, b in zip(self.model.parameters(), before, strict=True)]
        capped_N = (rho_N > ALGORITHM.correction_cap) * mask_N
        update_norm, param_norm = (
            torch.sqrt(sum((x**2).sum() for x in tensors)).item() for tensors in (moved, before)
        )
        return {
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "update_norm": update_norm,
            "update_ratio": update_norm / param_norm,
            "learning_rate": learning_rate,
            "entropy": ((entropy_N * mask_N).sum() / mask_N.sum()).item(),
            "tokens/trained": mask_N.sum().item(),
            "update/skipped": 0.0,
            "update/nonfinite": 0.0,
            "correction/capped_fraction": (capped_N.sum() / mask_N.sum()).item(),
            "ratio/mean": 1.0,
        }


class Learner:
    """Ours, on a mesh."""

    def __init__(
        self, config, params, mesh: str, c: UpdateSection = LAYOUTS["shared"], **optimizer
    ):
        self.mesh, self.c = make_mesh(MESHES[mesh]), c
        self.shardings = param_shardings(param_specs(config), self.mesh)
        self.optimizer = make_optimizer(OPTIMIZER.model_copy(update=optimizer))
        policy = Policy(config, jnp.float32, mesh=self.mesh)
        self.update = make_update(
            policy, self.optimizer, ALGORITHM, c, TEMPERATURE, self.mesh, self.start(params)
        )

    def start(self, params):
        # jnp.array: the update consumes the state, and must not consume the test's arrays.
        params = jax.device_put(jax.tree.map(jnp.array, params), self.shardings)
        return init_state(params, self.optimizer, self.mesh)


@pytest.fixture(scope="module")
def weights():
    """A fresh copy of the reference for the tests that train it."""
    return lambda **changes: make_reference(seed=8, **changes)


@pytest.fixture(scope="module")
def config(weights, tmp_path_factory):
    return load_config(save_reference(weights(), tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def sampled(weights):
    model = weights()
    return [make_batch(model, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def batches(sampled):
    """Packed for either mesh, all of one shape."""
    return [pack(*each, LAYOUTS["shared"], SHARDS) for each in sampled]


@pytest.fixture(scope="module")
def params(weights):
    return params_of(weights())


@pytest.fixture(scope="module")
def learners(config, params):
    return {name: Learner(config, params, name) for name in MESHES}


@pytest.fixture(params=MESHES)
def learner(request, learners):
    return learners[request.param]


@pytest.fixture
def single(learners):
    return learners["one_device"]


class Bigram:
    """The least policy there is, for tests in which the model does not matter."""

    def __init__(self, vocab_size: int = VOCAB):
        self.config = SimpleNamespace(vocab_size=vocab_size)

    mesh, compute_dtype = None, jnp.float32

    def hidden(self, params, tokens_BT, positions_BT, seen):
        return jax.nn.one_hot(tokens_BT, VOCAB), None

    def unembed(self, params, hidden):
        return hidden @ params["table"]

    def learner(self, where="one_device", c=LAYOUTS["shared"], optimizer=OPTIMIZER, **algorithm):
        """(update, state), the parameters on every device."""
        mesh, optimizer = make_mesh(MESHES[where]), make_optimizer(optimizer)
        table = jnp.sin(jnp.arange(VOCAB * VOCAB, dtype=jnp.float32)).reshape(VOCAB, VOCAB)
        replicated = NamedSharding(mesh, PartitionSpec())
        state = init_state({"table": jax.device_put(table, replicated)}, optimizer, mesh)
        section = AlgorithmSection(**algorithm)
        return make_update(self, optimizer, section, c, TEMPERATURE, mesh, state), state


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_close(found, expected, atol):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=atol, rtol=0), found, expected)


def assert_bitwise(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def spoil(batch: TrainBatch, value: float) -> TrainBatch:
    advantages_BC = batch.advantages_BC.copy()
    advantages_BC[0] = value
    return batch._replace(advantages_BC=advantages_BC)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def empty(batch: TrainBatch) -> TrainBatch:
    return batch._replace(loss_mask_BC=np.zeros_like(batch.loss_mask_BC))


# --- equality with torch ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_updates_equal_those_of_torch(layout, config, params, sampled, weights):
    reference = weights()
    theirs = TorchUpdate(reference)
    single = Learner(config, params, "one_device", LAYOUTS[layout])
    state = single.start(params)
    clipped = []
    for count, each in enumerate(sampled, start=1):
        state, metrics = single.update(state, [pack(*each, single.c)])
        expected = theirs(each)
        assert 0 < expected["correction/capped_fraction"] < 1
        clipped.append(expected["grad_norm"] > OPTIMIZER.max_grad_norm)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
        assert_close(host(state.params), params_of(reference), 1e-5)
        assert (int(state.step), int(state.skipped_in_a_row)) == (count, 0)
    assert set(clipped) == {True, False}  # the gradient's norm was cut, and was not
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), host(state.params), params)
    assert min(jax.tree.leaves(moved)) > 1e-4  # every parameter was trained


@pytest.mark.parametrize("correction", ["token_tis", "none"])
def test_the_engine_s_log_probs_matter_only_where_they_are_corrected(correction, batches):
    losses = []
    for behavior_BC in (batches[0].behavior_logprobs_BC, batches[0].behavior_logprobs_BC * 3):
        update, state = Bigram().learner(correction=correction)
        _, metrics = update(state, [batches[0]._replace(behavior_logprobs_BC=behavior_BC)])
        losses.append(float(metrics["loss"]))
    assert (losses[0] == losses[1]) == (correction == "none")


# --- what ratios and distances are measured from ---


def own_logprobs(table, batch: TrainBatch):
    """Of a `Bigram`'s sampled tokens, and which of them are trained on."""
    before_BC = np.take_along_axis(batch.tokens_BT, batch.predictor_BC, axis=1)
    logits_BCV = np.float64(table)[before_BC] / TEMPERATURE
    totals_BC = np.log(np.exp(logits_BCV).sum(axis=-1))
    picked_BC = np.take_along_axis(logits_BCV, batch.targets_BC[..., None], -1)[..., 0]
    return picked_BC - totals_BC, batch.loss_mask_BC > 0


def k3_between(table, reference, batch: TrainBatch) -> float:
    new_BC, trained_BC = own_logprobs(table, batch)
    x = (new_BC - own_logprobs(reference, batch)[0])[trained_BC]
    return float((np.exp(-x) - 1 + x).mean())


def test_the_reference_is_the_policy_that_the_run_began_with(batches):
    update, state = Bigram().learner(optimizer=FAST, kl_coefficient=0.5)
    start = np.array(state.params["table"])
    for count, batch in enumerate(batches):
        table = np.array(state.params["table"])
        state, metrics = update(state, [batch])
        expected = k3_between(table, start, batch)
        assert (expected > 1e-4) == (count > 0)
        np.testing.assert_allclose(metrics["kl/reference"], expected, rtol=1e-3, atol=1e-7)


def test_the_reference_of_adapters_is_the_weights_beneath_them(batches):
    class Adapted(Bigram):
        def unembed(self, params, hidden):
            return hidden @ (params["table"] + params.get("adapter", 0.0))

    mesh, optimizer = make_mesh(MESHES["one_device"]), make_optimizer(OPTIMIZER)
    table = np.sin(np.arange(VOCAB**2.0, dtype=np.float32)).reshape(VOCAB, VOCAB)
    # As after a resume: the adapters are no longer those of the start.
    adapter = 0.1 * np.cos(table)
    for every, change in ((None, 0 * adapter), (9, -adapter)):  # or, refreshed, others
        expected = k3_between(table + adapter, table + change, batches[0])
        section, c = AlgorithmSection(kl_coefficient=0.5, reference_every=every), LAYOUTS["shared"]
        state = init_state({"adapter": jnp.array(adapter)}, optimizer, mesh)
        if every is not None:
            state = state._replace(reference={"adapter": jnp.array(change)})
        update = make_update(
            Adapted(), optimizer, section, c, TEMPERATURE, mesh, state, {"table": table}
        )
        _, metrics = update(state, [batches[0]])
        np.testing.assert_allclose(metrics["kl/reference"], expected, rtol=1e-3)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_reference_that_is_refreshed_is_the_policy_of_that_step_and_survives_a_resume(
    updates, batches, tmp_path
):
    """Every 2 steps, however many updates they are; resumed after the third."""
    given = {"kl_coefficient": 0.5, "reference_every": 2, "updates_per_batch": updates}

    def fresh():
        update, state = Bigram().learner(optimizer=FAST, **given)
        copy = make_copy(Bigram(), state.params, None)
        return update, state._replace(reference=copy(state.params))

    update, state = fresh()
    reference = np.array(state.params["table"])
    for count, batch in enumerate([*batches, *batches[:2]], start=1):
        table = np.array(state.params["table"])
        state, metrics = update(state, [batch])
        if updates == 1:
            expected = k3_between(table, reference, batch)
            np.testing.assert_allclose(metrics["kl/reference"], expected, rtol=1e-3, atol=1e-7)
        if count % 2 == 0:
            reference = np.array(state.params["table"])
        np.testing.assert_array_equal(state.reference["table"], reference)
        if count == 3:
            checkpoint.save(tmp_path, 3, state, {}, keep=1)

    resumed, start = fresh()
    restored = checkpoint.restore_newest(tmp_path, abstract(start))
    assert restored is not None
    again = restored.arrays
    for batch in batches[:2]:
        again, _ = resumed(again, [batch])
    assert_bitwise(host(again), host(state))


def test_several_updates_of_a_batch_measure_from_the_policy_that_it_arrived_at(batches):
    batch, learner = batches[0], Bigram()
    update, state = learner.learner(updates_per_batch=3)
    old_BC, trained_BC = own_logprobs(state.params["table"], batch)
    state, metrics = update(state, [batch])
    assert int(state.step) == 3

    once, state = learner.learner()
    mesh, optimizer = make_mesh(MESHES["one_device"]), make_optimizer(OPTIMIZER)
    step = make_step(
        learner, optimizer, AlgorithmSection(), LAYOUTS["shared"], TEMPERATURE, mesh, state
    )
    state, _ = once(state, [batch])
    for _ in range(2):
        new_BC, _ = own_logprobs(state.params["table"], batch)
        state, expected = step(state, batch, {}, Anchors(np.float32(old_BC)))
    ratio = np.exp(new_BC - old_BC)[trained_BC]
    assert ratio.std() > 1e-3
    np.testing.assert_allclose(metrics["ratio/mean"], ratio.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio/max"], ratio.max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)

    update, state = learner.learner(updates_per_batch=3)
    state, metrics = update(state, [spoil(batch, np.nan)])
    assert metrics["update/skipped"] == metrics["update/nonfinite"] == 3
    assert int(state.skipped_in_a_row) == 3


def by_token(found: list[dict], name: str) -> float:
    """The mean over steps, where each counts as often as it trains tokens."""
    tokens = [float(metrics["tokens/trained"]) for metrics in found]
    return sum(float(m[name]) * n for m, n in zip(found, tokens, strict=True)) / sum(tokens)


def test_minibatches_are_steps_of_their_own_measured_from_where_the_batch_arrived(sampled):
    """3 prompts in two parts, gone over twice."""
    c, learner = LAYOUTS["shared"], Bigram()
    parts = [pack(*(x[part] for x in sampled[0]), c) for part in (slice(1), slice(1, 3))]
    cut = [pack(*part, c) for part in minibatches(2, *sampled[0])]
    assert_bitwise(cut, parts)
    given = {"minibatches": 2, "updates_per_batch": 2, "kl_coefficient": 0.1}
    update, state = learner.learner(optimizer=FAST, **given)
    _, by_hand = learner.learner(optimizer=FAST)
    old = [np.float32(own_logprobs(by_hand.params["table"], part)[0]) for part in parts]
    state, metrics = update(state, cut)

    mesh, optimizer = make_mesh(MESHES["one_device"]), make_optimizer(FAST)
    section = AlgorithmSection(kl_coefficient=0.1)
    step = make_step(learner, optimizer, section, c, TEMPERATURE, mesh, by_hand)
    for _ in range(2):
        found = []
        for part, old_BC in zip(parts, old, strict=True):
            by_hand, last = step(by_hand, part, {}, Anchors(old_BC, old_BC))
            found.append(last)
    assert_close(host(state.params), host(by_hand.params), 1e-5)
    assert int(state.step) == 4 and metrics["tokens/trained"] == sum(
        part.loss_mask_BC.sum() for part in parts
    )
    for name in ("loss", "grad_norm", "kl/reference", "mismatch/k3"):
        np.testing.assert_allclose(metrics[name], by_token(found, name), rtol=1e-4, err_msg=name)
    for name, extreme in (("ratio/max", max), ("ratio/min", min), ("mismatch/geometric_min", min)):
        expected = extreme(float(last[name]) for last in found)
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, err_msg=name)
    assert int(metrics["update/compiled_shapes"]) == len({part.tokens_BT.shape for part in parts})


def test_a_minibatch_with_nothing_to_train_is_left_out_of_what_a_step_reports(batches):
    update, state = Bigram().learner(minibatches=2, proximal="engine")
    alone, only = Bigram().learner(proximal="engine")
    state, metrics = update(state, [batches[0], empty(batches[1])])
    only, expected = alone(only, [batches[0]])
    assert metrics["update/skipped"] == 1 and int(state.skipped_in_a_row) == 0
    assert_bitwise(host(state.params), host(only.params))
    for name in expected.keys() - {"update/skipped"}:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6, err_msg=name)
    _, metrics = update(state, [empty(batch) for batch in batches[:2]])
    assert metrics["update/skipped"] == 2 and all(np.isfinite(x) for x in metrics.values())


def test_neither_rows_nor_micro_batches_nor_the_mesh_change_what_is_learned(sampled):
    """With a ratio and a mask of whole completions, and denominators of completions."""
    algorithm = {
        "loss": "gspo",
        "clip_low": 0.02,
        "clip_high": 0.02,
        "aggregation": "sequence_mean_token_mean",
        "geometric_mask": [0.3, 1.5],
        "kl_coefficient": 0.1,
        "updates_per_batch": 2,
    }
    found = []
    for where, layout in (
        ("one_device", "shared"),
        ("one_device", "alone"),
        ("one_device", "microbatches"),
        ("mesh", "microbatches"),
    ):
        c, shards = LAYOUTS[layout], SHARDS if where == "mesh" else 1
        update, state = Bigram().learner(where, c, FAST, **algorithm)
        shares = make_shares(algorithm["aggregation"], 1)
        for each in sampled[:2]:
            state, metrics = update(state, [pack(*each, c, shards, shares=shares)])
        assert 0 < metrics["correction/masked_fraction"] < 1 and metrics["clip_fraction"] > 0
        found.append((host(state.params), host(metrics)))
    for params, metrics in found[1:]:
        assert_close(params, found[0][0], 1e-4)
        for name in metrics.keys() - {"update/compiled_shapes"}:
            expected = found[0][1][name]
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


# --- the mesh ---


def test_a_mesh_gives_the_parameters_of_one_device(learners, params, batches):
    single, mesh = learners.values()
    one, many = single.start(params), mesh.start(params)
    for batch in batches:
        one, metrics = single.update(one, [batch])
        many, metrics_of_many = mesh.update(many, [batch])
        for name, value in metrics.items():
            np.testing.assert_allclose(metrics_of_many[name], value, rtol=1e-3, atol=1e-5)
    assert_close(host(many.params), host(one.params), 1e-5)


def test_state_stays_where_it_was_created_and_is_consumed(learner, params, batches):
    state = learner.start(params)
    first = jax.tree.map(lambda x: x.sharding, state)
    for leaf, sharding in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(learner.shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    shapes = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert all(leaf.sharding.spec == shapes[leaf.shape] for leaf in moments)
    for batch in batches[:2]:
        before = state
        state, _ = learner.update(state, [batch])
        assert jax.tree.map(lambda x: x.sharding, state) == first
        large = [leaf for leaf in jax.tree.leaves(before) if leaf.ndim]
        assert all(leaf.is_deleted() for leaf in large)


@pytest.mark.parametrize("layout", ["shared", "microbatches"])
def test_the_rows_of_a_batch_are_split_over_data_and_fsdp(layout, sampled):
    seen = []

    class Watching(Bigram):
        def hidden(self, params, tokens_BT, *rest):
            jax.debug.inspect_array_sharding(tokens_BT, callback=seen.append)
            return super().hidden(params, tokens_BT, *rest)

    update, state = Watching().learner("mesh", LAYOUTS[layout])
    batch = pack(*sampled[0], LAYOUTS[layout], SHARDS)
    update(state, [batch])
    B, T = batch.tokens_BT.shape
    limit = LAYOUTS[layout].max_tokens_per_microbatch or B * T
    rows = rows_of_microbatch(B, T, limit, SHARDS)
    assert seen and {sharding.shard_shape((rows, T)) for sharding in seen} == {(rows // 4, T)}


def test_updates_of_one_shape_are_compiled_once(batches, caplog):
    def compiled():
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]

    update, state = Bigram().learner()
    state, _ = update(state, [batches[0]])
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
        for batch in (*batches[1:], spoil(batches[0], np.nan), empty(batches[0])):
            state, metrics = update(state, [batch])
            assert int(metrics["update/compiled_shapes"]) == 1
        assert not compiled()
        half = jax.tree.map(lambda x: x[:2], batches[0])
        _, metrics = update(state, [half])
        assert int(metrics["update/compiled_shapes"]) == 2
        assert any("step" in message for message in compiled())  # one that is, is noticed


def test_a_micro_batch_is_what_the_caches_of_each_cpu_hold_unless_it_is_set():
    mesh = make_mesh(MESHES["mesh"])
    assert microbatch_tokens(UpdateSection(), mesh) == 2048 * mesh.size
    assert microbatch_tokens(UpdateSection(max_tokens_per_microbatch=96), mesh) == 96


@pytest.mark.parametrize(("logits_mib", "most"), [(1, 2), (2, 4), (160, 80)])
def test_logits_of_as_many_tokens_exist_as_the_knob_allows(logits_mib, most, sampled):
    seen = []

    class Watching(Bigram):
        def unembed(self, params, hidden):
            seen.append(math.prod(hidden.shape[:-1]))
            return super().unembed(params, hidden)

    c = UpdateSection(logits_mib=logits_mib)
    update, state = Watching(vocab_size=2**17).learner(c=c)  # half a MiB of logits a token
    update(state, [pack(*sampled[0], c)])
    assert set(seen) == {most}


# --- where moments lie, and in what ---


def moments(state):
    return [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]


def test_moments_in_host_memory_change_nothing_and_stay_there(
    config, params, batches, learners, tmp_path
):
    here = learners["mesh"]
    hosted = Learner(config, params, "mesh", offload="host")
    near, far = here.start(params), hosted.start(params)
    for batch in batches[::2]:
        near, _ = here.update(near, [batch])
        before = far
        far, _ = hosted.update(far, [batch])
        assert {leaf.sharding.memory_kind for leaf in moments(far)} == {"pinned_host"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(far.params)} == {"device"}
        assert all(leaf.is_deleted() for leaf in moments(before))
        for a, b in zip(moments(near), moments(far), strict=True):
            assert a.sharding.spec == b.sharding.spec
        assert_close(host(far), host(near), 1e-6)  # other fusions round otherwise
    before = host(far)
    far, _ = hosted.update(far, [spoil(batches[1], np.nan)])
    assert_bitwise(host(far.params), before.params)
    assert_bitwise(host(far.opt_state), before.opt_state)

    checkpoint.save(tmp_path, 3, far, {}, keep=1)
    restored = checkpoint.restore_newest(tmp_path, abstract(far))
    assert restored is not None
    assert_bitwise(host(restored.arrays), host(far))
    assert jax.tree.map(lambda x: x.sharding, restored.arrays) == jax.tree.map(
        lambda x: x.sharding, far
    )


def test_memory_that_devices_do_not_reach_is_refused(params, single, monkeypatch):
    optimizer = make_optimizer(OPTIMIZER.model_copy(update={"offload": "host"}))
    monkeypatch.setattr("jaxrl.update.HOST", "far_host")
    monkeypatch.setattr("jaxrl.optimizer.HOST", "far_host")
    with pytest.raises(UserError, match=r"= host needs far_host memory.* \(cpu\) reach .*; set it"):
        init_state(params, optimizer, single.mesh)


@pytest.mark.parametrize(
    ("shape", "local", "expected"),
    [
        ((28, 1024, 3072), (28, 64, 3072), (0, 28)),  # layers
        ((28, 128), (28, 128), (0, 1)),  # too few of them for the tiles
        ((48, 128, 2048, 768), (48, 16, 256, 768), (0, 48)),
        ((151936, 1024), (151936, 64), (0, 8)),  # 18,992 rows each, a multiple of 16
        ((1024, 151936), (64, 151936), (0, 1)),  # 1187 x 128 columns: nothing divides them
        ((64, 4096), (64, 4096), (1, 32)),
        ((1024,), (64,), (0, 1)),
    ],
)
def test_slices_are_whole_tiles_of_an_axis_that_no_device_splits(shape, local, expected):
    assert slicing(shape, local) == expected


def test_a_first_moment_in_bfloat16_halves_it_and_little_else(config, params, batches, single):
    rounded = Learner(config, params, "one_device", first_moment_dtype="bfloat16")
    one, other = single.start(params), rounded.start(params)
    for batch in batches:
        one, _ = single.update(one, [batch])
        other, _ = rounded.update(other, [batch])
    adam = other.opt_state[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(other.params)} == {jnp.dtype("float32")}
    assert_close(host(other.params), host(one.params), 1e-4)  # of steps of 3e-3 at most
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), host(other.params), host(one.params))
    assert max(jax.tree.leaves(moved)) > 1e-7


def test_gradients_of_bfloat16_products_add_up_in_float32(sampled):
    class Rounding(Bigram):
        def unembed(self, params, hidden):
            table = params["table"].astype(jnp.bfloat16)
            return (hidden.astype(jnp.bfloat16) @ table).astype(jnp.float32)

    c = UpdateSection(row_tokens=16, max_tokens_per_microbatch=16)
    mesh, table = make_mesh(MESHES["one_device"]), jnp.sin(jnp.arange(VOCAB**2.0))
    params = {"table": table.reshape(VOCAB, VOCAB)}
    objective = make_objective(AlgorithmSection(correction="none"))
    gradient = jax.jit(make_gradient(Rounding(), objective, c, TEMPERATURE, mesh))
    batch = pack(*sampled[0], c)
    copies = 2**9  # the last of as many equal terms changes a bfloat16 sum by nothing
    many = jax.tree.map(lambda x: np.concatenate([x] * copies), batch)
    many = many._replace(share_BC=many.share_BC / copies)
    one, same = gradient(params, {}, batch)[0], gradient(params, {}, many)[0]
    assert same["table"].dtype == jnp.float32
    np.testing.assert_allclose(same["table"], one["table"], rtol=1e-4, atol=1e-7)


def test_gradients_of_the_head_add_up_in_float32_over_chunks_of_logits(config):
    """On each of 8 devices 512 equal tokens, one a chunk: beyond 256 of them a sum in bfloat16
    stands still."""

    class Alike(Policy):
        def hidden(self, params, tokens_BT, positions_BT, seen):
            return jnp.ones((*tokens_BT.shape, config.hidden_size), jnp.bfloat16), None

    policy = Alike(config, jnp.bfloat16, mesh=make_mesh(MeshSection(fsdp=8)))
    D, V = config.hidden_size, config.vocab_size
    head_VD = jnp.sin(jnp.arange(D * V, dtype=jnp.float32)).reshape(V, D)

    def gradient(tokens):
        batch = TrainBatch(*[np.ones((8, tokens), np.int32)] * len(TrainBatch._fields))

        def total(head_VD):
            params = {"embed": head_VD, "lm_head": head_VD}
            return score_sampled(policy, params, batch, 1.0, 8, 8)[0].sum()

        return jax.jit(jax.grad(total))(head_VD)

    one, many = gradient(2) / 2, gradient(512)
    np.testing.assert_allclose(many, 512 * one, rtol=0.01, atol=1e-3 * np.abs(many).max())


# --- updates that must not happen ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])  # 1e30: only the norm overflows
def test_a_non_finite_update_changes_nothing_and_is_counted(value, learner, params, batches):
    state = learner.start(params)
    state, _ = learner.update(state, [batches[0]])  # moments are no longer zeros
    before = host(state)
    for count in (1, 2):
        state, metrics = learner.update(state, [spoil(batches[1], value)])
        assert_bitwise(host(state.params), before.params)
        assert_bitwise(host(state.opt_state), before.opt_state)
        assert int(state.skipped_in_a_row) == count and int(state.step) == 1 + count
        assert metrics["update/skipped"] == metrics["update/nonfinite"] == 1.0
        assert metrics["update_norm"] == metrics["update_ratio"] == 0.0
        assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    state, metrics = learner.update(state, [batches[1]])
    assert int(state.skipped_in_a_row) == 0 and metrics["update/skipped"] == 0.0


def test_after_a_skipped_update_training_goes_on_as_if_it_had_not_been(single, params, batches):
    straight, bumpy = single.start(params), single.start(params)
    for batch in batches:
        straight, _ = single.update(straight, [batch])
        bumpy, _ = single.update(bumpy, [spoil(batch, np.nan)])
        bumpy, _ = single.update(bumpy, [empty(batch)])
        bumpy, _ = single.update(bumpy, [batch])
    assert_bitwise(host(bumpy.params), host(straight.params))
    assert_bitwise(host(bumpy.opt_state), host(straight.opt_state))


def test_a_batch_with_nothing_to_train_changes_nothing_and_is_not_a_failure(
    learner, params, batches
):
    state = learner.start(params)
    state, _ = learner.update(state, [batches[0]])
    before = host(state)
    state, metrics = learner.update(state, [empty(batches[1])])
    assert_bitwise(host(state.params), before.params)  # weight decay, too, was left out
    assert_bitwise(host(state.opt_state), before.opt_state)
    assert int(state.skipped_in_a_row) == 0 and int(state.step) == 2
    assert metrics["update/skipped"] == 1.0 and metrics["update/nonfinite"] == 0.0
    assert metrics["loss"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_a_batch_with_nothing_to_train_does_not_end_a_row_of_failures(single, params, batches):
    state = single.start(params)
    for batch, count in (
        (spoil(batches[0], np.nan), 1),
        (empty(batches[0]), 1),
        (spoil(batches[0], np.nan), 2),
        (batches[0], 0),
    ):
        state, _ = single.update(state, [batch])
        assert int(state.skipped_in_a_row) == count


# --- the learning rate ---


@pytest.mark.parametrize(("warmup", "factors"), [(4, [0.25, 0.5, 0.75, 1, 1]), (0, [1, 1, 1])])
def test_the_learning_rate_rises_to_its_value_in_warmup_steps(warmup, factors):
    """With beta1 = beta2 = 0 and a tiny eps, a step of Adam is the learning rate itself."""
    optimizer = make_optimizer(
        OptimizerSection(
            learning_rate=0.1,
            warmup_steps=warmup,
            beta1=0.0,
            beta2=0.0,
            eps=1e-12,
            weight_decay=0.0,
        )
    )
    params = jnp.zeros(2)
    state = optimizer.init(params)
    for factor in factors:
        change, state = optimizer.adamw.update(jnp.array([0.3, -0.2]), state, params)
        np.testing.assert_allclose(change, [-0.1 * factor, 0.1 * factor], rtol=1e-5)
