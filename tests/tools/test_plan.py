"""The plan of a run: against cases known by hand, and the figures of the trainer on a TPU slice."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge import compare
from bridge.encoding import Shadow
from bridge.export import Exporter
from jaxrl.config import MeshSection
from jaxrl.mesh import make_mesh, param_shardings
from jaxrl.models.config import LoraConfig, load_config
from jaxrl.models.params import param_specs, trained_specs, tree_of
from jaxrl.settings import load
from jaxrl.types import UserError
from tools.plan import topology
from tools.plan.__main__ import main
from tools.plan.estimate import Pools, model_flops, sizes
from tools.plan.hlo import Program, axes_of
from tools.plan.program import (
    Compiled,
    TooLarge,
    _compile,
    compile_export,
    compile_update,
    largest_batch,
    prepare,
    version_bytes,
)
from tools.plan.topology import open_target

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "configs" / "shapes"
SMALL = ROOT / "configs" / "plan_qwen3_0.6b.yaml"
DEMO = ROOT / "configs" / "arithmetic.yaml"
WHOLE = P()


@pytest.fixture(scope="module")
def chips():
    """The devices of a v5e slice, by its shape."""
    pytest.importorskip("libtpu")
    return lambda shape: topologies.get_topology_desc(f"v5e:{shape}", "tpu").devices


@pytest.fixture(scope="module", params=["cpu", "tpu"])
def devices(request, chips):
    """Four devices: simulated on CPU, and of a slice that is not here."""
    return jax.devices()[:4] if request.param == "cpu" else chips("2x2")


def on(devices, *shape, spec=WHOLE, axes=("x",), sizes=None):
    mesh = Mesh(
        np.array(devices).reshape(sizes or len(devices)),
        axes,
        axis_types=(AxisType.Auto,) * len(axes),
    )
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))


def product(a, b):
    return a @ b


def chain(a, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), a, weights)[0]


def chain_of_chains(a, weights):
    return jax.lax.scan(lambda x, _: (chain(x, weights), None), a, None, length=3)[0]


@pytest.mark.parametrize(
    "function, stack, products", [(product, (), 1), (chain, (5,), 5), (chain_of_chains, (5,), 15)]
)
def test_loops_count_as_often_as_they_run(devices, function, stack, products):
    a, b = on(devices, 256, 384), on(devices, *stack, 384, 384)
    compiled = jax.jit(function).lower(a, b).compile()
    cost = Program(compiled.as_text()).cost()
    assert cost.unknown_loops == ()
    assert cost.matmul_flops == products * 2 * 256 * 384 * 384
    # Each weight is read once at the least; nothing is moved that the text does not show.
    assert cost.hbm_bytes >= math.prod(stack) * 384 * 384 * 2 or cost.hbm_bytes == 0


def test_xla_itself_counts_the_body_of_a_loop_once(chips):
    """The reason why the text is read; when this fails, XLA's own count may do."""
    devices = chips("2x2")
    a, b = on(devices, 256, 384), on(devices, 5, 384, 384)
    flops = jax.jit(chain).lower(a, b).compile().cost_analysis()["flops"]
    assert flops < 2 * 2 * 256 * 384 * 384


def test_collectives_of_a_loop_count_with_their_axis_and_bytes(devices):
    def body(x):
        def step(total, _):
            return jax.lax.psum(total * 1.5, "y"), None

        return jax.lax.scan(step, x, None, length=7)[0]

    sharded = on(devices, 8, 1024, spec=P("x", None), axes=("x", "y"), sizes=(2, 2))
    mesh = sharded.sharding.mesh
    function = jax.shard_map(body, mesh=mesh, in_specs=P("x", None), out_specs=P("x", None))
    cost = Program(jax.jit(function).lower(sharded).compile().as_text()).cost()
    (found,) = cost.collectives
    assert (found.kind, found.count) == ("all-reduce", 7)
    assert axes_of(found.groups, ("x", "y"), (2, 2)) == ("y",)
    item = found.bytes // (4 * 1024)  # CPU sums bfloat16 in float32
    assert item in (2, 4) and found.bytes == 4 * 1024 * item
    assert found.wire_bytes == found.bytes  # a ring of two sends each half twice


def test_collectives_written_out_all_count_though_they_have_one_channel(devices):
    def body(x):
        summed = jax.lax.psum(x, "y")
        whole = jax.lax.all_gather(summed, "x", axis=1)
        return jax.lax.ppermute(whole, "x", [(0, 1), (1, 0)])

    sharded = on(devices, 256, 1024, spec=P("x", None), axes=("x", "y"), sizes=(2, 2))
    mesh = sharded.sharding.mesh
    function = jax.shard_map(body, mesh=mesh, in_specs=P("x", None), out_specs=P("x", None))
    text = jax.jit(function).lower(sharded).compile().as_text()
    assert text.count("channel_id=1,") == 3  # when this fails, channels may tell them apart
    kinds = sorted(found.kind for found in Program(text).cost().collectives)
    assert kinds == ["all-gather", "all-reduce", "collective-permute"]


LOOP = """
HloModule m

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(11)
  ROOT %lt = pred[] compare(%i, %limit), direction=DIRECTION
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x = f32[8]{0} get-tuple-element(%p.1), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i.1, %two)
  %permuted = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8]) tuple(%next, %permuted)
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %start = s32[] constant(3)
  %both = (s32[], f32[8]) tuple(%start, %x.1)
  %loop = (s32[], f32[8]) while(%both), condition=%cond, body=%body
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("direction, trips", [("LT", 4), ("LE", 5), ("NE", None)])
def test_trip_counts_follow_start_step_and_limit(direction, trips):
    cost = Program(LOOP.replace("DIRECTION", direction)).cost()  # 3, 5, 7, 9 and 11
    assert cost.collectives[0].count == (trips or 1)
    assert cost.unknown_loops == (() if trips else ("loop",))


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,1},{2,3}}", ("y",)),
        ("replica_groups={{0,2},{1,3}}", ("x",)),
        ("replica_groups=[2,2]<=[4]", ("y",)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ("x",)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ("x",)),
        ("replica_groups=[1,4]<=[4]", ("x", "y")),
    ],
)
def test_groups_in_every_spelling_give_their_mesh_axes(groups, axes):
    text = LOOP.replace("DIRECTION", "LT").replace(
        "collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}",
        f"all-reduce(%x), channel_id=1, {groups}, to_apply=%add",
    )
    (found,) = Program(text).cost().collectives
    assert axes_of(found.groups, ("x", "y"), (2, 2)) == axes


def test_a_program_that_is_too_large_is_an_answer(chips):
    huge = jax.ShapeDtypeStruct(
        (40 << 30,), jnp.int8, sharding=NamedSharding(Mesh(chips("2x2")[:1], "x"), P())
    )
    found = _compile(jax.jit(lambda x: x * 2).lower(huge))
    assert isinstance(found, TooLarge)
    assert found.wanted is not None and found.wanted >= 80 << 30


@pytest.mark.parametrize(
    "name, parameters, active",
    [
        ("qwen3_0.6b", 596_049_920, None),
        ("qwen3_8b", 8_190_735_360, None),
        ("qwen3_30b_a3b", 30_532_122_624, 3.35e9),
    ],
)
def test_shapes_are_those_of_the_published_models(name, parameters, active):
    decoder = load_config(SHAPES / name)
    specs = param_specs(decoder)
    assert sum(math.prod(spec.shape) for spec in specs.values()) == parameters
    c = load(ROOT / "configs" / f"plan_{name}.yaml")
    assert (ROOT / c.model.path).resolve() == (SHAPES / name).resolve()
    if active is not None:
        batch = largest_batch(load(SMALL), 1, 0.0)
        found = sizes(c, decoder, specs, specs, 0, batch).active_parameters
        assert found == pytest.approx(active - 151_936 * 2048, rel=0.01)  # a lookup multiplies none


def test_model_flops_by_hand():
    """Qwen3-0.6B: 15.7 M weights a layer (https://huggingface.co/Qwen/Qwen3-0.6B's config.json)."""
    decoder = load_config(SHAPES / "qwen3_0.6b")
    specs = param_specs(decoder)
    batch = largest_batch(load(SMALL), 16, 0.0)
    found = model_flops(decoder, specs, specs, batch)
    layer = 1024 * 2048 * 2 + 2 * 1024 * 1024 + 3 * 1024 * 3072
    assert found.matrices == 6 * 28 * layer * 16 * 2048
    assert found.head == 6 * 1024 * 151_936 * 16 * 1024
    # Scores and mixtures, forward and twice backward; each token sees those up to itself.
    assert found.attention == 3 * 2 * 2 * 28 * 16 * 128 * 16 * (2048 * 2049 // 2)


def test_frozen_weights_need_no_gradient_of_their_own():
    decoder = load_config(SHAPES / "qwen3_0.6b")
    specs = param_specs(decoder)
    lora = trained_specs(decoder, LoraConfig(8, 16.0, ("q_proj",)))
    batch = largest_batch(load(SMALL), 16, 0.0)
    whole, adapted = (model_flops(decoder, specs, t, batch) for t in (specs, lora))
    adapters = 28 * 8 * (1024 + 2048)
    assert adapted.matrices == whole.matrices * 4 / 6 + 6 * adapters * 16 * 2048
    assert adapted.head == whole.head * 4 / 6


def test_engines_and_idle_shares_by_hand():
    both = Pools(
        train_s=2.0, rollout_s=6.0, tokens=1000, completions=10, engines=1, engine_tokens_per_s=150
    )
    assert both.needed_tokens_per_s == 500 and both.needed_engines == 4
    assert both.idle(0) == (8.0, 0.75, 0.25)
    assert both.idle(1) == (6.0, pytest.approx(2 / 3), 0.0)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--topology", "v5e:4x5"], ["v5e:4x5", "there is no such slice", "4x4", "16x16"]),
        (["--topology", "v9"], ["v9", "v5e: 2x2", "v5p: 2x2x1", "tpu7x", "cpu"]),
        (["--topology", "v5e", "--chips", "7"], ["no slice has 7 chips", "4, 8, 16"]),
        (["--topology", "v5e:2x2", "--chips", "16"], ["--chips 16", "v5e:2x2 has 4"]),
        (["--mesh.fsdp=9"], ["mesh.fsdp", "= 9 devices", "has 8", "--mesh.fsdp=8"]),
        (["--mesh.fsp=9"], ["mesh.fsp: unknown key"]),
        (["--model.path=./nowhere"], ["nowhere", "no such directory"]),
    ],
)
def test_a_mistake_is_one_message_with_the_way_out(capsys, arguments, said):
    code, out, err = run(capsys, "--config", DEMO, "--mesh.fsdp=8", *arguments)
    assert code == 2 and out == ""
    for part in said:
        assert part in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "name, mesh, way",
    [
        ("v5e:2x4", {}, "--mesh.fsdp=8"),
        ("v5e:4x4", {"fsdp": 4}, "--mesh.fsdp=16"),
        ("v5e:4x4", {"fsdp": 1, "tensor": 2}, "--mesh.fsdp=8"),
        ("v5e:2x2", {"fsdp": 1, "tensor": 8}, "--mesh.fsdp=4, with 1 for the other axes"),
        ("tpu7x:2x2x1", {}, "--mesh.fsdp=8"),  # four chips, of two devices each
    ],
)
def test_a_mesh_that_is_not_the_slice_is_refused_with_one_that_is(name, mesh, way):
    pytest.importorskip("libtpu")
    c = load(SMALL, [(f"mesh.{axis}", str(size)) for axis, size in mesh.items()])
    have = math.prod(map(int, name.partition(":")[2].split("x")))
    have *= 2 if name.startswith("tpu7x") else 1
    need = mesh.get("fsdp", 16) * mesh.get("tensor", 1)
    with pytest.raises(UserError) as refused:
        open_target(name, c)
    said = str(refused.value)
    assert f"= {need} devices, and {name} has {have};" in said and said.endswith(way)


def test_on_cpu_the_demo_is_planned_as_it_would_run(capsys, tmp_path):
    """The sizes are those of a real run: what it publishes, and the shapes that it compiles."""
    c = ["--config", DEMO, "--mesh.fsdp=8", "--rollout.prompts_per_step=16", "--link-gbps=1"]
    c += ["--publish.encoding=delta", "--publish.compare=mesh", "--algorithm.preset=grpo"]
    code, out, _ = run(capsys, *c, "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and plan["fits"] is True
    file = (ROOT / "configs" / "tiny_policy" / "model.safetensors").read_bytes()
    weights = len(file) - 8 - int.from_bytes(file[:8], "little")  # behind the header; bfloat16
    published = plan["outside the devices"]["publish, float32"]
    assert published["bytes"] == 2 * weights
    assert published["seconds"] == pytest.approx(published["bytes"] * 8e-9)
    assert 0.004 < published["delta_seconds"] / published["seconds"] < 0.015
    # Parameters and two moments, and a few counters.
    state = plan["outside the devices"]["checkpoint"]["bytes"]
    assert 0 <= state - 3 * published["bytes"] <= 64
    assert plan["memory of a device"]["update"]["argument_bytes"] >= state // 8
    # The last version, and the reference policy.
    kept = plan["memory of a device"]["kept"]["bytes"]
    assert kept == pytest.approx(2 * published["bytes"] / 8, rel=0.01)  # norms lie whole on each
    assert "FLOPs" in out and "publish" in out


def memory_of(capsys, folder, *arguments: object) -> tuple[dict, dict]:
    """Of a small batch of the demo: the lines of a device's memory, and of what is outside."""
    record = folder / "plan.json"
    settings = ["--topology=cpu", "--rollout.prompts_per_step=4", "--json", record]
    assert run(capsys, "--config", DEMO, *settings, *arguments)[0] == 0
    plan = json.loads(record.read_text())
    return plan["memory of a device"], plan["outside the devices"]


@pytest.mark.parametrize(
    "settings, copies",
    [
        (["--mesh.data=4", "--mesh.fsdp=1"], 4),
        (["--mesh.data=2", "--mesh.fsdp=2"], 2),
        (["--mesh.data=4", "--mesh.fsdp=1", "--lora.rank=4"], 4),
    ],
)
def test_the_last_version_is_kept_once_for_each_copy_of_the_parameters(
    capsys, tmp_path, settings, copies
):
    settings += ["--publish.encoding=delta", "--publish.compare=mesh"]
    memory, outside = memory_of(capsys, tmp_path, *settings)
    published = outside["publish, float32"]["bytes"]
    assert memory["kept"]["bytes"] == pytest.approx(published * copies / 4, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 4}, {"fsdp": 2, "tensor": 4}])
def test_what_is_kept_of_a_version_is_what_an_export_keeps(mesh, dtype):
    """Two key/value heads are no multiple of four devices."""
    settings = [(f"mesh.{axis}", str(size)) for axis, size in ({"fsdp": 1} | mesh).items()]
    c = load(DEMO, [*settings, ("publish.dtype", dtype)])
    decoder = load_config(ROOT / "configs" / "tiny_policy")
    setup = prepare(c, decoder, open_target("cpu", c))
    params = jax.tree.map(
        lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), setup.state.params
    )
    exporter = Exporter(setup.trained, dtype, c.publish.bucket_mib << 20, "mesh")
    shadow = Shadow()
    shadow.begin(None, keep=True)
    for group in exporter.groups_since(shadow, params):
        shadow.encoded(group)
    vectors = shadow._next.on_devices.values()
    kept = sum(vector.addressable_shards[0].data.nbytes for vector in vectors)
    padding = len(exporter.plan) * 32 * 1024 * np.dtype(jnp.dtype(dtype)).itemsize
    assert kept - padding < version_bytes(setup) <= kept


def test_moments_on_the_hosts_are_no_memory_of_a_device(capsys, tmp_path):
    settings = ["--mesh.data=2", "--mesh.fsdp=1", "--optimizer.first_moment_dtype=bfloat16"]
    memory, outside = memory_of(capsys, tmp_path, *settings)
    published, whole = outside["publish, float32"]["bytes"], outside["checkpoint"]["bytes"]
    assert whole == memory["state"]["bytes"] == pytest.approx(2.5 * published, abs=64)
    assert memory["state"]["text"].endswith(": parameters and optimizer, float32 and bfloat16")
    assert "on the hosts" not in memory
    memory, outside = memory_of(capsys, tmp_path, *settings, "--optimizer.offload=host")
    assert memory["state"]["bytes"] == pytest.approx(published, abs=64)
    assert memory["state"]["text"].endswith(": parameters, float32")
    assert memory["on the hosts"]["bytes"] == 1.5 * published
    assert "optimizer, float32 and bfloat16" in memory["on the hosts"]["text"]
    assert outside["checkpoint"]["bytes"] == whole


def test_a_program_that_the_compiler_refuses_is_one_message(capsys, monkeypatch):
    """Not exit code 1, which says that there is too little memory."""

    def refuse(self, *arguments):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: slices of lanes.\n\nWhile: %while.349")

    monkeypatch.setattr("jax.stages.Lowered.compile", refuse)
    code, out, err = run(capsys, "--config", DEMO, "--topology=cpu", "--mesh.fsdp=8")
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("tools.plan: cpu x 8: the update cannot be ")
    assert err.endswith("the mesh: UNIMPLEMENTED: slices of lanes.\n")


@pytest.fixture
def too_small(monkeypatch):
    """Devices of 64 MiB: too little for the demo's batch at once, enough for a part of it."""
    small = topology.Target("small", "cpu", tuple(jax.devices()), None, 64 << 20)
    monkeypatch.setattr("tools.plan.__main__.open_target", lambda name, c: small)
    settings = ["--mesh.fsdp=8", "--rollout.prompts_per_step=512", "--update.logits_mib=16"]
    return [*settings, "--model.remat=full", "--update.max_tokens_per_microbatch=1000000"]


def test_advice_is_held_to_what_the_verdict_is(capsys, monkeypatch, too_small):
    """A change of the update does not help an export that is too large, and says so."""
    refused = TooLarge(0.0, 1 << 30, "RESOURCE_EXHAUSTED")
    monkeypatch.setattr("tools.plan.plan.compile_export", lambda setup: refused)
    code, out, _ = run(capsys, "--config", DEMO, *too_small)
    assert code == 1 and "fits (compiled)" not in out
    (tried,) = [line for line in out.splitlines() if "not enough (compiled)" in line]
    assert "--update.max_tokens_per_microbatch 896" in tried
    assert tried.endswith("MiB, but not the export") and "publish.bucket_mib" in out


def test_a_change_that_the_compiler_refuses_is_a_line_of_the_advice(capsys, monkeypatch, too_small):
    compiled, programs = jax.stages.Lowered.compile, []

    def refuse_the_third(self, *arguments):  # after the update and the export
        programs.append(self)
        if len(programs) == 3:
            raise jax.errors.JaxRuntimeError("INTERNAL: no layout")
        return compiled(self, *arguments)

    monkeypatch.setattr("jax.stages.Lowered.compile", refuse_the_third)
    code, out, _ = run(capsys, "--config", DEMO, *too_small)
    assert code == 1 and "fits (compiled)" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("  refused ")]
    assert "--update.max_tokens_per_microbatch 896" in line and "INTERNAL: no layout" in line


def test_a_run_that_does_not_fit_exits_1_and_says_what_would(capsys, too_small):
    code, out, _ = run(capsys, "--config", DEMO, *too_small)
    assert code == 1
    assert "DOES NOT FIT" in out
    # A prompt of 40 tokens and 8 completions of 8 have rows of 112, one for each of 8 devices.
    assert "fits (compiled)" in out and "--update.max_tokens_per_microbatch 896" in out


@pytest.fixture(scope="module")
def slice_of_16():
    """Compiles Qwen3-0.6B's update of 16 sequences of 2,048 tokens, 1,024 sampled, for 16 chips."""
    pytest.importorskip("libtpu")

    def compiled(remat: str):
        c = load(SMALL, [("model.remat", remat), ("model.path", str(SHAPES / "qwen3_0.6b"))])
        target = open_target("v5e:4x4", c)
        setup = prepare(c, load_config(SHAPES / "qwen3_0.6b"), target)
        assert setup.batch.tokens_BT.shape == (16, 2048)
        assert setup.batch.targets_BC.shape == (16, 1024)
        return setup, compile_update(setup, target)

    return compiled


@pytest.fixture(scope="module")
def with_remat(slice_of_16):
    setup, update = slice_of_16("full")
    return setup, update, compile_export(setup)


@pytest.fixture(scope="module")
def without_remat(slice_of_16):
    return slice_of_16("none")


def flops_ratio(update: Compiled) -> float:
    """To the arithmetic that is needed, by the usual formula: attention to all of a row."""
    layer = 1024 * 2048 * 2 + 2 * 1024 * 1024 + 3 * 1024 * 3072
    head, attention = 1024 * 151_936, 2048 * 2 * 16 * 128
    needed = 6 * (28 * (layer + attention) * 2048 + head * 1024)
    assert update.cost.kernels_without_flops == 0 and update.cost.kernel_flops > 0
    return (update.cost.matmul_flops + update.cost.kernel_flops) / needed


def test_temporaries_with_remat(with_remat):
    _, update, export = with_remat
    assert isinstance(update, Compiled) and isinstance(export, Compiled)
    assert update.temporaries <= 2.5e9
    # Parameters and moments in float32, and a batch, cut over 16 chips.
    assert update.arguments == pytest.approx(3 * 4 * 596_049_920 / 16, rel=0.01)
    # The state is written where it was read.
    assert update.outputs - update.aliased < 1e5
    # The largest bucket, the embedding: every chip of several hosts has it whole, twice at most.
    assert export.peak < 2.2 * 151_936 * 1024 * 2


def test_devices_compare_versions_by_themselves(devices):
    """Nothing of a bucket's size but the two versions is in a device's memory, nor travels."""
    mesh = make_mesh(MeshSection(fsdp=2, tensor=2), devices)
    decoder = dataclasses.replace(load_config(SHAPES / "qwen3_0.6b"), num_layers=4)
    specs = param_specs(decoder)
    params = jax.tree.map(
        lambda spec, lies: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=lies),
        tree_of(specs),
        param_shardings(specs, mesh),
    )
    exporter = Exporter(specs, "bfloat16", 128 << 20)
    group = next(group for group in exporter.plan if group.layers > 1)
    made = jax.eval_shape(exporter.program(group, params), *exporter.inputs(group, params))
    layout = exporter.layout(made, mesh)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(layout.shapes, layout.specs, strict=True)
    ]

    def compared(arrays, old):
        new = compare.vector(layout, arrays)
        words, counts = compare.found(layout, old, new)
        return new, counts, compare.compact(layout, new, words, 1 << 17)

    old = jax.eval_shape(lambda arrays: compare.vector(layout, arrays), arrays)
    old = jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=layout.rows)
    assert layout.rows.spec == P(("fsdp", "tensor")) and old.size >= group.nbytes // 2
    compiled = _compile(jax.jit(compared).lower(arrays, old))
    assert isinstance(compiled, Compiled) and not compiled.cost.collectives
    shard = group.nbytes / 4
    assert compiled.arguments + compiled.outputs < 3.2 * shard
    assert compiled.temporaries < 4 * shard


def test_collectives_are_those_of_fsdp(with_remat):
    """Weights travel to the rows, and gradients back: no activation is summed over the chips."""
    _, update, _ = with_remat
    activation = 2048 * 1024 * 2  # bytes of a row's hidden states
    in_layers = [one for one in update.cost.collectives if one.count >= 28]
    assert in_layers
    assert all(one.bytes <= 2 * activation for one in in_layers)
    weights = 596_049_920 * 2
    # Gathered forward and backward, gradients once.
    assert sum(one.count * one.wire_bytes for one in update.cost.collectives) < 4 * weights


def test_nothing_waits_for_the_head_but_once(with_remat):
    """1,024 tokens a chip are four chunks of logits; the head does not travel for each of them."""
    _, update, _ = with_remat
    exposed = [one for one in update.cost.collectives if not one.overlapped]
    head = 151_936 * 1024 * 2
    # Gathered, and its gradient all-reduced, which is twice as much.
    assert sum(one.count * one.wire_bytes for one in exposed) < 3.5 * head


def test_no_loop_of_the_update_has_an_unknown_length(with_remat):
    _, update, _ = with_remat
    assert update.cost.unknown_loops == ()


def test_flops_with_remat(with_remat):
    assert 1.0 < flops_ratio(with_remat[1]) <= 1.4


def test_temporaries_and_flops_without_remat(without_remat):
    _, update = without_remat
    assert isinstance(update, Compiled)
    assert update.temporaries <= 7e9
    # Less than all of it: what a causal mask removes is skipped, tile by tile.
    assert 0.8 < flops_ratio(update) <= 1.1
