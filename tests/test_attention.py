"""Every backend computes the same attention: that of its definition, token by token."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import MeshSection
from jaxrl.mesh import make_mesh
from jaxrl.models.attention import Masked, Packed, backend_for, make_attend
from jaxrl.models.config import load_config
from jaxrl.types import UserError

TINY = load_config(Path(__file__).parent.parent / "configs" / "tiny_policy")
ROWS, SLOTS, HEADS, KV_HEADS, WIDTH, WINDOW = 2, 150, 4, 2, 16, 20
MODELS = {
    "plain": {},
    "windows": {"sliding_window": WINDOW, "sliding": (True, True)},
    "some_windows": {"sliding_window": WINDOW, "sliding": (True, False)},
    "soft_cap": {"attention_softcap": 2.0, "attention_scale": 0.4},
    "sinks": {"attention_sinks": True},
}


def model(name):
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH}
    return dataclasses.replace(TINY, num_layers=2, **heads, **MODELS[name])


def rows_of_units() -> list[list[tuple[int, int, int]]]:
    """(group, branch, position) of each slot: prompts, completions, padding."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        slots = []
        for group, completions in ((1, 4), (2, 1), (3, 2)):
            start = int(rng.integers(5, 30))
            slots += [(group, 0, t) for t in range(start)]
            for branch in range(1, completions + 1):
                slots += [(group, branch, start + t) for t in range(int(rng.integers(1, 17)))]
        assert 80 < len(slots) <= SLOTS
        rows.append(slots + [(0, 0, 0)] * (SLOTS - len(slots)))
    return rows


UNITS = rows_of_units()
GROUP_BT, BRANCH_BT, POSITIONS_BT = (
    np.array([[slot[i] for slot in row] for row in UNITS], np.int32) for i in range(3)
)
REAL_BT11 = (GROUP_BT > 0)[:, :, None, None]


def sees(query, key, window) -> bool:
    (group, branch, position), (key_group, key_branch, key_position) = query, key
    related = key_group == group and key_branch in (0, branch)
    return related and (window is None or position - key_position < window)


def mask_of(branches: bool, window: int | None) -> np.ndarray:
    rows = UNITS if branches else [[(10 * g + b, 0, t) for g, b, t in row] for row in UNITS]
    return np.array(
        [[[s <= t and sees(row[t], row[s], window) for s in range(SLOTS)] for t in range(SLOTS)]
         for row in rows]
    )  # fmt: skip


def packed(branches: bool) -> Packed:
    if branches:
        return Packed(GROUP_BT, BRANCH_BT, POSITIONS_BT)
    return Packed(10 * GROUP_BT + BRANCH_BT, None, POSITIONS_BT)


def by_definition(c, mask_BTS):
    """attend(q, k, v, sinks), with all scores of all heads at once."""
    scale = c.attention_scale or WIDTH**-0.5

    def attend(q_BTNH, k_BSKH, v_BSKH, sinks_N):
        k_BSNH, v_BSNH = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k_BSKH, v_BSKH))
        scores_BNTS = scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH)
        if c.attention_softcap:
            scores_BNTS = c.attention_softcap * jnp.tanh(scores_BNTS / c.attention_softcap)
        shares_BNTS = jnp.where(mask_BTS[:, None], jnp.exp(scores_BNTS), 0.0)
        total_BNT = shares_BNTS.sum(axis=-1)
        if sinks_N is not None:
            total_BNT += jnp.exp(sinks_N)[None, :, None]
        return jnp.einsum("bnts,bsnh->btnh", shares_BNTS / total_BNT[..., None], v_BSNH)

    return attend


def arrays(c, dtype=np.float32, rows=ROWS):
    rng = np.random.default_rng(1)
    shapes = [(HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, WIDTH)]
    qkv = [rng.normal(size=(rows, SLOTS, *shape)).astype(dtype) for shape in shapes]
    return *qkv, rng.normal(size=HEADS).astype(np.float32) if c.attention_sinks else None


def value_and_gradients(attend, given):
    """Of what real tokens get; padding computes whatever it likes."""
    weights = np.random.default_rng(2).normal(size=given[0].shape).astype(np.float32)

    def total(*given):
        return (jnp.where(REAL_BT11, attend(*given), 0.0).astype(jnp.float32) * weights).sum()

    wanted = tuple(i for i, x in enumerate(given) if x is not None)
    found = jax.jit(lambda *given: jnp.where(REAL_BT11, attend(*given), 0.0))(*given)
    return [found, *jax.jit(jax.grad(total, argnums=wanted))(*given)]


def assert_near(found, expected, tolerance):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize(
    ("backend", "name", "branches"),
    [
        ("xla", "plain", True),
        ("xla", "some_windows", True),
        ("xla", "soft_cap", False),
        ("xla", "sinks", True),
        ("splash", "plain", True),
        ("splash", "windows", True),
        ("splash", "some_windows", False),
        ("splash", "soft_cap", True),
        ("splash", "sinks", False),
    ],
)
def test_values_and_gradients_are_those_of_the_definition(backend, name, branches):
    c, seen = model(name), packed(branches)
    given = arrays(c)
    mixed = name == "some_windows"
    for slides in (True, False) if mixed else (None,):
        window = c.sliding_window if slides is not False else None
        attend = make_attend(c, seen, backend, interpret=True)
        flag = None if slides is None else jnp.asarray(slides)
        found = value_and_gradients(lambda *given: attend(*given, flag), given)  # noqa: B023
        assert_near(
            found, value_and_gradients(by_definition(c, mask_of(branches, window)), given), 2e-5
        )


def splash(mesh):
    c = model("sinks")
    attend = make_attend(c, packed(True), "splash", mesh, True)
    return value_and_gradients(lambda *given: attend(*given, None), arrays(c))


@pytest.fixture(scope="module")
def on_one_device():
    return splash(None)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 2}, {"data": 2, "tensor": 2}, {"tensor": 4}, {"fsdp": 2, "tensor": 4}],
    ids=str,
)  # 4 shards of 2 key/value heads: each device has the one that its queries look at
def test_splash_on_a_mesh_is_splash_on_one_device(sizes, on_one_device):
    assert_near(splash(make_mesh(MeshSection(**sizes))), on_one_device, 1e-5)


def test_rows_that_the_mesh_does_not_divide_are_left_to_xla():
    """The probe is one row."""
    c, mesh = model("plain"), make_mesh(MeshSection(fsdp=2))
    one = Packed(*(None if x is None else x[:1] for x in packed(True)))
    given = arrays(c, rows=1)
    attend = make_attend(c, one, "splash", mesh)  # not interpreted: it would need a TPU
    expected = by_definition(c, mask_of(True, None)[:1])(*given)
    found = jax.jit(attend)(*given, None)
    np.testing.assert_allclose(found[:, :80], expected[:, :80], atol=1e-5)


def test_the_slots_of_a_cache_are_seen_as_the_mask_and_the_window_say():
    c = model("windows")
    q, k, v, sinks = arrays(c)
    mask_BTS = np.random.default_rng(0).random((ROWS, 3, SLOTS)) < 0.5
    distance_BTS = np.random.default_rng(1).integers(-5, 2 * WINDOW, (ROWS, 3, SLOTS))
    found = make_attend(c, Masked(mask_BTS, distance_BTS), "splash")(
        q[:, :3], k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), sinks, None
    )
    expected = by_definition(c, mask_BTS & (distance_BTS < WINDOW))(q[:, :3], k, v, sinks)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_in_is_bfloat16_out_with_scores_in_float32():
    c = model("plain")
    given = [x if x is None else jnp.asarray(x, jnp.bfloat16) for x in arrays(c)]
    exact = by_definition(c, mask_of(True, None))(
        *(x if x is None else x.astype(jnp.float32) for x in given)
    )
    for backend in ("xla", "splash"):
        found = jax.jit(make_attend(c, packed(True), backend, interpret=True))(*given, None)
        assert found.dtype == jnp.bfloat16
        error = jnp.abs(jnp.where(REAL_BT11, found - exact, 0.0))
        assert 0 < float(error.max()) < 0.03


def test_the_gradient_of_long_rows_does_not_keep_their_scores():
    """Through four layers, as the decoder runs them. [heads, T, T] in float32 is 16 MiB a layer."""
    c, T = model("plain"), 1024
    seen = Packed(np.ones((1, T), np.int32), np.zeros((1, T), np.int32), np.arange(T)[None])
    attend = make_attend(c, seen, "xla")

    def total(q_BTNH, kv_BTKH):
        def layer(q_BTNH, _):
            return attend(q_BTNH, kv_BTKH, kv_BTKH, None, None), None

        return jax.lax.scan(layer, q_BTNH, None, length=4)[0].sum()

    q = jax.ShapeDtypeStruct((1, T, HEADS, WIDTH), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, T, KV_HEADS, WIDTH), jnp.float32)
    memory = jax.jit(jax.grad(total)).lower(q, kv).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 40 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("branches", [True, False], ids=["branches", "segments"])
@pytest.mark.parametrize("name", ["plain", "windows"])
def test_cudnn_is_the_definition_within_bfloat16(name, branches):
    c = model(name)
    given = [x if x is None else jnp.asarray(x, jnp.bfloat16) for x in arrays(c)]
    attend = make_attend(c, packed(branches), "cudnn")
    found = value_and_gradients(lambda *given: attend(*given, None), given)
    exact = [x if x is None else x.astype(jnp.float32) for x in given]
    expected = value_and_gradients(by_definition(c, mask_of(branches, c.sliding_window)), exact)
    assert_near([x.astype(jnp.float32) for x in found], expected, 0.03)


# --- which backend ---


@pytest.mark.parametrize(
    ("platform", "name", "dtype", "backend", "because"),
    [
        ("cpu", "plain", "float32", "xla", None),
        ("tpu", "plain", "bfloat16", "splash", None),
        ("tpu", "sinks", "float32", "splash", None),
        ("gpu", "plain", "bfloat16", "cudnn", None),
        ("gpu", "windows", "bfloat16", "cudnn", None),
        ("gpu", "plain", "float32", "xla", "cudnn needs model.compute_dtype bfloat16"),
        ("gpu", "sinks", "bfloat16", "xla", "cudnn has no attention sinks"),
        ("gpu", "soft_cap", "bfloat16", "xla", "cudnn has no soft cap"),
    ],
)
def test_auto_is_what_the_device_is_good_at_and_the_model_can_have(
    platform, name, dtype, backend, because
):
    found, line = backend_for("auto", platform, model(name), dtype)
    assert found == backend
    assert (line is None) == (because is None) and (because or "") in (line or "")


@pytest.mark.parametrize(
    ("asked", "platform", "name", "message"),
    [
        ("splash", "cpu", "plain", "splash needs tpu devices, and these are cpu; use"),
        ("cudnn", "tpu", "plain", "cudnn needs gpu devices, and these are tpu; use"),
        ("cudnn", "gpu", "soft_cap", "cudnn has no soft cap of attention scores"),
    ],
)
def test_a_backend_asked_for_by_name_is_never_exchanged(asked, platform, name, message):
    assert backend_for("xla", platform, model(name), "bfloat16") == ("xla", None)
    with pytest.raises(UserError, match=f"model.attention = {asked}: {message}"):
        backend_for(asked, platform, model(name), "bfloat16")
