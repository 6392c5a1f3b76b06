"""An update is the torch one on the transformers model, on any mesh; a bad one never happened."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.config import AlgorithmSection, MeshSection, OptimizerSection
from jaxrl.mesh import make_mesh, param_shardings
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy
from jaxrl.models.params import param_specs
from jaxrl.types import TrainBatch
from jaxrl.update import init_state, make_optimizer, make_update
from tests.reference_policy import VOCAB, make_reference, params_of, save_reference

# eps is far above the rounding of a gradient, or Adam would blow that up to a whole step.
OPTIMIZER = OptimizerSection(
    learning_rate=3e-3,
    warmup_steps=3,
    beta1=0.8,
    beta2=0.95,
    eps=1e-3,
    weight_decay=0.1,
    max_grad_norm=3.5,
)
ALGORITHM = AlgorithmSection(correction_cap=1.3)
TEMPERATURE = 1.4
MESHES = {"one_device": MeshSection(), "mesh": MeshSection(data=2, fsdp=2, tensor=2)}
B, T = 8, 10


def make_batch(reference, seed: int) -> TrainBatch:
    """Behaviour log-probs near the reference's own, so that some weights reach the cap."""
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    mask_BT = (np.arange(T) >= 3) & (np.arange(T) < rng.integers(5, T + 1, (B, 1)))
    mask_BT[2] = False
    mask_BT[1, 4] = False
    with torch.no_grad():
        own_BT = torch_logprobs(reference, torch.tensor(tokens_BT).long())[0].numpy()
    behavior_BT = (own_BT + rng.normal(0, 0.5, (B, T))) * mask_BT
    advantages_B = rng.normal(size=B)
    return TrainBatch(
        tokens_BT,
        mask_BT.astype(np.float32),
        behavior_BT.astype(np.float32),
        advantages_B.astype(np.float32),
    )


def torch_logprobs(model, tokens_BT):
    """Log-probs and entropies of each token given its prefix, [B, T], 0 in column 0."""
    logs_BSV = torch.log_softmax(model(tokens_BT).logits[:, :-1] / TEMPERATURE, -1)
    picked_BS = logs_BSV.gather(-1, tokens_BT[:, 1:, None])[..., 0]
    entropy_BS = -(logs_BSV.exp() * logs_BSV).sum(-1)
    return tuple(torch.nn.functional.pad(x, (1, 0)) for x in (picked_BS, entropy_BS))


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

    def __call__(self, batch: TrainBatch) -> dict[str, float]:
        tokens_BT = torch.tensor(batch.tokens_BT).long()
        mask_BT, behavior_BT = (torch.tensor(x).double() for x in batch[1:3])
        advantages_B1 = torch.tensor(batch.advantages_B).double()[:, None]
        logprobs_BT, entropy_BT = torch_logprobs(self.model, tokens_BT)
        proximal_BT = logprobs_BT.detach()
        ratio_BT = (logprobs_BT - proximal_BT).exp()
        clipped_BT = ratio_BT.clamp(1 - ALGORITHM.clip_low, 1 + ALGORITHM.clip_high)
        rho_BT = (proximal_BT - behavior_BT).exp()
        weight_BT = rho_BT.clamp(max=ALGORITHM.correction_cap)
        surrogate_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
        loss = -(mask_BT * weight_BT * surrogate_BT).sum() / mask_BT.sum()
        self.adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.max_grad_norm)
        before = [p.detach().clone() for p in self.model.parameters()]
        self.adamw.step()
        self.warmup.step()
        moved = [p.detach() - b for p, b in zip(self.model.parameters(), before, strict=True)]
        capped_BT = (rho_BT > ALGORITHM.correction_cap) * mask_BT
        return {
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "update_norm": torch.sqrt(sum((m**2).sum() for m in moved)).item(),
            "entropy": ((entropy_BT * mask_BT).sum() / mask_BT.sum()).item(),
            "tokens/trained": mask_BT.sum().item(),
            "update/skipped": 0.0,
            "correction/capped_fraction": (capped_BT.sum() / mask_BT.sum()).item(),
            "ratio/mean": 1.0,
        }


class Learner:
    """Ours, on a mesh."""

    def __init__(self, config, mesh: str):
        self.mesh = make_mesh(MESHES[mesh])
        self.shardings = param_shardings(param_specs(config), self.mesh)
        optimizer = make_optimizer(OPTIMIZER)
        policy = Policy(config, jnp.float32)
        self.update = make_update(policy, optimizer, ALGORITHM, TEMPERATURE, self.mesh)
        self.optimizer = optimizer

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
def batches(weights):
    model = weights()
    return [make_batch(model, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def params(weights):
    return params_of(weights())


@pytest.fixture(scope="module")
def learners(config):
    return {name: Learner(config, name) for name in MESHES}


@pytest.fixture(params=MESHES)
def learner(request, learners):
    return learners[request.param]


@pytest.fixture
def single(learners):
    return learners["one_device"]


class Bigram:
    """The least policy there is, for tests in which the model does not matter."""

    def logits(self, params, tokens_BT):
        return params["table"][tokens_BT]

    def learner(self, where="one_device", **algorithm):
        """(update, state), the parameters on every device."""
        mesh, optimizer = make_mesh(MESHES[where]), make_optimizer(OPTIMIZER)
        update = make_update(self, optimizer, AlgorithmSection(**algorithm), TEMPERATURE, mesh)
        table = jnp.sin(jnp.arange(VOCAB * VOCAB, dtype=jnp.float32)).reshape(VOCAB, VOCAB)
        replicated = NamedSharding(mesh, PartitionSpec())
        return update, init_state({"table": jax.device_put(table, replicated)}, optimizer, mesh)


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_close(found, expected, atol):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=atol, rtol=0), found, expected)


def assert_bitwise(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def spoil(batch: TrainBatch, value: float) -> TrainBatch:
    advantages_B = batch.advantages_B.copy()
    advantages_B[0] = value
    return batch._replace(advantages_B=advantages_B)


def empty(batch: TrainBatch) -> TrainBatch:
    return batch._replace(loss_mask_BT=np.zeros_like(batch.loss_mask_BT))


# --- equality with torch ---


def test_three_updates_equal_those_of_torch(single, params, batches, weights):
    reference = weights()
    theirs = TorchUpdate(reference)
    state = single.start(params)
    clipped = []
    for count, batch in enumerate(batches, start=1):
        state, metrics = single.update(state, batch)
        expected = theirs(batch)
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
    for behavior_BT in (batches[0].behavior_logprobs_BT, batches[0].behavior_logprobs_BT * 3):
        update, state = Bigram().learner(correction=correction)
        _, metrics = update(state, batches[0]._replace(behavior_logprobs_BT=behavior_BT))
        losses.append(float(metrics["loss"]))
    assert (losses[0] == losses[1]) == (correction == "none")


# --- the mesh ---


def test_a_mesh_gives_the_parameters_of_one_device(learners, params, batches):
    single, mesh = learners.values()
    one, many = single.start(params), mesh.start(params)
    for batch in batches:
        one, metrics = single.update(one, batch)
        many, metrics_of_many = mesh.update(many, batch)
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
        state, _ = learner.update(state, batch)
        assert jax.tree.map(lambda x: x.sharding, state) == first
        large = [leaf for leaf in jax.tree.leaves(before) if leaf.ndim]
        assert all(leaf.is_deleted() for leaf in large)


def test_the_rows_of_a_batch_are_split_over_data_and_fsdp(batches):
    seen = []

    class Watching(Bigram):
        def logits(self, params, tokens_BT):
            jax.debug.inspect_array_sharding(tokens_BT, callback=seen.append)
            return super().logits(params, tokens_BT)

    update, state = Watching().learner("mesh")
    update(state, batches[0])
    assert seen and {sharding.shard_shape((B, T)) for sharding in seen} == {(B // 4, T)}


def test_updates_of_one_shape_are_compiled_once(batches, caplog):
    def compiled():
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]

    update, state = Bigram().learner()
    state, _ = update(state, batches[0])
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
        for batch in (*batches[1:], spoil(batches[0], np.nan), empty(batches[0])):
            state, _ = update(state, batch)
        assert not compiled()
        half = jax.tree.map(lambda x: x[:4], batches[0])
        update(state, half)
        assert any("step" in message for message in compiled())  # one that is, is noticed


# --- updates that must not happen ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])  # 1e30: only the norm overflows
def test_a_non_finite_update_changes_nothing_and_is_counted(value, learner, params, batches):
    state = learner.start(params)
    state, _ = learner.update(state, batches[0])  # moments are no longer zeros
    before = host(state)
    for count in (1, 2):
        state, metrics = learner.update(state, spoil(batches[1], value))
        assert_bitwise(host(state.params), before.params)
        assert_bitwise(host(state.opt_state), before.opt_state)
        assert int(state.skipped_in_a_row) == count and int(state.step) == 1 + count
        assert metrics["update/skipped"] == 1.0 and metrics["update_norm"] == 0.0
        assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    state, metrics = learner.update(state, batches[1])
    assert int(state.skipped_in_a_row) == 0 and metrics["update/skipped"] == 0.0


def test_after_a_skipped_update_training_goes_on_as_if_it_had_not_been(single, params, batches):
    straight, bumpy = single.start(params), single.start(params)
    for batch in batches:
        straight, _ = single.update(straight, batch)
        bumpy, _ = single.update(bumpy, spoil(batch, np.nan))
        bumpy, _ = single.update(bumpy, empty(batch))
        bumpy, _ = single.update(bumpy, batch)
    assert_bitwise(host(bumpy.params), host(straight.params))
    assert_bitwise(host(bumpy.opt_state), host(straight.opt_state))


def test_a_batch_with_nothing_to_train_changes_nothing_and_is_not_a_failure(
    learner, params, batches
):
    state = learner.start(params)
    state, _ = learner.update(state, batches[0])
    before = host(state)
    state, metrics = learner.update(state, empty(batches[1]))
    assert_bitwise(host(state.params), before.params)  # weight decay, too, was left out
    assert_bitwise(host(state.opt_state), before.opt_state)
    assert int(state.skipped_in_a_row) == 0 and int(state.step) == 2
    assert metrics["update/skipped"] == 1.0 and metrics["loss"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_a_batch_with_nothing_to_train_does_not_end_a_row_of_failures(single, params, batches):
    state = single.start(params)
    for batch, count in (
        (spoil(batches[0], np.nan), 1),
        (empty(batches[0]), 1),
        (spoil(batches[0], np.nan), 2),
        (batches[0], 0),
    ):
        state, _ = single.update(state, batch)
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
        change, state = optimizer.update(jnp.array([0.3, -0.2]), state, params)
        np.testing.assert_allclose(change, [-0.1 * factor, 0.1 * factor], rtol=1e-5)
