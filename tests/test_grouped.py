"""Runs of rows times a matrix each, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxrl.models.grouped import grouped_dot

R, D, F = 256, 48, 40


def by_run(x_RD, w_EDF, rows):
    starts = np.cumsum([0, *rows])
    parts = [x_RD[a:b] @ w for a, b, w in zip(starts, starts[1:], w_EDF, strict=False)]
    return jnp.concatenate([*parts, jnp.zeros((R - starts[-1], F))])


@pytest.mark.parametrize("tpu", [True, False])
@pytest.mark.parametrize(
    "rows",
    [(100, 28, 128), (0, 256, 0), (3, 0, 130), (0, 0, 0)],
    ids=["all", "one", "some_rows_behind", "none"],
)
def test_products_and_gradients_are_those_of_each_run(rows, tpu):
    rng = np.random.default_rng(0)
    x_RD, w_EDF, weights_RF = (
        rng.normal(size=shape).astype(np.float32) for shape in ((R, D), (3, D, F), (R, F))
    )
    inside_R1 = np.arange(R)[:, None] < sum(rows)

    def total(product):
        return lambda x, w: (jnp.where(inside_R1, product(x, w), 0.0) * weights_RF).sum()

    def found(x, w):
        return grouped_dot(x, w, jnp.asarray(rows, jnp.int32), tpu, interpret=True)

    def expected(x, w):
        return by_run(x, w, rows)

    np.testing.assert_allclose(
        jnp.where(inside_R1, found(x_RD, w_EDF), 0.0), expected(x_RD, w_EDF), atol=1e-4
    )
    for a, b in zip(
        jax.grad(total(found), (0, 1))(x_RD, w_EDF),
        jax.grad(total(expected), (0, 1))(x_RD, w_EDF),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_on_tpu_no_gradient_multiplies_every_row_with_every_matrix():
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    rows, wide, experts = 1024, 256, 8
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def flops(tpu):
        def total(x, w, rows_E):
            return grouped_dot(x, w, rows_E, tpu).astype(jnp.float32).sum()

        given = shape(rows, wide), shape(experts, wide, wide), shape(experts, dtype=jnp.int32)
        compiled = jax.jit(jax.grad(total, 1)).lower(*given).compile()
        return compiled.cost_analysis()["flops"] / (2 * rows * wide * wide)

    assert flops(tpu=True) < 1.2
    assert flops(tpu=False) > experts / 2  # once this fails, XLA has a kernel of its own
