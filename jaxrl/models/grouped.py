"""A product with one of several matrices, by runs of rows: the experts of a mixture."""

import functools

import jax
import numpy as np

_TILE = 128  # rows that a tile of the kernel has at least


def grouped_dot(
    x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array, tpu: bool, interpret: bool = False
) -> jax.Array:
    """The first rows_E[0] rows times w_EDF[0], the next rows_E[1] times w_EDF[1], ... [R, F].

    What stands behind the last run is not to be used. XLA has kernels for this product and for the
    gradient of x on TPU, but not for that of w, which it computes as products of all rows with all
    matrices: `tpu` takes the grouped one of Pallas (megablox, which ships with jax), for R that is
    a multiple of 128. `interpret`: that without a TPU, slowly.
    """
    if tpu and len(x_RD) % _TILE == 0:
        return _grouped(interpret, x_RD, w_EDF, rows_E)
    return jax.lax.ragged_dot(x_RD, w_EDF, rows_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(interpret: bool, x_RD, w_EDF, rows_E):
    return jax.lax.ragged_dot(x_RD, w_EDF, rows_E)


def _forward(interpret: bool, x_RD, w_EDF, rows_E):
    return jax.lax.ragged_dot(x_RD, w_EDF, rows_E), (x_RD, w_EDF, rows_E)


def _backward(interpret: bool, kept, dy_RF):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_RD, w_EDF, rows_E = kept
    (R, D), F = x_RD.shape, dy_RF.shape[1]
    tile = next(size for size in (512, 256, _TILE) if R % size == 0)
    dw_EDF = tgmm(
        x_RD.T,
        dy_RF,
        rows_E,
        w_EDF.dtype,
        (tile, min(D, 1024), min(F, 1024)),
        num_actual_groups=len(w_EDF),
        interpret=interpret,
    )
    dx_RD = jax.lax.ragged_dot(dy_RF, w_EDF.swapaxes(1, 2), rows_E)
    return dx_RD, dw_EDF, np.zeros(rows_E.shape, jax.dtypes.float0)


_grouped.defvjp(_forward, _backward)
